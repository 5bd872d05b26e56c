"""Policy x budget x task, with the question known and unknown, by one command.

python -m benchmarks.quality.table MODEL_FOLDER|embedded [--tokens 2000,4000] [--documents N] [--policies NAME ...]
    [--budgets 1/2,1/4,1/8,1/16] [--output FILE.json] [--markdown FILE.md] [--plot FILE.png] [any `serve` flag of vLLM]

Tasks: `passkey`, `multi-key` (several keys, one asked for) and `continuation` (real text, teacher-forced). A key's
score is the share found, a continuation's the dense perplexity over its own. A run that was broken off goes on where
it was when it is started again with the same arguments (from FILE.json.part). Runs on what `longreach serve` runs on.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from benchmarks.quality.arithmetic import budget_words
from benchmarks.quality.expect import parse_policy
from kvcache.registry import NONE, PolicyError, policies

if TYPE_CHECKING:
    from benchmarks.quality.measure import Cell, Row
    from server.inprocess import InProcessEngine

EMBEDDED = "embedded"
NOTHING: Mapping[str, str] = MappingProxyType({})
QUICK = {"tokens": "1000", "documents": 2, "budgets": "1/4", "policies": ["snapkv", "keydiff", "streamingllm"]}
"""For two cores: about a minute and a half."""
CACHE = {"cpu": "1G", "cuda": "8G"}
"""KV cache for the embedded model: on a GPU, room for many requests at once."""
BATCH = {
    "cpu": ["--max-num-seqs", "16"],
    "cuda": ["--max-num-seqs", "256", "--max-num-batched-tokens", "8192", "--cudagraph-capture-sizes",
             "1", "2", "4", "8", "16", "32", "64", "96", "128", "192", "256"],
}  # fmt: skip
"""On a GPU all requests of a document decode together. vLLM's own default for an engine in a process, 2,048 tokens a
step, is half a prompt of a policy that can't use the prefix cache. Capturing fewer sizes shortens the start."""


def arguments() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.table", description=__doc__, formatter_class=raw
    )
    add = parser.add_argument
    add("model", help="folder of a model with a chat template, or `embedded`")
    add("--tokens", default="4000", help="prompt lengths, chat template included")
    add("--documents", type=int, default=8, help="of each length")
    add("--policies", nargs="+", metavar="NAME[,ARG=VALUE...]", help="default: every policy that needs no argument")
    add("--budgets", default="1/2,1/4,1/8,1/16", help="shares of the prompt, or tokens")
    add("--keys", type=int, help="in a multi-key document; default 4, and 2 for `embedded`, which mixes up more")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help=f"defaults for a CPU: {QUICK}")
    add("--output", type=Path, help="JSON of every cell")
    add("--markdown", type=Path, help="the table that is printed")
    add("--plot", type=Path, help="PNG: score by share kept")
    return parser


def make_cells(
    labels: Sequence[str] | None, budgets: Sequence[str], page_size: int, missing: Mapping[str, str] = NOTHING
) -> list[Cell]:
    """Every policy at every budget, checked as a server checks a request.

    Without labels, all policies; those that can't run here, or need further arguments, are left out, and said so.

    Args:
        missing: evidence that can't be gathered, and why.

    Raises:
        ValueError: a policy named by the user, or a budget, is wrong.
    """
    from benchmarks.quality.measure import Cell
    from server.policies import PolicyDesk

    desk = PolicyDesk({"policy": NONE}, page_size)
    desk.lacks(missing)
    cells: list[Cell] = []
    for label in labels or policies():
        policy = parse_policy(label)
        if policy.budget is not None or policy.name == NONE:
            raise ValueError(f"policy {label!r}: budgets are given by --budgets, and `none` is always measured")
        own = []
        try:
            for budget in budgets:
                words = {"policy": policy.name, "budget": budget_words(budget), **policy.args}
                desk.check({**words, "suffix": 0})
                own.append(Cell(label, str(words["budget"]), words))
            cells += own
        except PolicyError as error:
            if labels:
                raise
            print(f"left out: {label}: {error}", file=sys.stderr)
    return cells


class Progress:
    """Rows of finished documents, kept in a file so that a run may be broken off. Without a path, in memory alone."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the file is of a run with other settings.
        """
        from benchmarks.quality.measure import Row

        self.path, self.rows = path, list[Row]()
        if path is None:
            return
        if not path.exists():
            path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
            return
        first, *lines = path.read_text(encoding="utf-8").splitlines()
        if json.loads(first) != settings:
            raise ValueError(f"{path} is of a run with other arguments: finish that run, or remove the file")
        self.rows = [Row(**row) for line in lines for row in json.loads(line)]

    def has(self, tokens: int, document: int) -> bool:
        return any((row.tokens, row.document) == (tokens, document) for row in self.rows)

    def add(self, rows: Sequence[Row]) -> None:
        """One document's rows: one line, so that a document is there whole or not at all."""
        self.rows += rows
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([asdict(row) for row in rows]) + "\n")

    def finish(self) -> None:
        if self.path:
            self.path.unlink()


