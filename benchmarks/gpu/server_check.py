"""`longreach serve` on CUDA, over HTTP: passkeys with each policy, concurrently, and what usage and metrics tell.

python -m benchmarks.gpu.server_check MODEL_FOLDER [--documents 32] [--tokens 4900] [any flag of longreach serve]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu.engine import say
from benchmarks.serving import Server, running_server

POLICIES: list[dict[str, Any]] = [
    {"policy": "none"},
    {"policy": "snapkv", "budget": 512},
    {"policy": "pyramidkv", "budget": 512},
    {"policy": "streamingllm", "budget": 512},
]


def ask(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    """The answer, or the error's body."""
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        return dict(json.load(error))


def main() -> None:
    from transformers import AutoTokenizer

    from benchmarks.quality.passkeys import make_suite

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=4900)
    args, flags = parser.parse_known_args()
    suite = make_suite(AutoTokenizer.from_pretrained(args.model), args.tokens, args.documents, columns=8, seed=0)
    log = Path(tempfile.mkdtemp()) / "server.log"
    with running_server(log, args.model, "--served-model-name", "m", *flags) as server:
        for words in POLICIES:
            bodies = [
                {"model": "m", "temperature": 0, "max_tokens": 24, "kv_cache": words,
                 "messages": [{"role": "user", "content": f"{case.document}\n\n{case.question}"}]}
                for case in suite
            ]  # fmt: skip
            with ThreadPoolExecutor(args.documents) as pool:
                answers = list(pool.map(lambda body: ask(server, body), bodies))
            found = sum(
                case.answer in answer["choices"][0]["message"]["content"]
                for case, answer in zip(suite, answers, strict=True)
            )
            say(tokens=args.tokens, flags=flags, found=found, of=len(suite), usage=answers[0]["usage"]["kv_cache"])
        refused = ask(server, {"model": "m", "messages": [], "kv_cache": {"policy": "snapkv", "budget": 7}})
        say(refused=refused["error"]["message"])
        server.wait_until_empty()
        say(compactions=server.metric("longreach_kv_compactions_total"), empty_at_the_end=True)


if __name__ == "__main__":
    main()
