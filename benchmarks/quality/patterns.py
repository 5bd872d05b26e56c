"""What sparse prefill loses beside dense attention, by pattern.

python -m benchmarks.quality.patterns MODEL_FOLDER|embedded --output FILE.json [--sections needles kl]
    [--tasks passkey multi-key] [--only LABEL ...] [--calibration FILE] [any `serve` flag of vLLM]

The sections are those of `benchmarks.quality.selectors`: keys that are found among those that dense attention finds
(and, `found_all`, with those that it doesn't), and the divergence of the next token's distribution. Rows say what share
of the prompts' attention was computed. Arguments are scaled to prompts of some 7,000 tokens: published ones are for
128k.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.selector_cases import ANSWER_TOKENS
from benchmarks.quality.selectors import BATCH, CACHE, KL, NEEDLES, Results
from benchmarks.quality.table import EMBEDDED

STREAMING: dict[str, Any] = {"pattern": "streaming", "sinks": 128, "window": 512, "min_context": 0}
PUBLISHED: dict[str, Any] = {"pattern": "streaming", "min_context": 0}
"""Sinks and window that Delta Attention was published with, for prompts of any length."""
TAIL = {"dense_last": 128}
"""A question with the chat template's end has some 30 tokens."""
PATTERNS: dict[str, dict[str, Any]] = {
    "flexprefill 0.99": {"pattern": "flexprefill", "gamma": 0.99, "min_budget": 512},
    "flexprefill 0.98": {"pattern": "flexprefill", "gamma": 0.98, "min_budget": 512},
    "flexprefill 0.95": {"pattern": "flexprefill", "gamma": 0.95, "min_budget": 256},
    "flexprefill 0.9": {"pattern": "flexprefill", "gamma": 0.9, "min_budget": 256},
    "flexprefill 0.8": {"pattern": "flexprefill", "gamma": 0.8, "min_budget": 128},
    "xattention 0.99": {"pattern": "xattention", "threshold": 0.99},
    "xattention 0.98": {"pattern": "xattention", "threshold": 0.98},
    "xattention 0.95": {"pattern": "xattention", "threshold": 0.95},
    "xattention 0.9": {"pattern": "xattention", "threshold": 0.9},
    "xattention 0.9, stride 16": {"pattern": "xattention", "threshold": 0.9, "stride": 16},
    "xattention 0.8": {"pattern": "xattention", "threshold": 0.8},
    "minference": {"pattern": "minference", "vertical": 256, "slash": 512},
    "anchor 8.3": {"pattern": "anchor", "theta": 8.3},
    "anchor 4": {"pattern": "anchor", "theta": 4.0, "step": 4},
    "hip": {"pattern": "hip", "first_tokens": 4096, "second_tokens": 2048, "tokens": 1024, "window": 512},
    "zipvl 0.975": {"pattern": "zipvl"},
    "zipvl 0.9": {"pattern": "zipvl", "tau": 0.9},
    "streaming": STREAMING,
    "streaming + delta 64": {"pattern": "delta", "gamma": 64, "base": STREAMING},
    "streaming + delta 16": {"pattern": "delta", "gamma": 16, "base": STREAMING},
    "flexprefill 0.95 + delta 16": {
        "pattern": "delta", "gamma": 16, "base": {"pattern": "flexprefill", "gamma": 0.95, "min_context": 0},
    },
    "xattention 0.95 + delta 16": {
        "pattern": "delta", "gamma": 16, "base": {"pattern": "xattention", "threshold": 0.95, "min_context": 0},
    },
    "xattention 0.8 + delta 64": {
        "pattern": "delta", "gamma": 64, "base": {"pattern": "xattention", "threshold": 0.8, "min_context": 0},
    },
    "flexprefill 0.98 + tail": {"pattern": "flexprefill", "gamma": 0.98, "min_budget": 512, **TAIL},
    "flexprefill 0.95 + tail": {"pattern": "flexprefill", "gamma": 0.95, "min_budget": 256, **TAIL},
    "flexprefill 0.9 + tail": {"pattern": "flexprefill", "gamma": 0.9, "min_budget": 256, **TAIL},
    "flexprefill 0.99 + tail": {"pattern": "flexprefill", "gamma": 0.99, "min_budget": 512, **TAIL},
    "xattention 0.98 + tail": {"pattern": "xattention", "threshold": 0.98, **TAIL},
    "xattention 0.98 + tail, stride 32": {"pattern": "xattention", "threshold": 0.98, "stride": 32, **TAIL},
    "xattention 0.98 + tail, stride 64": {"pattern": "xattention", "threshold": 0.98, "stride": 64, **TAIL},
    "xattention 0.98 + tail, stride 128": {"pattern": "xattention", "threshold": 0.98, "stride": 128, **TAIL},
    "xattention 0.95 + tail": {"pattern": "xattention", "threshold": 0.95, **TAIL},
    "xattention 0.9 + tail": {"pattern": "xattention", "threshold": 0.9, **TAIL},
    "xattention 0.9 + tail, stride 32": {"pattern": "xattention", "threshold": 0.9, "stride": 32, **TAIL},
    "streaming + tail": {**STREAMING, **TAIL},
    "streaming + delta 8": {"pattern": "delta", "gamma": 8, "base": STREAMING},
    "wide streaming + delta 16": {"pattern": "delta", "gamma": 16, "base": {**STREAMING, "window": 1536}},
    "wide streaming + delta 8": {"pattern": "delta", "gamma": 8, "base": {**STREAMING, "window": 1536}},
    "streaming + delta 8, 256 last": {"pattern": "delta", "gamma": 8, "base": {**STREAMING, "dense_last": 256}},
    "flexprefill 0.95 + delta 16, 256 last": {
        "pattern": "delta", "gamma": 16,
        "base": {"pattern": "flexprefill", "gamma": 0.95, "min_context": 0, "dense_last": 256},
    },
    "streaming + delta 16, 8 layers dense": {"pattern": "delta", "gamma": 16, "base": {**STREAMING, "dense_layers": 8}},
    "streaming + delta 16, 256 last": {"pattern": "delta", "gamma": 16, "base": {**STREAMING, "dense_last": 256}},
    "streaming + delta 4": {"pattern": "delta", "gamma": 4, "base": STREAMING},
    "streaming + delta 4, 256 last": {"pattern": "delta", "gamma": 4, "base": {**STREAMING, "dense_last": 256}},
    "streaming + delta 2, 256 last": {"pattern": "delta", "gamma": 2, "base": {**STREAMING, "dense_last": 256}},
    "wide streaming + delta 4, 256 last": {
        "pattern": "delta", "gamma": 4, "base": {**STREAMING, "window": 1536, "dense_last": 256},
    },
    "wide streaming + delta 8, 256 last": {
        "pattern": "delta", "gamma": 8, "base": {**STREAMING, "window": 1536, "dense_last": 256},
    },
    "streaming, 20 layers dense": {**STREAMING, "dense_layers": 20},
    "streaming + delta 8, 20 layers dense": {
        "pattern": "delta", "gamma": 8, "base": {**STREAMING, "dense_layers": 20, "dense_last": 256},
    },
    "streaming + delta 64, 20 layers dense": {
        "pattern": "delta", "gamma": 64, "base": {**STREAMING, "dense_layers": 20, "dense_last": 256},
    },
    "published streaming": PUBLISHED,
    "published streaming + delta 64": {"pattern": "delta", "gamma": 64, "base": PUBLISHED},
    "published streaming + delta 16, 256 last": {
        "pattern": "delta", "gamma": 16, "base": {**PUBLISHED, "dense_last": 256},
    },
    "streaming 2048 + delta 16, 256 last": {
        "pattern": "delta", "gamma": 16, "base": {**STREAMING, "window": 2048, "dense_last": 256},
    },
    "power": {"pattern": "power"},
    "strided": {"pattern": "strided"},
    "bigbird": {"pattern": "bigbird"},
}  # fmt: skip
WORTH = "model", "tokens", "documents", "keys", "seed", "tasks", "kl_prompts", "kl_tokens", "calibrated", "flags"
PROMPTS = 64
"""Most requests of a batch."""