def run(engine: InProcessEngine, cells: Sequence[Cell], args: argparse.Namespace, progress: Progress) -> None:
    """Document by document, so that each prompt is computed once and found in the prefix cache afterwards."""
    from benchmarks.quality.measure import Meter, make_cases
    from server.platforms import detect

    meter = Meter(engine, cells)
    places = [(int(tokens), document) for tokens in args.tokens.split(",") for document in range(args.documents)]
    left = [place for place in places if not progress.has(*place)]
    each = 3 + 5 * len(cells)  # three tasks, two of them in two settings; the dense run serves both
    with tqdm(total=len(places) * each, initial=(len(places) - len(left)) * each, unit="request") as bar:
        for tokens, document in left:
            cases = make_cases(engine.tokenizer, tokens, document, args.documents, args.seed, args.keys)
            rows: list[Row] = []
            # A GPU has room for all at once; a small cache would lose one task's prompts to those of the others.
            for together in [list(cases)] if detect().name == "cuda" else ([case] for case in cases):
                names = ", ".join(case.task for case in together)
                bar.set_description(f"{tokens} tokens, document {document + 1}, {names}")
                rows += meter.measure(together, tokens, document, bar.update)
            progress.add(rows)


def start(model: str, flags: Sequence[str]) -> InProcessEngine:
    """The engine; `flags` are of `longreach serve` and stand behind ours."""
    from benchmarks.quality.measure import OTHER_TOP
    from server.inprocess import build_engine
    from server.platforms import detect

    platform = detect().name
    ours = ["--max-logprobs", str(OTHER_TOP), *BATCH.get(platform, BATCH["cpu"])]
    if model == EMBEDDED:
        return build_engine([*ours, "--kv-cache-memory-bytes", CACHE.get(platform, CACHE["cpu"]), *flags])
    return build_engine([model, *ours, *flags])


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = arguments()
    if "--quick" in argv:
        parser.set_defaults(**QUICK)
    args, flags = parser.parse_known_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from benchmarks.quality import measure
    from benchmarks.quality.run import commit
    from benchmarks.quality.summary import as_json, doubts, markdown, plot, summarise
    from server.embedded import EMBEDDED_MODEL_NAME, EmbeddedModelError
    from server.errors import StartError, one_line

    args.keys = args.keys or (2 if args.model == EMBEDDED else 4)
    model = EMBEDDED if args.model == EMBEDDED else Path(args.model).name
    source = commit()  # now: the checkout may change while this runs
    settings: dict[str, Any] = {
        "tokens": args.tokens, "documents": args.documents, "budgets": args.budgets, "seed": args.seed, "flags": flags,
        "policies": args.policies or list(policies()), "answer_tokens": measure.ANSWER_TOKENS, "keys": args.keys,
        "continuation": measure.CONTINUATION, "top": [measure.TOP, measure.OTHER_TOP],
    }  # fmt: skip
    try:
        longest = max(int(tokens) for tokens in args.tokens.split(","))
        part = args.output.with_name(args.output.name + ".part") if args.output else None
        progress = Progress(part, {"model": model, **settings})
        engine = start(args.model, flags)
        if longest + measure.ANSWER_TOKENS > engine.max_model_len:
            raise ValueError(f"{longest} tokens and an answer don't fit the model's {engine.max_model_len}")
        cells = make_cells(args.policies, args.budgets.split(","), engine.page_size, engine.missing)
        run(engine, cells, args, progress)
    except (ValueError, StartError, EmbeddedModelError) as error:
        print(f"{parser.prog}: {one_line(error)}", file=sys.stderr)
        return 2
    found = summarise(progress.rows)
    text = markdown(found)
    print(text)
    for line in doubts(found):
        print(line, file=sys.stderr)
    if args.output:
        places = {args.model: model} | {str(p): p.name for p in (args.output, args.markdown, args.plot) if p}
        words = [places.get(word, word) for word in argv]  # this machine's folders are nobody's business
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "model": model, "device": engine.device,
            "commit": source, "command": shlex.join(["python", "-m", "benchmarks.quality.table", *words]),
            "versions": {"python": sys.version.split()[0], "vllm": engine.version, "torch": version("torch")},
            "settings": settings, "cells": as_json(found),
        }  # fmt: skip
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    if args.plot:
        name = EMBEDDED_MODEL_NAME if model == EMBEDDED else model
        plot(args.plot, found, f"{name}, prompts of {args.tokens} tokens, {args.documents} documents each")
    progress.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
