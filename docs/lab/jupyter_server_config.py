"""JupyterLab for this repository: what is saved is what git holds, without outputs and run counts; root may start it.

Outputs stay in the open tab. What a stage made lies in outputs/lab/, and executed notebooks in outputs/<run>/.
"""
import os

from nbdev.clean import clean_nb

os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm's, when ipywidgets are not there


def without_outputs(model, path="", **kwargs):
    "Strip a notebook before it is saved."
    if model["type"] != "notebook" or model["content"].get("nbformat") != 4: return
    clean_nb(model["content"], allowed_cell_metadata_keys=["tags"])
    for cell in model["content"]["cells"]:
        if cell["cell_type"] == "code": cell["outputs"], cell["execution_count"] = [], None


c = get_config()  # noqa: F821  (Jupyter defines it)
c.FileContentsManager.pre_save_hook = without_outputs
c.LabApp.default_url = "/lab/tree/nbs/index.ipynb"
c.ServerApp.allow_root = True  # it listens on 127.0.0.1 and asks for a token
