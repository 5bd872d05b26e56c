"""`longreach calibrate`."""

from __future__ import annotations

import argparse

from server.commands.ending import fail, reader_may_leave
from server.commands.parsers import command_parser


def parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "calibrate",
        "Measure, without training, what the selectors loki, tidal and lessismore have to know of a model, "
        "and write a file for `longreach serve --decode-calibration`. (--prefill: what minference has to know.)",
        "longreach calibrate book.txt report.txt --output model.safetensors",
        "longreach calibrate book.txt --prefill --output heads.safetensors",
    )
    add = parser.add_argument
    add("prompts", nargs="+", metavar="PROMPT_FILE", help="a long text, sent as a user's message")
    add("--output", required=True, metavar="FILE", help="where to write it (.safetensors)")
    add("--model", metavar="MODEL", help="folder or repository; left out, the embedded model")
    add("--rank", type=int, default=32, metavar="N", help="directions of each KV head's keys, for loki")
    text = "layers that select for others, for tidal and lessismore"
    add("--selection-layers", type=int, default=2, metavar="N", help=text)
    text = "measure, on one text, what the prefill pattern minference has to know instead: a file for `longreach serve \
--prefill-calibration`"
    add("--prefill", action="store_true", help=text)
    text = "with --prefill: most that a head may compute of its attention"
    add("--density", type=float, default=0.1, metavar="SHARE", help=text)
    add("--progress", action="store_true", help="show how far it is")
    return parser


def run(argv: list[str]) -> None:
    own = parser()
    args = own.parse_args(argv)
    if args.prefill and len(args.prompts) > 1:
        own.error("--prefill takes one text")

    from server.calibrate import calibrate
    from server.early import check_folder
    from server.embedded import EmbeddedModelError, ensure_embedded_model
    from server.errors import StartError, one_line
    from server.head_tables import calibrate_heads, summary
    from server.watching import read_texts

    try:
        texts = read_texts(args.prompts)
        if args.model:
            check_folder(args.model)
        model = args.model or str(ensure_embedded_model())
        if args.prefill:
            told = summary(calibrate_heads(model, texts[0], args.output, args.density, bar=args.progress))
        else:
            layers = args.selection_layers
            told = calibrate(model, texts, args.output, args.rank, selection_layers=layers, bar=args.progress).summary()
    except (StartError, EmbeddedModelError) as error:
        fail(one_line(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    with reader_may_leave():
        print(told)
