"""Passkey retrieval over HTTP: `python -m benchmarks.quality.run --base-url http://127.0.0.1:8000/v1 ...`.

Every policy is asked for the same documents. Policies are the outer loop, so that the first one (`none`) fills the
server's prefix cache and every later policy prefills only the last few tokens. Exit status: 0 all well, 1 a request
failed or an expectation did not hold, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import openai
from tqdm import tqdm

from benchmarks.evaluation.tokens import local_tokenizer
from benchmarks.quality import passkeys
from benchmarks.quality.expect import UNCOMPRESSED, Policy, failures, parse_expectation, parse_policy
from benchmarks.quality.passkeys import Passkey, Tokenizer, make_suite, needle_span
from benchmarks.quality.report import Row, heat_map, summarise, table

LEAST_TIMEOUT = 60.0


@dataclass(frozen=True)
class Server:
    """The endpoint and the model that is asked."""

    client: openai.OpenAI
    model: str
    card: dict[str, Any]
    max_tokens: int
    slack: int


def connect(base_url: str, api_key: str, timeout: float, model: str | None) -> tuple[openai.OpenAI, dict[str, Any]]:
    """A client whose timeout is ours and which never repeats a request, and the model's card from /v1/models."""
    client = openai.OpenAI(base_url=base_url, api_key=api_key, timeout=timeout, max_retries=0)
    assert client.timeout == timeout >= LEAST_TIMEOUT, f"the client's timeout is {client.timeout}"
    cards = [card.model_dump() for card in client.models.list().data]
    for card in cards:
        if model is None or card["id"] == model:
            return client, card
    raise LookupError(f"model {model!r} is not among {[card['id'] for card in cards]}")


def load_tokenizer(path: str | None, card: dict[str, Any]) -> Tokenizer:
    """The tokenizer at `path`, or the served model's own if its id or root is a local folder."""
    if tokenizer := local_tokenizer(path, card):
        return tokenizer
    raise LookupError(f"{card['id']} is not a local folder: pass --tokenizer")


def problem(policy: Policy, case: Passkey, usage: dict[str, Any], slack: int) -> str | None:
    """Why an answer does not count: a truncated prompt, or a policy that did not run."""
    prompt = usage.get("prompt_tokens")
    if prompt is None or abs(prompt - case.tokens) > slack:
        return f"usage.prompt_tokens is {prompt}, not {case.tokens}: the prompt was truncated or rendered differently"
    cache = usage.get("kv_cache")
    if cache is None:
        return None if policy.name in UNCOMPRESSED else "no usage.kv_cache in the reply: the server ignored the policy"
    if policy.name != "plain" and cache.get("policy") != policy.name:
        return f"usage.kv_cache.policy is {cache.get('policy')!r}, not {policy.name!r}"
    return None


def ask(server: Server, policy: Policy, index: int, case: Passkey) -> Row:
    """One request. A reply that does not count as an answer is a row with an error, and never a found key."""
    common: dict[str, Any] = {
        "policy": policy.label,
        "document": index,
        "depth": case.depth,
        "seed": case.seed,
        "key": case.answer,
        "meant_tokens": case.tokens,
    }
    started = time.perf_counter()
    try:
        reply = server.client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": case.content}],
            temperature=0.0,
            max_tokens=server.max_tokens,
            extra_body=policy.body,
        )
    except openai.OpenAIError as failure:
        seconds = time.perf_counter() - started
        return Row(**common, found=False, text="", seconds=seconds, error=f"{type(failure).__name__}: {failure}")
    seconds = time.perf_counter() - started
    choice = reply.choices[0]
    text = choice.message.content or ""
    usage = reply.usage.model_dump() if reply.usage else {}
    error = problem(policy, case, usage, server.slack)
    return Row(
        **common,
        found=error is None and case.found_in(text),
        text=text,
        seconds=seconds,
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        finish_reason=choice.finish_reason,
        kv_cache=usage.get("kv_cache"),
        error=error,
    )


def run(server: Server, policies: Sequence[Policy], suite: Sequence[Passkey], concurrency: int) -> list[Row]:
    """All requests, in the order policy, document."""
    rows: list[Row] = []
    with (
        tqdm(total=len(policies) * len(suite), unit="request") as bar,
        ThreadPoolExecutor(max_workers=concurrency) as pool,
    ):
        for policy in policies:
            bar.set_description(policy.label)
            jobs = [pool.submit(ask, server, policy, index, case) for index, case in enumerate(suite)]
            for _ in as_completed(jobs):
                bar.update()
            rows += [job.result() for job in jobs]
    return rows


