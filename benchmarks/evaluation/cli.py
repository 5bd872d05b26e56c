"""`longreach eval`: what compression and sparsity lose on your model, over HTTP.

  run [SWEEP.yaml] --out DIR [-- flags of `longreach serve`]
                                 ask, rate, store; started again, it goes on where it was
  report DIR...                  report.html, report.md and summary.json from what is stored
  docs SUMMARY.json...           docs/quality.md and its pictures

Exit codes: 0 done; 1 some requests failed (each is in the report) or the endpoint went away; 2 wrong arguments;
130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.evaluation.endpoint import Endpoint, Gone
from benchmarks.evaluation.haystack import Haystack
from benchmarks.evaluation.runner import Runner, check_lengths
from benchmarks.evaluation.store import OK, Conflict, Store
from benchmarks.evaluation.sweep import SUITES, Sweep, SweepError, check, load
from benchmarks.evaluation.tokens import Prompter, load_tokenizer
from benchmarks.evaluation.variants import DENSE, Variant
from server.commands.parsers import epilog

EMBEDDED = "embedded"
EXAMPLES = (
    "longreach eval run --suites ruler --lengths 4096 --policies snapkv pyramidkv --out found",
    "longreach eval run --url http://127.0.0.1:8000/v1 --suites needle --selectors quest,tokens=512 --out found",
    "longreach eval report found",
    "longreach eval docs found/summary.json",
)
METHODS = {"policies": "snapkv,window=64", "selectors": "quest,tokens=512", "patterns": "xattention,threshold=0.8"}
START_LIMIT = 900.0
"""Seconds that a server started here may take: large models, and CUDA graphs of many selectors."""


def arguments() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="longreach eval", description=__doc__, epilog=epilog(*EXAMPLES), formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | report | docs")
    run = commands.add_parser(
        "run", formatter_class=raw, help="ask, rate and store",
        description="Run suites with variants against an endpoint. Without --url a server is started and stopped "
        "again; flags behind ` -- ` go to `longreach serve`.",
        epilog=epilog(*EXAMPLES[:2]),
    )  # fmt: skip
    add = run.add_argument
    add("sweep", nargs="?", type=Path, metavar="SWEEP.yaml", help="settings (docs/evaluation.md); flags override it")
    add("--out", type=Path, required=True, metavar="DIR", help="results.jsonl, run.json, and the report")
    add("--url", help="an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1")
    add("--model", help="with --url: which of its models. Without: what to serve (left out, the embedded model)")
    add("--api-key", default="none", metavar="KEY", help="the endpoint's, if it wants one")
    add("--tokenizer", metavar="DIR", help="the model's; left out, the served model's folder or its /tokenize route")
    add("--suites", nargs="+", choices=list(SUITES), metavar="NAME", help=", ".join(SUITES))
    add("--lengths", help="tokens of prompt and answer together, of every suite: 2048,4096")
    add("--samples", type=int, help="of each task and length")
    add("--tasks", nargs="+", help="of ruler")
    add("--seeds", help="0,1,2")
    for name in ("policies", "selectors", "patterns"):
        text = f"{name} to measure beside dense, such as {METHODS[name]}; given alone: none"
        add(f"--{name}", nargs="*", metavar="NAME[,ARG=VALUE...]", help=text)
    add("--budgets", nargs="+", help="of every policy: 25%% or 512 (tokens)")
    add("--questions", nargs="+", choices=["known", "unknown"], help="whether a policy sees the question (known)")
    add("--haystack", nargs="+", type=Path, metavar="FILE", help="text to hide needles in")
    add("--concurrency", type=int, help="requests in flight (8)")
    add("--timeout", type=float, help="seconds for one request (1800)")
    add("--no-chat-template", action="store_true", help="for models without one")
    add("--again", action="store_true", help="ask those again that failed")
    add("--keep-going", action="store_true", help="leave out variants that the server refuses")
    add("--note", help="goes into the report, such as the machine's name")
    report = commands.add_parser(
        "report", formatter_class=raw, help="from what is stored",
        description="Write report.html, report.md and summary.json anew from what is stored.",
        epilog=epilog(EXAMPLES[2]),
    )  # fmt: skip
    report.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="of `longreach eval run --out`")
    docs = commands.add_parser(
        "docs", formatter_class=raw, help="write docs/quality.md from summaries",
        description="Write docs/quality.md and its pictures.", epilog=epilog(EXAMPLES[3]),
    )  # fmt: skip
    docs.add_argument("summaries", nargs="+", type=Path, metavar="SUMMARY.json", help="of `longreach eval report`")
    text = "where the page goes (default: %(default)s)"
    docs.add_argument("--output", type=Path, metavar="FILE", default=Path("docs/quality.md"), help=text)
    text = "folder of its pictures (default: %(default)s)"
    docs.add_argument("--images", type=Path, metavar="DIR", default=Path("docs/images"), help=text)
    return parser


def method(text: str, name: str) -> dict[str, Any]:
    """`quest,tokens=512` as a request has it."""
    from benchmarks.quality.expect import parse_policy

    parsed = parse_policy(text)
    return {name: parsed.name, **({} if parsed.budget is None else {"budget": parsed.budget}), **parsed.args}


def _numbers(flag: str, text: str) -> list[int]:
    """
    Raises:
        ValueError: they aren't.
    """
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {text}: must be whole numbers with commas between, such as 1024,2048") from None


def settings(args: argparse.Namespace) -> Sweep:
    """The sweep's file with the flags on top.

    Raises:
        SweepError: something in them is wrong.
    """
    content = load(args.sweep) if args.sweep else {}
    if not (args.suites or args.sweep):
        raise SweepError(f"nothing to measure: name suites (--suites {next(iter(SUITES))} ...), or a SWEEP.yaml")
    if args.suites:
        there = content.get("suites", {})
        content["suites"] = {name: there.get(name, {}) for name in args.suites}
    try:
        for suite in (content.get("suites") or {}).values():
            if args.lengths and "folder" not in suite:
                suite["lengths"] = _numbers("--lengths", args.lengths)
            if args.samples:
                suite["samples"] = args.samples
        if args.tasks:
            content["suites"]["ruler"]["tasks"] = args.tasks
        if args.seeds:
            content["seeds"] = _numbers("--seeds", args.seeds)
        for plural, name in (("policies", "policy"), ("selectors", "selector"), ("patterns", "pattern")):
            if getattr(args, plural) is not None:
                content[plural] = [method(text, name) for text in getattr(args, plural)]
    except (ValueError, KeyError, TypeError) as error:
        raise SweepError(f"arguments: {error}") from error
    for name in ("budgets", "questions", "haystack", "concurrency", "timeout"):
        if getattr(args, name) is not None:
            content[name] = getattr(args, name)
    if args.no_chat_template:
        content["chat"] = False
    return check(content, str(args.sweep or "arguments"))


@contextmanager
def endpoint_of(args: argparse.Namespace, sweep: Sweep, flags: Sequence[str]) -> Iterator[Endpoint]:
    """The endpoint that is asked; one that is started here ends with the block.

    Raises:
        LookupError: it doesn't serve the model.
        RuntimeError: the server doesn't start.
    """
    if args.url:
        yield Endpoint(args.url, args.model, args.api_key, sweep.timeout)
        return
    from benchmarks.serving import running_server

    model = [] if args.model in (None, EMBEDDED) else [args.model]
    args.out.mkdir(parents=True, exist_ok=True)
    own = [*model, *map(str, sweep.serve), *flags]
    with running_server(args.out / "server.log", *own, limit=START_LIMIT, progress=True) as server:
        yield Endpoint(server.url, timeout=sweep.timeout)


def identity(
    sweep: Sweep, endpoint: Endpoint, prompter: Prompter, haystack: Haystack, variants: Sequence[Variant]
) -> dict[str, Any]:
    """What all rows of a folder have in common."""
    own = {}
    for name, suite in sweep.suites.items():
        chosen = suite.model_dump(exclude={"lengths", "samples", "tasks"})
        # Whose folder it is on is nobody's business.
        own[f"suite {name}"] = {key: value.name if isinstance(value, Path) else value for key, value in chosen.items()}
    return {
        "model": endpoint.model, "tokenizer": prompter.fingerprint(), "haystack": haystack.digest, **own,
        "variants": {
            variant.name: {key: value for key, value in asdict(variant).items() if key != "name"}
            for variant in variants
        },
    }  # fmt: skip


def run(args: argparse.Namespace, flags: Sequence[str], argv: Sequence[str]) -> int:
    from benchmarks.evaluation.report import write_report
    from benchmarks.quality.run import commit

    sweep = settings(args)
    haystack = Haystack(sweep.haystack)
    suites = list(sweep.suites.values())
    for suite in suites:
        suite.tasks_here()  # a folder that isn't there is found out before a server is started
    source, began = commit(), time.monotonic()
    with endpoint_of(args, sweep, flags) as endpoint:
        check_lengths(suites, endpoint.max_model_len)
        tokenizer = load_tokenizer(args.tokenizer, endpoint.card, endpoint.root, args.api_key)
        prompter = Prompter(tokenizer, sweep.chat)
        variants = sweep.dense_and_others(endpoint.neutral_fields())
        store = Store(args.out, identity(sweep, endpoint, prompter, haystack, variants))
        try:
            if store.mended:
                print(f"cut off a torn line of {store.mended} bytes", file=sys.stderr)
            store.note(
                date=datetime.now(UTC).isoformat(timespec="seconds"), commit=source, server=endpoint.version,
                command=redacted(args, argv), note=args.note, max_model_len=endpoint.max_model_len,
                python=sys.version.split()[0], seeds=sweep.seeds, concurrency=sweep.concurrency,
            )  # fmt: skip
            asyncio.run(_ask(args, endpoint, Runner, prompter, haystack, store, variants, sweep))
        finally:
            spent = store.seconds + time.monotonic() - began
            store.note(seconds=round(spent))
            store.close()
    print(write_report([args.out]))
    return 0 if all(row.status == OK for row in store.rows.values()) else 1


async def _ask(
    args: argparse.Namespace, endpoint: Endpoint, runner: type[Runner], prompter: Prompter, haystack: Haystack,
    store: Store, variants: Sequence[Variant], sweep: Sweep,
) -> None:  # fmt: skip
    """
    Raises:
        SweepError: the server refuses a variant.
    """
    asker = runner(endpoint, prompter, haystack, store, variants, sweep.concurrency, args.again)
    try:
        refused = await asker.refused()
        for name, why in refused.items():
            print(f"refused: {name}: {why}", file=sys.stderr)
        if DENSE in refused or (refused and not args.keep_going):
            raise SweepError(f"the server refuses {', '.join(refused)}; --keep-going leaves them out")
        store.note(refused=refused)
        asker.variants = [variant for variant in asker.variants if variant.name not in refused]
        await asker.run(list(sweep.suites.values()), sweep.seeds)
    finally:
        await endpoint.close()


def redacted(args: argparse.Namespace, argv: Sequence[str]) -> str:
    """The command without the key and without this machine's folders."""
    paths = [args.sweep, args.out, *(args.haystack or [])]
    names = {str(path): path.name for path in paths if path} | {args.api_key: "***"}
    names |= {path: Path(path).name for path in (args.tokenizer, args.model) if path and Path(path).is_dir()}
    words = [names.get(word, word) for word in argv]
    return shlex.join(["longreach", "eval", *words])


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = arguments()
    end = argv.index("--") if "--" in argv else len(argv)
    args, flags = parser.parse_args(argv[:end]), argv[end + 1 :]
    if flags and (args.command != "run" or args.url):
        parser.error(f"flags of a server that isn't started here: {' '.join(flags)}")
    try:
        if args.command == "run":
            return run(args, flags, argv)
        if args.command == "report":
            from benchmarks.evaluation.report import write_report

            print(write_report(args.folders))
            return 0
        from benchmarks.evaluation.docs import write_docs

        print(write_docs(args.summaries, args.output, args.images))
        return 0
    except (Gone, RuntimeError) as error:
        print(f"longreach eval: {error}\nWhat was answered is stored: the same command goes on.", file=sys.stderr)
        return 1
    except (SweepError, Conflict, LookupError, ValueError, OSError) as error:
        print(f"longreach eval: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nlongreach eval: interrupted; the same command goes on.", file=sys.stderr)
        return 130
