"""Reproducible paper kit: LLM-as-a-Judge versus multi-agent refined rewards for Chinese greeting writing (EMNLP 2025)

Modules:

- `creawrite.adversarial`: Path B: generator against detector; reflection on labels keeps the judge's principles honest.
- `creawrite.answers`: What every agent must answer: a small schema per question, whose descriptions belong to it.
- `creawrite.audit`: What the splits share, and how much of the labels length alone explains: read before any score.
- `creawrite.budget`: How fast the endpoint may be asked, what may be spent, and what each role of each stage has cost.
- `creawrite.cli`: `creawrite`: run, status, keep, audit, compare, data, ledger.
- `creawrite.compare`: What two runs have in common, and where they differ by more than chance.
- `creawrite.core`: One error, one place for everything, files written whole or not at all, secrets that stay out.
- `creawrite.data`: Every split as checked rows: one schema each, one file each, whatever format it came in.
- `creawrite.dialect`: Which of OpenAI's fields one endpoint takes, learned from its refusals.
- `creawrite.encodings`: Bytes to text: UTF-8, UTF-16 and unmistakable GB18030 are read, others refused by name.
- `creawrite.engines`: Who answers: the endpoint that the environment names, or the offline rulebook.
- `creawrite.evaluate`: Every policy writes, both signals score, both frameworks face the labels: with intervals.
- `creawrite.evolution`: GEPA evolves the same principles as the game, with as many calls.
- `creawrite.figures`: One style for every figure: readable in grey, Chinese rendered, same bytes for same data.
- `creawrite.files`: Upstream's four formats, and a user's files: which part each plays, what was left out.
- `creawrite.fingerprint`: One fingerprint for stages, trainings and caches: inputs, parameters, engine and reached code.
- `creawrite.flaws`: Twelve kinds of flaw, each with a rule that finds it and an operator that plants it.
- `creawrite.forecast`: What a run will ask of an endpoint, told before the first call: from earlier runs, else from counts.
- `creawrite.grpo`: The same policies trained twice, by the reward model's score and by the judge's verdict: the paper's comparison.
- `creawrite.judge`: Both reward signals behind one protocol: four agents in debate, and a judge with principles.
- `creawrite.kernels`: Executes one stage's notebook, leaves no secret in the copy, and ends gently on Ctrl-C.
- `creawrite.layouts`: Records as checked rows: labelled rows, pairs, answers or prompts, known by their columns.
- `creawrite.ledger`: Every call of a run as it was sent and came back: nothing is paid twice, all can be replayed.
- `creawrite.llm`: One client for every agent and judge: typed answers, a ledger, no failure taken for a grade.
- `creawrite.messages`: What is sent to an agent and how its reply is read: text under judgement stays data.
- `creawrite.multi_agent`: Path A: agents debate each candidate, judge it and reflect; the outcome becomes preference pairs.
- `creawrite.offline`: A deterministic rulebook behind the OpenAI wire format: no key, no network, no GPU.
- `creawrite.overview`: The kit in one picture and two tables: what flows where, what each notebook is for and reads.
- `creawrite.pacing`: As fast as the endpoint likes, and not faster.
- `creawrite.paper`: Tables 1-5 and Figure 2 in the paper's shape, published values beside ours, and one page of report.
- `creawrite.policies`: What every stage knows of a policy: its chat format, its folder, how it is made, loaded and asked.
- `creawrite.probe`: Twelve flaws, one at a time: 312 minimal pairs that no stage trains on.
- `creawrite.progress`: How the questions of a stage fare: told by the clock, and ended early when too many stay unanswered.
- `creawrite.records`: Rows of any file by what it holds, not by its name: CSV, JSON, JSON Lines, Parquet, lines.
- `creawrite.replies`: What an endpoint's reply says: a completion, or a fault with the server's own words.
- `creawrite.report`: All tables and figures of a run in the order of a story, as markdown and as one HTML page.
- `creawrite.retrieval`: The liked greetings that come nearest to a query, with a leak guard before the search.
- `creawrite.reward_model`: A model that scores a greeting, trained on pairs; and whether it has learned more than length.
- `creawrite.rewards`: What a policy is trained for, the reward model's score or the judge's verdict, and the preflight of both.
- `creawrite.runner`: Brings a run up to date: unchanged stages are skipped, a killed one picks up where it was.
- `creawrite.sentences`: What a table shows, in words: every claim is computed from the very cells that are printed.
- `creawrite.settings`: From settings.ini and the notebooks' parameters to a checked plan of values and reads.
- `creawrite.sft`: A small model that writes greetings of mixed quality, and the same model fine-tuned on good ones.
- `creawrite.slices`: The rows that a number may be believed on, and the simplest evaluators there are.
- `creawrite.splits`: The data of a run as checked rows: one schema and one file per split, errors that name the row.
- `creawrite.stability`: How often a judge's verdict turns when nothing that matters has changed.
- `creawrite.stats`: Intervals, paired tests, agreement beyond chance, and how a number is written: each once.
- `creawrite.tables`: One table in three formats, and captions that say what stands behind a number.
- `creawrite.task`: What makes this kit about Chinese greetings: prompts, principles, flaws, scenes, dimensions.
- `creawrite.text`: Rules about a text alone: spelling, scene, stated constraints, near-duplicates, stray scripts.
- `creawrite.trainers`: What all trainings share: TRL's settings, progress lines, logs, batches, and which need not be repeated.
- `creawrite.trouble`: What a try without a completion means: once more, a missing answer, or the end of the run."""

__version__ = "0.1.0"
