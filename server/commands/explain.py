"""`longreach explain`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from server.commands.ending import reader_may_leave, start_errors
from server.commands.parsers import command_parser


def parser() -> argparse.ArgumentParser:
    """Our own; all other flags are those of `longreach serve`."""
    parser = command_parser(
        "explain",
        "Show which tokens of a prompt a KV-cache policy keeps. Without --kv-policy: snapkv at 25%. Without --model: "
        "the embedded one.",
        "longreach explain book.txt --kv-policy pyramidkv --kv-budget 512",
        "longreach explain - --output page.html < book.txt",
        usage="longreach explain PROMPT_FILE|- [--output FILE.png|FILE.html] [--plain] [--model MODEL] [--kv-...] "
        "[any flag of longreach serve]",
        allow_abbrev=False,
    )
    parser.add_argument("prompt", metavar="PROMPT_FILE|-", help="a text file; - is standard input")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a picture (.png), or a page with the text (.html)")
    parser.add_argument("--plain", action="store_true", help="the text as it is, not as a user's message in a chat")
    return parser


def split(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our arguments, and what is left for vLLM's parser. The prompt comes first: a flag's value could be taken for it.

    Raises:
        SystemExit: by argparse, after --help or a mistake.
        StartError: an output that is neither .png nor .html.
    """
    from server.errors import StartError

    own = parser()
    if argv and argv[0].startswith("-") and argv[0] not in ("-", "-h", "--help"):
        own.error("the first argument is the prompt's file, or - for standard input")
    args, flags = own.parse_known_args(argv)
    if args.output and args.output.suffix not in (".png", ".html"):
        raise StartError(f"--output {args.output}: the name must end in .png or .html")
    if args.output and not args.output.parent.is_dir():
        raise StartError(f"--output {args.output}: there is no folder {args.output.parent}")
    return args, flags


def run(argv: list[str]) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # the answer is what is printed, not how vLLM starts
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    if argv[:1] in (["-h"], ["--help"]):
        parser().parse_args(argv)
    with start_errors():
        args, flags = split(argv)
        from server.early import check_early
        from server.explain import explain

        check_early(flags, "explain")

        text = explain(args, flags)
    with reader_may_leave():
        print(text)