def words_of(label: str) -> dict[str, Any]:
    """What a request with this pattern asks for: planned however short the prompt is."""
    words = PATTERNS[label]
    return words if words["pattern"] == "delta" else {"min_context": 0, **words}


def arguments() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.patterns", description=__doc__, formatter_class=raw
    )
    add = parser.add_argument
    add("model", help="folder of a model with a chat template, or `embedded`")
    add("--output", type=Path, required=True, help="JSON of all rows; rows that are in it aren't measured again")
    add("--sections", nargs="+", choices=[NEEDLES, KL], default=[NEEDLES, KL])
    add("--tasks", nargs="+", choices=list(ANSWER_TOKENS), default=list(ANSWER_TOKENS), help="of `needles`")
    add("--only", nargs="+", choices=list(PATTERNS), metavar="LABEL", default=list(PATTERNS))
    add("--calibration", type=Path, help="of `longreach calibrate --prefill`, for minference")
    add("--tokens", type=int, default=7000, help="of prompts")
    add("--documents", type=int, default=32, help="of `needles`, of each kind")
    add("--keys", type=int, default=4, help="in a document with several")
    add("--seed", type=int, default=0)
    add("--kl-prompts", type=int, default=12)
    add("--kl-tokens", type=int, default=64, help="of an answer, at most")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args, flags = arguments().parse_known_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from benchmarks.quality.run import commit
    from benchmarks.quality.selector_engine import Cell, Driver
    from benchmarks.quality.selector_sections import SECTIONS
    from server.embedded import EmbeddedModelError
    from server.errors import StartError, one_line
    from server.inprocess import build_engine
    from server.platforms import detect

    platform = detect().name
    model = EMBEDDED if args.model == EMBEDDED else Path(args.model).name
    source = commit()
    calibration = ["--prefill-calibration", str(args.calibration)] if args.calibration else []
    words = [
        *([] if args.model == EMBEDDED else [args.model]), "--kv-cache-memory-bytes", CACHE.get(platform, CACHE["cpu"]),
        *BATCH.get(platform, BATCH["cpu"]), *calibration, *flags,
    ]  # fmt: skip
    cells = [Cell("pattern", label, 0, words_of(label)) for label in args.only]
    try:
        engine = build_engine(words, max_logprobs=-1)
        known = {**vars(args), "model": model, "calibrated": args.calibration is not None, "flags": flags}
        settings = {**{name: known[name] for name in WORTH}, "device": engine.device, "vllm": engine.version}
        results, driver = Results(args.output, settings, source), Driver(engine, PROMPTS)
        for section in args.sections:
            measure, dense = SECTIONS[section]
            left = [cell for cell in [dense, *cells] if not results.has(section, cell.kind, cell.label, cell.tokens)]
            print(f"{section}: {len(left)} cells to do", file=sys.stderr)
            if left:
                measure(driver, left, args, results.add)
    except (ValueError, StartError, EmbeddedModelError) as error:
        print(f"python -m benchmarks.quality.patterns: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
