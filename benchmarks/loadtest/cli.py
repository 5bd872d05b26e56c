"""`longreach loadtest`: how many long requests a server takes, and when compression pays.

  run [--url URL | --server NAME=COMMAND ...]
                          load, measure, store, report; started again, it goes on with what is missing
  report DIR|RESULTS.json...
                          report.html, results.json and crossover.png from what is stored
  profiles                what can be asked for

Exit codes: 0 done; 1 some requests failed, there was no time for all loads, or a server didn't start; 2 wrong
arguments, or a server that refuses them; 130 interrupted.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.loadtest.profiles import listing
from benchmarks.loadtest.settings import Settings, add_arguments, planned_seconds, settings
from benchmarks.loadtest.store import Store
from server.commands.parsers import epilog

EXAMPLES = (
    "longreach loadtest run",
    "longreach loadtest run --url http://127.0.0.1:8000 --profile document,document=6000 --rates 0.5,1 --out found",
    "longreach loadtest run --server 'stock=vllm serve MODEL' --server 'ours=longreach serve MODEL' --rates 0.3,0.5",
    "longreach loadtest report found",
)


def arguments() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="longreach loadtest", description=__doc__, epilog=epilog(*EXAMPLES), formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | report | profiles")
    run_parser = commands.add_parser(
        "run", help="load, measure, store, report", formatter_class=raw, epilog=epilog(*EXAMPLES[:3]),
        description="Load servers with the same long requests at the same times and compare them.\nWithout arguments: "
        "the embedded model with and without compression, at three rates, in less than ten minutes.",
    )  # fmt: skip
    add_arguments(run_parser)
    report = commands.add_parser("report", help="from what is stored")
    report.add_argument("sources", nargs="+", type=Path, metavar="DIR|RESULTS.json",
                        help="what runs wrote; of several the report is in the first")  # fmt: skip
    report.add_argument("--baseline", metavar="SYSTEM", help="what others are compared with")
    commands.add_parser("profiles", help="what can be asked for, with arguments")
    return parser


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    from benchmarks.loadtest.report import write_report
    from benchmarks.quality.run import commit

    sett = settings(args)
    store = Store(sett.out, sett.identity())
    _tell_plan(sett)
    try:
        from benchmarks.loadtest.runner import Runner
    except ImportError as error:
        raise ValueError(
            f"vLLM's benchmark library can't be imported: {error}. Install the extra cpu or cuda"
        ) from error
    import vllm

    store.note(
        redacted(args, argv), date=datetime.now(UTC).isoformat(timespec="seconds"), commit=commit(),
        note=args.note, concurrency=sett.concurrency, vllm=vllm.__version__,
    )  # fmt: skip
    runner = Runner(sett, store)
    try:
        runner.run()
    finally:
        store.tell(not_begun=[f"{key.system}, {key.rate:g} a second, {key.profile}" for key in runner.not_begun])
    print(write_report([sett.out], sett.baseline))
    return 1 if runner.failed or runner.not_begun else 0


def _tell_plan(sett: Settings) -> None:
    systems = sum(len(sett.systems(spec, True)) for spec in sett.servers)
    planned = planned_seconds(sett, systems * len(sett.pools))
    limit = f"; --seconds {sett.seconds:g} ends it" if planned > sett.seconds else ""
    print(f"{systems} systems, {len(sett.profiles)} profiles, {len(sett.rates)} rates, {len(sett.pools)} pools: loads "
          f"of {planned:.0f} s at most, beside servers' starts{limit}", file=sys.stderr)  # fmt: skip


def redacted(args: argparse.Namespace, argv: Sequence[str]) -> str:
    """The command line without the key."""
    hidden = [word.replace(args.api_key, "...") if args.api_key != "none" else word for word in argv]
    return shlex.join(["longreach", "loadtest", *hidden])


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        if args.command == "profiles":
            print(listing())
            return 0
        if args.command == "report":
            from benchmarks.loadtest.report import write_report

            print(write_report(args.sources, args.baseline))
            return 0
        return run(args, argv)
    except RuntimeError as error:
        print(f"longreach loadtest: {error}\nLoads that ended are stored: the same command goes on.", file=sys.stderr)
        return 1
    except (ValueError, LookupError, OSError) as error:
        print(f"longreach loadtest: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nlongreach loadtest: interrupted; the same command goes on.", file=sys.stderr)
        return 130
