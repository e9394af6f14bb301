"""A chat endpoint on loopback that speaks the protocol as real ones do, by half: `Served(mode)` starts it as a process.

A mode decides every reply; `served.becomes(mode)` changes it while the address stays. The answer to a question
{"id": n} is {"judge": n % 7}; GET /v1/told tells how many tries there were and the fields of the last one."""
import asyncio
import gzip
import json
import math
import random
import ssl
import subprocess
import sys
import urllib.request

from aiohttp import web

JSON = "application/json"
REFUSED = {  # mode: for each field that is refused, status and words
    "no max_tokens": {"max_tokens": (400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")},
    "no length at all": {"max_tokens": (422, "max_tokens: extra fields not permitted"),
                         "max_completion_tokens": (422, "max_completion_tokens: extra fields not permitted")},
    "no seed": {"seed": (400, "[{'type': 'extra_forbidden', 'loc': ('body', 'seed')}]")},
    "own temperature": {"temperature": (400, "'temperature' does not support 0.0. Only the default (1) is supported.")},
    "no schema": {"json_schema": (400, "This response_format type is unavailable now"),
                  "json_object": (400, "response_format is not supported")},
    "json object": {"json_schema": (400, "response_format.type: must be json_object")},
    "no system": {"system": (400, "System role not supported")},
    "alternating": {"system": (400, "Conversation roles must alternate user/assistant/user/assistant/...")},
    "no system in a body": {"system": (200, "messages[0].role: system is not supported")},
    "no logprobs": {"logprobs": (400, "logprobs are not available for this model")},
    "501": {"seed": (501, "seed is not implemented")}}
PLAIN = {  # mode: status, body, content type
    "page": (200, "<!DOCTYPE html><html><title>Gate</title><body>Welcome to the gateway</body></html>", "text/html"),
    "error in a body": (200, '{"error": {"message": "Provider is asleep", "code": 502}}', JSON),
    "error without code": (200, '{"error": "Provider is asleep"}', JSON),
    "no choices": (200, '{"id": "x", "choices": [], "usage": null}', JSON),
    "null choices": (200, '{"id": "x", "choices": null}', JSON),
    "base_resp": (200, '{"base_resp": {"status_code": 1000, "status_msg": "Provider is asleep"}}', JSON),
    "cut JSON": (200, '{"id": "x", "choices": [{"index": 0, "mess', JSON),
    "cut stream": (200, 'data: {"choices": [{"index": 0, "delta": {"content": "{\\"ju"}}]}\n\n', "text/event-stream"),
    "empty": (200, "", JSON),
    "list": (200, "[1, 2]", JSON),
    "502": (502, "<html><h1>502 Bad Gateway</h1></html>", "text/html"),
    "401": (401, '{"error": {"message": "Incorrect API key provided: sk-abcdefgh12345678"}}', JSON),
    "402": (402, '{"error": {"message": "Insufficient Balance"}}', JSON),
    "quota": (429, '{"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}', JSON),
    "arrears": (429, '{"error": {"code": "1113", "message": "您的账户已欠费，请充值后重试。"}}', JSON),
    "no model": (404, '{"error": {"message": "The model `m` does not exist", "code": "model_not_found"}}', JSON),
    "bad model": (400, '{"error": {"message": "Model m not found. Please check."}}', JSON),
    "bad request": (400, '{"error": {"message": "your account may not use this region"}}', JSON),
    "long pause": (429, '{"error": {"message": "daily limit"}}', JSON)}


def completion(content, finish="stop", **message):
    "A body in OpenAI's shape."
    choice = {"index": 0, "message": {"role": "assistant", "content": content} | message, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion", "model": "m", "choices": [choice],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}}


def bodies(right) -> dict:  # mode -> bytes with status 200
    "Replies that hold a completion, whether or not it is an answer."
    wrong, dumped = '{"judge": 99}', json.dumps(completion(right)).encode()
    without = {name: value for name, value in completion(right).items() if name != "usage"}
    pieces = [{"choices": [{"index": 0, "delta": {"content": part}}]} for part in ("{", right[1:])]
    pieces.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    stream = "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces) + "data: [DONE]\n\n"
    made = {
        "stream": stream.encode(), "blank lines": b"\n\n\n" + dumped, "comments": b": alive\n\n: alive\n\n" + dumped,
        "mark": b"\xef\xbb\xbf" + dumped, "no usage": without, "null usage": without | {"usage": None},
        "half a usage": without | {"usage": {"total_tokens": 15}},
        "parts": completion([{"type": "text", "text": right}]),
        "thinking part": completion([{"type": "thinking", "thinking": wrong}, {"type": "text", "text": right}]),
        "think": completion(f"<think>\n也许 {wrong}？\n</think>\n\n{right}"),
        "think closes": completion(f"也许 {wrong}？\n</think>\n\n{right}"),
        "reasoned": completion(right, reasoning_content=wrong),
        "fence": completion(f"好的：\n```json\n{right}\n```\n完"), "capital STOP": completion(right, "STOP"),
        "end_turn": completion(right, "end_turn"), "null end": completion(right, None),
        "only reasoned": completion(None, "length", reasoning_content=right),
        "reasoned to the end": completion("", "stop", reasoning=right),
        "thinks on": completion(f"<think>\n{right}", "stop"),
        "cut": completion(right[:5], "length"), "MAX_TOKENS": completion(right, "MAX_TOKENS"),
        "refusal": completion(None, refusal="抱歉，我无法协助。"), "filtered": completion("", "content_filter"),
        "chatter": completion("抱歉，我不清楚。"), "network_error": completion("", "network_error")}
    return {mode: body if isinstance(body, bytes) else json.dumps(body).encode() for mode, body in made.items()}


def fitting(part, chance, whole=None):
    "Something that fits a schema, by chance where there is a choice."
    whole = whole or part
    if "$ref" in part: return fitting(whole["$defs"][part["$ref"].rsplit("/", 1)[-1]], chance, whole)
    if "enum" in part: return chance.choice(part["enum"])
    if "anyOf" in part: return fitting(part["anyOf"][0], chance, whole)
    if part["type"] == "object":
        return {name: fitting(each, chance, whole) for name, each in part["properties"].items()}
    if part["type"] == "array": return [fitting(part["items"], chance, whole)] * part.get("minItems", 1)
    return {"string": "祝福", "boolean": chance.random() < 0.5, "integer": 1, "number": 0.5}[part["type"]]


def sureness(verdict: int) -> dict:
    "Log-probabilities of a reply that begins with a verdict, which was three to one."
    options = [{"token": str(word), "logprob": math.log(0.75 if word == verdict else 0.25)} for word in (0, 1)]
    pieces = [{"token": piece, "logprob": 0.0, "top_logprobs": []} for piece in ('{"', "judge", '":', " ")]
    return {"content": [*pieces, {"token": str(verdict), "logprob": 0.0, "top_logprobs": options}]}


class Odd:
    "The endpoint."

    def __init__(self, mode): self.mode, self.tries, self.last = mode, 0, {}

    async def chat(self, request):
        self.tries += 1
        body = await request.json()
        self.last = {"fields": sorted(body), "path": request.path_qs, "api-key": "api-key" in request.headers,
                     "length": body.get("max_tokens") or body.get("max_completion_tokens")}
        if self.mode == "coin":
            wanted = body.get("response_format", {}).get("json_schema", {"schema": {"type": "string"}})["schema"]
            answer = fitting(wanted, random.Random(json.dumps(body)))
            reply = completion(answer if isinstance(answer, str) else json.dumps(answer))
            if "judge" in answer and body.get("logprobs"): reply["choices"][0]["logprobs"] = sureness(answer["judge"])
            return web.json_response(reply)
        right = json.dumps({"judge": json.loads(body["messages"][-1]["content"].rsplit("\n", 2)[-2])["id"] % 7})
        if self.mode == "silent": await asyncio.sleep(1000)
        if self.mode == "every other" and self.tries % 2: request.transport.abort()
        if self.mode == "gzip":
            data = gzip.compress(json.dumps(completion(right)).encode())
            return web.Response(body=data, content_type=JSON, headers={"Content-Encoding": "gzip"})
        for field, (status, words) in REFUSED.get(self.mode, {}).items():
            if self.holds(body, field): return web.json_response({"error": {"message": words}}, status=status)
        if self.mode == "extra fields":
            extra = sorted(set(body) - {"model", "messages", "temperature", "max_tokens"})
            detail = [{"type": "extra_forbidden", "loc": ["body", name], "msg": "not permitted"} for name in extra]
            if detail: return web.json_response({"detail": detail}, status=422)
        if self.mode in PLAIN:
            status, text, kind = PLAIN[self.mode]
            headers = {"Retry-After": "3600"} if self.mode == "long pause" else {}
            return web.Response(status=status, text=text, content_type=kind, headers=headers)
        data = bodies(right).get(self.mode) or json.dumps(completion(right)).encode()
        return web.Response(body=data, content_type=JSON)

    def holds(self, body, field) -> bool:
        "Whether a request has what this mode refuses."
        if field == "system": return any(message["role"] == "system" for message in body["messages"])
        if field.startswith("json_"): return body.get("response_format", {}).get("type") == field
        return field in body

    async def become(self, request):
        self.mode, self.tries = request.query["mode"], 0
        return web.json_response({})

    async def tell(self, request): return web.json_response({"tries": self.tries} | self.last)


class Served:
    "The endpoint as a process of its own; `with` gives its address."

    def __init__(self, mode="ok", *certificate): self.command = [sys.executable, __file__, mode, *map(str, certificate)]

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        scheme = "https" if len(self.command) > 3 else "http"
        self.host = f"{scheme}://127.0.0.1:{int(self.process.stdout.readline())}"
        self.url = f"{self.host}/v1"
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def becomes(self, mode):
        "Another mode, and the count of tries begins anew."
        urllib.request.urlopen(f"{self.url}/become?mode={urllib.request.quote(mode)}").read()

    def told(self) -> dict:
        "Tries since then; fields, path and length of the last one."
        with urllib.request.urlopen(f"{self.url}/told") as reply: return json.load(reply)


async def main(mode, *certificate):
    odd, app = Odd(mode), web.Application()
    app.add_routes([web.post("/v1/chat/completions", odd.chat), web.get("/v1/told", odd.tell),
                    web.get("/v1/become", odd.become),
                    web.post("/openai/deployments/m/chat/completions", odd.chat)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) if certificate else None
    if context: context.load_cert_chain(*certificate)
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024, ssl_context=context).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__": asyncio.run(main(*sys.argv[1:]))
