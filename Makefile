# make paper | test | docs | lab | bench | engines | reference — each sets up .venv first, if that is not done yet.
# Variables: PYTHON (3.11 or newer), RUN and PROFILE (for paper and docs), TORCH_INDEX (a package index for torch alone).
SHELL := /bin/bash
HERE := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
PYTHON ?= python3
PROFILE ?= smoke
ASKED := $(RUN)
RUN ?= $(PROFILE)
PY := $(HERE)/.venv/bin/python
READY := $(HERE)/.venv/ready
TORCH := $(shell grep -m1 '^torch==' $(HERE)/constraints.txt)
WANTED := $(shell cat $(HERE)/pyproject.toml $(HERE)/constraints.txt | cksum) $(HERE)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: paper test docs lab bench engines reference setup
.DEFAULT_GOAL := paper

paper: setup
	@cd $(HERE) && $(PY) -m creawrite.cli run --profile $(PROFILE) --run $(RUN)

test: setup
	@cd $(HERE) && $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

docs: setup
	@cd $(HERE) && $(PY) docs/build.py $(if $(ASKED),--run $(ASKED))

lab: setup
	@cd $(HERE) && $(PY) -m jupyterlab --config docs/lab/jupyter_server_config.py

bench: setup
	@cd $(HERE) && for file in bench/bench_*.py; do $(PY) $$file || exit 1; done

# Exports of a smoke run, given to the real engines (engines/README.md): 5 GB of environments under .engines/, once.
engines: setup
	@cd $(HERE) && $(PY) engines/check.py

# Tables, figures and the record of a finished run, small enough to commit: numbers and our own texts, never rows of the data.
reference:
	@cd $(HERE)/outputs && rm -rf reference/$(RUN) && find $(RUN) -path '*/model' -prune -o -type f ! -name '.*' \
	  \( -name '*.csv' -o -name '*.md' -o -name '*.tex' -o -name '*.svg' -o -name '*.png' -o -name run.json -o -name 'judge*.json' -o -path '*/examine/findings.json' -o -name laboratory.json \) -print0 \
	  | xargs -0 cp --parents -t $$(mkdir -p reference && echo reference)

# Torch goes first and alone: asked for as another package's dependency it may come with gigabytes of CUDA libraries.
setup:
	@if [ "$$(cat $(READY) 2>/dev/null)" != "$(WANTED)" ]; then set -e; \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "creawrite needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1 || echo missing): run make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	  [ -x $(PY) ] || { $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "this Python has no venv module: install it (Debian: apt-get install python3-venv)" >&2; exit 1; }; \
	    echo "making $(HERE)/.venv (about 3 minutes, 2.5 GB)"; $(PYTHON) -m venv $(HERE)/.venv; }; \
	  cd $(HERE); \
	  if [ "$$(cut -d' ' -f1,2 $(READY) 2>/dev/null)" = "$(wordlist 1,2,$(WANTED))" ]; then $(PY) -m pip install -q --no-deps --no-build-isolation -e .; \
	  else $(PY) -m pip install -q $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)); \
	    $(PY) -m pip install -q -c constraints.txt setuptools; \
	    $(PY) -m pip install -q --no-build-isolation -c constraints.txt -e '.[test,docs,gepa]'; fi; \
	  echo "$(WANTED)" > $(READY); fi
