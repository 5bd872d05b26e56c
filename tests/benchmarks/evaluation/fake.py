"""A small OpenAI endpoint in this process that answers needle prompts, or misbehaves, by the request's fields."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from benchmarks.quality.passkeys import Tokenizer


@dataclass
class Fake:
    """What it was asked is in `bodies`. Policies: `keeps` finds needles, `forgets` none; others misbehave.

    Attributes:
        well: `broken` is mended.
    """

    tokenizer: Tokenizer
    root: str = "/nowhere"
    longreach: bool = True
    max_model_len: int = 4096
    well: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def get(self, path: str) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "tiny", "root": self.root, "max_model_len": self.max_model_len}]}
        if path == "/version":
            return 200, {"version": "fake-1"}
        if path in ("/v1/kv/policies", "/v1/decode/selectors") and self.longreach:
            return 200, {"there": "is one"}
        return 404, {"error": {"message": "no such route"}}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/tokenize":
            if "messages" in body:
                text = self.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
                return 200, {"tokens": self.tokenizer(text, add_special_tokens=False)["input_ids"]}
            special = body["add_special_tokens"]
            return 200, {"tokens": self.tokenizer(body["prompt"], add_special_tokens=special)["input_ids"]}
        if path == "/detokenize":
            return 200, {"prompt": self.tokenizer.decode(body["tokens"])}
        assert path == "/v1/completions"
        self.bodies.append(body)
        return self.complete(body)

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        ids, cache = body["prompt"], body.get("kv_cache", {})
        policy = cache.get("policy", "none")
        if policy == "unknown":
            return 400, {"error": {"message": "no such policy", "type": "BadRequestError", "code": 400}}
        if policy == "broken" and len(ids) > 2000 and not self.well:
            return 500, {"error": {"message": "out of memory"}}
        if policy == "slow" and len(ids) > 2000:
            time.sleep(1.2)
        seen = len(ids) - 100 if policy == "cuts" and len(ids) > 2000 else len(ids)
        usage: dict[str, Any] = {"prompt_tokens": seen, "completion_tokens": 5}
        if self.longreach and policy != "ignored":
            kept = len(ids) // 2 if policy not in ("none", "forgets") else len(ids)
            usage["kv_cache"] = {"policy": policy, "kept_tokens": {"mean": kept}, "bytes_held": 1024 * kept}
            usage["decode_attention"] = body.get("decode_attention", {"selector": "dense"})
        text = self.answer(ids) if policy != "forgets" else "I forgot."
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": self.logprobs(body)}
        return 200, {"choices": [choice], "usage": usage}

    def answer(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids)
        asked = re.search(r"secret number of ([a-z]+-[a-z]+)\?", text)
        found = re.search(rf"A secret number of {asked[1]} is: (\d+)", text) if asked else None
        return f" {found[1]}." if found else " Nothing."

    def logprobs(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """Of prompts: -1 for every token, -2 under `forgets`. Of answers: five tokens, the third another under it."""
        if body.get("logprobs") is None:
            return None
        forgets = body.get("kv_cache", {}).get("policy") == "forgets"
        if body.get("echo"):
            return {"token_logprobs": [None, *[-2.0 if forgets else -1.0] * len(body["prompt"])]}
        tokens = ["a", "b", "x" if forgets else "c", "d", "e"]
        top = [{token: -0.1, "other": -3.0 if not forgets else -2.5} for token in tokens]
        return {"tokens": tokens, "top_logprobs": top, "token_logprobs": [-0.1] * 5}


@contextmanager
def serving(fake: Fake) -> Iterator[Fake]:
    """The fake on a free port of loopback."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status: int, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.reply(*fake.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, content = fake.post(self.path, body)
            if body.get("stream") and status == 200:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                usage = {"choices": [], "usage": content["usage"]}
                for chunk in (content, usage):
                    self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                self.wfile.write(b"data: [DONE]\n\n")
            else:
                self.reply(status, content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        fake.url = f"http://127.0.0.1:{httpd.server_port}/v1"
        try:
            yield fake
        finally:
            httpd.shutdown()
