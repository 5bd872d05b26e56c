"""Pass keys in long texts for a base model, such as the embedded gemma3-270m: it goes on where the text stops.

python -m benchmarks.quality.base_needles [--model gemma3-270m] [--lengths 8000,16000,30000] [--documents 16]
    [--policies snapkv pyramidkv ...] [--selectors quest recycled ...] [--share 0.125] [-- FLAGS OF LONGREACH SERVE]

Policies keep `--share` of the prompt, selectors read as much of it at each step (at most 4096 tokens). All is asked in
one engine inside this process, on whatever vLLM runs on; one JSON line for each length and way.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from typing import Any

from vllm import SamplingParams

from benchmarks.quality.passkeys import Passkey, make_suite
from server.inprocess import InProcessEngine, Job, build_engine

DENSE = "dense"
ANSWER_TOKENS = 12
MOST_READ = 4096


class Continued:
    """A tokenizer whose prompts are texts that stop before their last word."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str, **kwargs: Any) -> Any:
        return self.tokenizer(text, **kwargs)

    def decode(self, ids: Any, **kwargs: Any) -> Any:
        return self.tokenizer.decode(ids, **kwargs)

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> str:
        return str(conversation[0]["content"])


def prompt_of(case: Passkey) -> str:
    """The document, and the beginning of a sentence that its key ends."""
    named = re.search(r"for (\w+) is", case.needle)
    assert named is not None
    return f"{case.document}\n\nThe pass key for {named[1]} is"


def ask(engine: InProcessEngine, cases: list[Passkey], policy: dict[str, Any], selector: dict[str, Any] | None) -> Any:
    """Answers' texts, and the first usage."""
    jobs = [
        Job(
            engine.tokenizer(prompt_of(case))["input_ids"],
            SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0, ignore_eos=True),
            policy,
            selector,
        )
        for case in cases
    ]
    engine.run(jobs)
    return [engine.tokenizer.decode(job.tokens) for job in jobs], jobs[0].usage


def measure(engine: InProcessEngine, args: argparse.Namespace, length: int) -> None:
    """Every way at one length; dense first, which fills the prefix cache."""
    cases = make_suite(Continued(engine.tokenizer), length, args.documents, columns=8, seed=0)
    kept = int(args.share * length)
    ways: list[tuple[str, dict[str, Any], dict[str, Any] | None]] = [(DENSE, {"policy": "none"}, None)]
    ways += [(name, {"policy": name, "budget": kept}, None) for name in args.policies]
    for name in args.selectors:
        ways.append((name, {"policy": "none"}, {"selector": name, "tokens": min(kept, MOST_READ)}))
    for name, policy, selector in ways:
        began = time.perf_counter()
        texts, usage = ask(engine, cases, policy, selector)
        hits = [case.found_in(text) for case, text in zip(cases, texts, strict=True)]
        row = {"way": name, "tokens": length, "documents": len(cases), "found": sum(hits), "hits": hits,
               "kept": usage["kept_tokens"]["mean"], "seconds": round(time.perf_counter() - began, 1)}  # fmt: skip
        print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], default=[8000])
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--policies", nargs="*", default=["snapkv", "pyramidkv"])
    parser.add_argument("--selectors", nargs="*", default=[])
    parser.add_argument("--share", type=float, default=0.125)
    parser.add_argument("flags", nargs="*", help="of longreach serve, behind --")
    args = parser.parse_args()
    flags = [args.model, *args.flags]
    if args.selectors:
        flags += ["--decode-selectors", *args.selectors]
    engine = build_engine(flags)
    print(json.dumps({"model": args.model, "device": engine.device, "vllm": engine.version}), flush=True)
    for length in args.lengths:
        measure(engine, args, length)


if __name__ == "__main__":
    main()
