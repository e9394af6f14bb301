"""Reproducible paper kit: LLM-as-a-Judge versus multi-agent refined rewards for Chinese greeting writing (EMNLP 2025)

Modules:

- `creawrite.adversarial`: Path B: a generator and a detector play against each other; reflection on labelled examples keeps the detector's principles honest.
- `creawrite.audit`: What the splits share, and how much of the labels length alone explains: read this before any score.
- `creawrite.data`: Every split as checked rows: one schema each, one file each, whatever format it came in.
- `creawrite.evaluate`: Every policy writes for held-out prompts, both signals score, both frameworks face the evaluation set: with intervals and a length-only baseline.
- `creawrite.grpo`: The same policies trained twice, once by the reward model's score and once by the judge's verdict: the comparison of the paper.
- `creawrite.llm`: One client for every agent and judge: typed answers, a ledger of every call, and a failure that never becomes a grade.
- `creawrite.multi_agent`: Path A: agents debate each candidate greeting, judge it and reflect; what they accept and reject becomes preference pairs.
- `creawrite.offline`: A deterministic rulebook behind the OpenAI wire format, so that the whole kit runs with no key, no network and no GPU.
- `creawrite.paper`: Tables 1-5 and Figure 2 in the paper's shape, rebuilt from files, published values beside ours, and one page that tells the story.
- `creawrite.reward_model`: A model that scores a greeting, trained on pairs; and whether it has learned more than length.
- `creawrite.runs`: Where everything lies, and the runner that turns settings.ini into executed notebooks.
- `creawrite.sft`: A tokenizer, a small model that writes greetings of mixed quality, and the same model after supervised fine-tuning on good ones."""

__version__ = "0.1.0"
