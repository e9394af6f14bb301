"""OpenJudge's runner takes the exported grader; its score is what the served judge says.

python accept_openjudge.py EXPORT, with the judge's variables set. EXPORT/texts.json holds texts, EXPORT/queries.json
their queries. Writes EXPORT/accepted.json."""
import asyncio
import json
import os
import sys
from pathlib import Path

def main(export):
    queries, texts = (json.loads((Path(export) / f"{name}.json").read_text(encoding="utf-8"))
                      for name in ("queries", "texts"))
    sys.path.insert(0, export)
    from creawrite_grader import GreetingGrader
    from openjudge.graders.schema import GraderError, GraderScore
    grader = GreetingGrader.from_config(GreetingGrader().to_dict() | {"kwargs": {}})
    found = [asyncio.run(grader.aevaluate(query=query, response=text)) for query, text in zip(queries, texts)]
    assert all(isinstance(each, GraderScore) for each in found), found
    del os.environ["OPENAI_API_KEY"]
    unset = asyncio.run(grader.aevaluate(query=queries[0], response=texts[0]))
    assert isinstance(unset, GraderError), unset
    told = {"scores": [each.score for each in found], "unset": unset.error,
            "principles": len(grader.get_metadata()["principles"])}
    (Path(export) / "accepted.json").write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__": main(*sys.argv[1:])