def versions(base_url: str) -> dict[str, str | None]:
    """What ran here, and what the server says it is (vLLM answers /version beside /v1)."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("openai", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    try:
        with urllib.request.urlopen(base_url.rstrip("/").removesuffix("/v1") + "/version", timeout=10) as reply:
            found["server"] = str(json.load(reply)["version"])
    except (OSError, ValueError, KeyError, TypeError):
        found["server"] = None
    return found


def commit() -> str | None:
    """The commit this benchmark runs from, marked when tracked files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.run", description="Passkey retrieval over HTTP")
    add = parser.add_argument
    add("--base-url", required=True, help="for example http://127.0.0.1:8000/v1")
    add("--api-key", default="none")
    add("--model", help="default: the first of /v1/models")
    add("--tokenizer", help="folder or hub name; default: the served model's id or root, if that is a local folder")
    add("--tokens", type=int, default=6000, help="prompt length, chat template included")
    add("--documents", type=int, default=32)
    add("--depths", type=int, default=16, help="how many different depths the documents walk through")
    add("--seed", type=int, default=0)
    add("--policies", nargs="+", default=["none"], metavar="NAME[:BUDGET][,ARG=VALUE...]")
    add("--expect", nargs="+", default=[], metavar="EXPECTATION", help="none>=31, random:512<snapkv:512, name==window")
    add("--page-size", type=int, default=32, help="tokens a page; only '==window' uses it")
    add("--concurrency", type=int, default=1)
    add("--max-tokens", type=int, default=24)
    add("--timeout", type=float, default=1800.0, help="seconds a request may take")
    add("--token-slack", type=int, default=0, help="how far usage.prompt_tokens may be from what was meant")
    add("--out", type=Path, required=True, help="folder for results.json and heatmap.png")
    return parser


def redacted(argv: Sequence[str]) -> str:
    """The command line without the API key."""
    words = ["python", "-m", "benchmarks.quality.run"]
    for i, word in enumerate(argv):
        secret = i > 0 and argv[i - 1] == "--api-key"
        words.append("***" if secret else "--api-key=***" if word.startswith("--api-key=") else word)
    return shlex.join(words)


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = arguments()
    args = parser.parse_args(argv)
    if args.timeout < LEAST_TIMEOUT:
        parser.error(f"--timeout must be at least {LEAST_TIMEOUT:.0f} s: a short one turns slow prompts into failures")
    if min(args.documents, args.depths, args.concurrency, args.page_size, args.max_tokens) < 1:
        parser.error("--documents, --depths, --concurrency, --page-size and --max-tokens must be positive")
    try:
        policies = [parse_policy(text) for text in args.policies]
        expectations = [parse_expectation(text, policies) for text in args.expect]
        if len({policy.label for policy in policies}) < len(policies):
            parser.error("--policies names a policy twice")
        client, card = connect(args.base_url, args.api_key, args.timeout, args.model)
        limit = card.get("max_model_len")
        if limit is not None and args.tokens + args.max_tokens > limit:
            parser.error(f"{args.tokens} + {args.max_tokens} tokens do not fit the model's {limit}")
        tokenizer = load_tokenizer(args.tokenizer, card)
        suite = make_suite(tokenizer, args.tokens, args.documents, args.depths, args.seed)
    except (ValueError, LookupError, openai.OpenAIError) as error:
        parser.error(f"{type(error).__name__}: {error}" if isinstance(error, openai.OpenAIError) else str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    server = Server(client, card["id"], card, args.max_tokens, args.token_slack)
    rows = run(server, policies, suite, args.concurrency)

    by_policy = {policy.label: [row for row in rows if row.policy == policy.label] for policy in policies}
    summaries = [summarise(policy, by_policy[policy.label]) for policy in policies]
    found = {label: {row.document: row.found for row in group} for label, group in by_policy.items()}
    spans = {index: needle_span(tokenizer, case) for index, case in enumerate(suite)}
    lengths = {index: case.tokens for index, case in enumerate(suite)}
    wrong = [f"{row.policy}, document {row.document}: {row.error}" for row in rows if row.error]
    wrong += failures(expectations, policies, found, spans, lengths, args.page_size)
    results = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": card["id"],
        "versions": versions(args.base_url),
        "commit": commit(),
        "command": redacted(argv),
        "wording": {"intro": passkeys.INTRO, "needle": passkeys.NEEDLE, "question": passkeys.QUESTION},
        "settings": {key: getattr(args, key) for key in ("tokens", "documents", "depths", "seed", "max_tokens")},
        "summary": [asdict(summary) for summary in summaries],
        "expectations": args.expect,
        "failures": wrong,
        "rows": [{**asdict(row), "key_span": spans[row.document]} for row in rows],
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    title = f"Passkeys found, {args.documents} documents of {args.tokens:,} tokens"
    heat_map(args.out / "heatmap.png", policies, rows, title)
    print(table(summaries))
    for line in wrong:
        print(f"FAILED {line}", file=sys.stderr)
    if expectations and not wrong:
        print(f"all {len(expectations)} expectations hold")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
