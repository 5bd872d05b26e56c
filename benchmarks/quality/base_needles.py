"""Pass keys in long texts for a base model, such as the embedded gemma3-270m: it goes on where the text stops.

python -m benchmarks.quality.base_needles [--model gemma3-270m] [--lengths 8000,16000,30000] [--documents 16]
    [--policies snapkv pyramidkv ...|all] [--selectors quest recycled ...|all] [--patterns "xattention 0.9" ...|all]
    [--share 0.125] [--most-read 4096] [-- FLAGS OF LONGREACH SERVE]

Policies keep `--share` of the prompt, selectors read as much of it at each step (at most `--most-read` tokens),
patterns are those of `benchmarks.quality.patterns`. All is asked in one engine inside this process, on whatever vLLM
runs on; one JSON line for each length and way.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams

from attention_plugins.decode.registry import selectors
from benchmarks.quality.passkeys import Passkey, make_suite
from benchmarks.quality.patterns import PATTERNS, words_of
from kvcache.registry import policies
from server.inprocess import InProcessEngine, Job, build_engine

DENSE = "dense"
NEED_FILES = "namm", "duoattention", "loki"
ANSWER_TOKENS = 12
ALL = "all"


@dataclass(frozen=True)
class Way:
    """One way to answer: the words of a request."""

    name: str
    policy: dict[str, Any]
    selector: dict[str, Any] | None = None
    pattern: dict[str, Any] | None = None


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


def ask(engine: InProcessEngine, cases: list[Passkey], way: Way) -> tuple[list[str], Job]:
    """Answers' texts, and the first job."""
    jobs = [
        Job(
            engine.tokenizer(prompt_of(case))["input_ids"],
            SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0, ignore_eos=True),
            way.policy,
            way.selector,
            way.pattern,
        )
        for case in cases
    ]
    engine.run(jobs)
    return [engine.tokenizer.decode(job.tokens) for job in jobs], jobs[0]


def ways_of(args: argparse.Namespace, length: int) -> list[Way]:
    """Dense first, which fills the prefix cache."""
    kept = int(args.share * length)
    none = {"policy": "none"}
    ways = [Way(DENSE, none)]
    ways += [Way(name, {"policy": name, "budget": kept}) for name in args.policies]
    read = {"tokens": min(kept, args.most_read), "min_context": 0}
    ways += [Way(name, none, selector={"selector": name, **read}) for name in args.selectors]
    return ways + [Way(label, none, pattern=words_of(label)) for label in args.patterns]


def measure(engine: InProcessEngine, args: argparse.Namespace, length: int) -> None:
    """Every way at one length."""
    cases = make_suite(Continued(engine.tokenizer), length, args.documents, columns=8, seed=0)
    for way in ways_of(args, length):
        began = time.perf_counter()
        texts, job = ask(engine, cases, way)
        hits = [case.found_in(text) for case, text in zip(cases, texts, strict=True)]
        row = {"way": way.name, "tokens": length, "documents": len(cases), "found": sum(hits), "hits": hits,
               "kept": job.usage["kept_tokens"]["mean"], "read": (way.selector or {}).get("tokens"),
               "density": job.prefill_usage.get("density", {}).get("mean"),
               "seconds": round(time.perf_counter() - began, 1)}  # fmt: skip
        print(json.dumps(row), flush=True)


def names(chosen: list[str], known: Iterable[str], parser: argparse.ArgumentParser) -> list[str]:
    """`all` is all that can do without a file made for the model."""
    known = [name for name in known if name not in NEED_FILES]
    if unknown := {*chosen} - {*known, ALL}:
        parser.error(f"{', '.join(sorted(unknown))}: there are {ALL}, {', '.join(known)}")
    return known if ALL in chosen else chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], default=[8000])
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--policies", nargs="*", default=["snapkv", "pyramidkv"])
    parser.add_argument("--selectors", nargs="*", default=[])
    parser.add_argument("--patterns", nargs="*", default=[])
    parser.add_argument("--share", type=float, default=0.125)
    parser.add_argument("--most-read", type=int, default=4096)
    parser.add_argument("flags", nargs="*", help="of longreach serve, behind --")
    args = parser.parse_args()
    args.policies = names(args.policies, policies(), parser)
    args.selectors = names(args.selectors, selectors(), parser)
    args.patterns = names(args.patterns, PATTERNS, parser)
    flags = [args.model, *args.flags]
    if args.selectors:
        flags += ["--decode-selectors", *args.selectors]
    engine = build_engine(flags)
    print(json.dumps({"model": args.model, "device": engine.device, "vllm": engine.version}), flush=True)
    for length in args.lengths:
        measure(engine, args, length)


if __name__ == "__main__":
    main()
