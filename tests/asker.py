"Asks N questions of the endpoint in the environment, as a program that a test may kill: `python tests/asker.py RUN N`."
import asyncio
import sys

from pydantic import BaseModel

from creawrite.llm import gather, open_llm
from creawrite.messages import chat


class Verdict(BaseModel):
    judge: int


def questions(llm, n):
    for number in range(n): yield llm.ask("judge", chat("判断。", {"id": number}, Verdict), Verdict, max_tokens=64)


async def main(run, n):
    answers = await gather(questions(llm := open_llm(run), n), llm=llm, every=2)
    print(f"{sum(map(bool, answers))} answered, {len(llm.missing)} missing")


if __name__ == "__main__": asyncio.run(main(sys.argv[1], int(sys.argv[2])))
