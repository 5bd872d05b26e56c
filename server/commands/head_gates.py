"""`longreach head-gates`."""

from __future__ import annotations

import argparse
from pathlib import Path

from server.commands.ending import fail
from server.commands.parsers import command_parser


def parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "head-gates",
        "Measure, without training, which KV heads of a model look beyond the first and the last tokens, "
        "and write a table for `longreach serve --kv-head-gates`.",
        "longreach head-gates book.txt report.txt --output gates.tsv",
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT_FILE", help="a long text, sent as a user's message")
    parser.add_argument("--output", required=True, metavar="FILE", help="table of numbers, a row a layer (TSV)")
    parser.add_argument("--model", metavar="MODEL", help="folder or repository; left out, the embedded model")
    parser.add_argument("--sinks", type=int, default=64, metavar="N", help="first tokens that count as near")
    parser.add_argument("--recent", type=int, default=256, metavar="N", help="last tokens that count as near")
    parser.add_argument("--window", type=int, default=32, metavar="N", help="last queries that are looked at")
    parser.add_argument("--progress", action="store_true", help="show how far it is")
    return parser


def run(argv: list[str]) -> None:
    own = parser()
    args = own.parse_args(argv)
    if args.sinks < 0 or args.recent < 0 or args.window < 1:
        own.error("--sinks and --recent can't be negative, --window is at least 1")

    if not Path(args.output).parent.is_dir():
        fail(f"--output {args.output}: there is no folder {Path(args.output).parent}")

    from server.early import check_folder
    from server.embedded import EmbeddedModelError, ensure_embedded_model
    from server.errors import StartError, one_line
    from server.gates import write_gates
    from server.head_gates import Reach, gates_of_texts
    from server.watching import read_texts

    try:
        texts = read_texts(args.prompts)
        if args.model:
            check_folder(args.model)
        model = args.model or str(ensure_embedded_model())
        reach = Reach(args.sinks, args.recent, args.window)
        write_gates(args.output, gates_of_texts(model, texts, reach, bar=args.progress))
    except (StartError, EmbeddedModelError, OSError) as error:
        fail(one_line(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
