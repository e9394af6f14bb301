"""A chat endpoint on loopback that fails as real ones do, from a seed.

The answer to a question {"id": n} is {"judge": n % 7}. GET /told tells what it did. `Served` starts it as a process."""
import argparse
import asyncio
import json
import random
import subprocess
import sys
import urllib.request
from collections import Counter

from aiohttp import web

# the client's next try may succeed
RETRIED = ["429", "429 after", "500", "503", "reset", "truncated", "drip", "no JSON", "empty choices", "no choices"]
ASKED_AGAIN = ["broken schema", "cut off", "refusal"]  # a new attempt may succeed
HARMLESS = ["duplicated choices", "reordered choices", "prose", "late"]  # the answer is there


def completion(*contents, finish="stop", **message):
    "A reply in OpenAI's shape, one choice per (index, content)."
    choices = [{"index": index, "finish_reason": finish,
                "message": {"role": "assistant", "content": content} | message} for index, content in contents]
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices, "usage": usage}


def body_of(kind, right) -> bytes:
    "What a reply of status 200 holds."
    bodies = {
        "no JSON": "<html>busy</html>",
        "broken schema": completion((0, '{"judge": "也许"}')),
        "empty choices": completion(),
        "no choices": {"usage": None},
        "cut off": completion((0, right), finish="length"),
        "refusal": completion((0, right), refusal="no"),
        "prose": completion((0, f"想了想：\n```json\n{right}\n```")),
        "duplicated choices": completion((0, right), (0, '{"judge": 99}')),
        "reordered choices": completion((1, '{"judge": 99}'), (0, right))}
    body = bodies.get(kind) or completion((0, right))
    return (body if isinstance(body, str) else json.dumps(body)).encode()


class Faults:
    "The endpoint."

    def __init__(self, options):
        self.options, self.seen, self.told = options, Counter(), Counter()
        self.places = asyncio.Semaphore(options.places)

    def fault(self, question, rng):
        "What this try of a question meets; an empty string: nothing."
        if question in self.options.always: return self.options.always[question]
        return rng.choice(self.options.kinds) if rng.random() < self.options.rate else ""

    async def chat(self, request):
        text = await request.text()
        body = json.loads(text)
        question = json.loads(body["messages"][-1]["content"].split("\n")[1])["id"]
        self.seen[text] += 1
        rng = random.Random(f"{self.options.seed} {text} {self.seen[text]}")  # so the order of requests does not matter
        kind, right = self.fault(question, rng), json.dumps({"judge": question % 7})
        self.told.update({"tries": 1, kind: 1, "under way": 1})
        self.told["most under way"] = max(self.told["most under way"], self.told["under way"])
        try:
            latency = self.options.latency
            async with self.places:
                await asyncio.sleep(rng.expovariate(1 / latency) if latency and self.options.spread else latency)
            if self.told["under way"] > self.options.most:
                kind = "429"
                self.told["throttled"] += 1
            return await self.reply(request, kind, right)
        finally: self.told["under way"] -= 1

    async def reply(self, request, kind, right):
        error = {"error": {"message": f"no, {request.headers['Authorization']}", "type": "x"}}  # some repeat the key
        if kind.startswith("429"):
            headers = {"Retry-After": self.options.after} if kind == "429 after" else {}
            return web.json_response(error, status=429, headers=headers)
        if kind.isdigit(): return web.json_response(error, status=int(kind))
        if kind == "reset":
            request.transport.abort()
            return web.Response()
        if kind == "late": await asyncio.sleep(0.3)
        if kind == "silent": await asyncio.sleep(1000)
        data = body_of(kind, right)
        if kind in ("truncated", "drip"): return await self.in_pieces(request, kind, data)
        self.told["whole"] += 1
        return web.Response(body=data, content_type="application/json")

    async def in_pieces(self, request, kind, data):
        "Slowly, or only half of it."
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(data))})
        await response.prepare(request)
        for at in range(0, len(data), 20):
            if kind == "truncated" and at > len(data) // 2:
                request.transport.abort()
                break
            await response.write(data[at:at + 20])
            if kind == "drip": await asyncio.sleep(self.options.drip)
        return response

    async def tell(self, request): return web.json_response(self.told)


class Served:
    "The endpoint as a process of its own; `with` gives its address."

    usual = dict(rate=0.0, latency=0.0, seed=7, kinds=RETRIED + ASKED_AGAIN + HARMLESS, always={}, most=10**9,
                 drip=0.05, spread=True, after="1", places=10**9)  # places: worked on at a time, the others wait

    def __init__(self, **options):
        if unknown := set(options) - set(self.usual): raise TypeError(f"no option {unknown}")
        self.command = [sys.executable, __file__, json.dumps(self.usual | options)]

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}/v1"
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def told(self) -> dict:
        "Tries, whole replies, faults by kind, most requests under way."
        with urllib.request.urlopen(f"{self.url}/told") as reply: return json.load(reply)


async def main(options):
    faults, app = Faults(options), web.Application()
    app.add_routes([web.post("/v1/chat/completions", faults.chat), web.get("/v1/told", faults.tell)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    options = argparse.Namespace(**json.loads(sys.argv[1]))
    options.always = {int(number): kind for number, kind in options.always.items()}
    asyncio.run(main(options))
