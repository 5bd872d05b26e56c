"""`longreach doctor`."""

from __future__ import annotations

import argparse
import os

from server.commands.ending import reader_may_leave, start_errors
from server.commands.parsers import command_parser


def parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "doctor",
        "Say what this machine can run. With a model or a flag of `longreach serve`: what that model can use here and "
        "why not the rest, from its configuration alone; no weights are read.",
        "longreach doctor",
        "longreach doctor ./models/llama --tensor-parallel-size 2",
        usage="longreach doctor [MODEL] [any flag of longreach serve]",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder with a config.json, or a repository")
    return parser


def run(argv: list[str]) -> None:
    """Without a model, look at this machine; with one, at what it can use here."""
    if argv in (["-h"], ["--help"]):
        parser().parse_args(argv)
    from server.doctor import examine, examine_model

    if argv:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        with start_errors():
            from kvcache.vllm_adapter.compat import check
            from server.early import check_early

            check_early(argv, "doctor")
            check()
            findings = examine_model(argv)
    else:
        findings = examine()
    with reader_may_leave():
        for finding in findings:
            print(f"{'ok ' if finding.ok else 'NO '} {finding.text}")
    if any(finding.needed and not finding.ok for finding in findings):
        raise SystemExit(1)
