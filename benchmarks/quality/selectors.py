"""What sparse decoding loses beside dense attention, by selector and K.

python -m benchmarks.quality.selectors MODEL_FOLDER|embedded --output FILE.json [--sections needles kl agreement]
    [--tasks passkey multi-key]
    [--selectors NAME[,ARG=VALUE...] ...] [--budgets 512] [--calibration FILE] [any `serve` flag of vLLM]

Sections are described in `benchmarks.quality.selector_sections`. Every row is printed and put into the file as soon as
it is known; the same command goes on where a run was broken off, and another one (other sections, selectors or budgets)
adds its rows to the file. Loki runs where there is a calibration. Tables and pictures:
`python -m benchmarks.quality.selectors_report FILE.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quality.selector_cases import ANSWER_TOKENS
from benchmarks.quality.table import EMBEDDED

if TYPE_CHECKING:
    from server.inprocess import InProcessEngine

NEEDLES, KL, AGREEMENT = "needles", "kl", "agreement"
BUDGETS = {NEEDLES: [512], KL: [64, 128, 256, 512, 1024, 2048], AGREEMENT: [512, 1024, 2048]}
SELECTORS = [
    "recycled,stride=50", "recycled,stride=10", "recycled,stride=50,similarity=0.8,check_every=5",
    "tidal", "lessismore", "quest", "local",
]  # fmt: skip
CALIBRATED = ["loki"]
POLICIES = ["streamingllm", "h2o", "snapkv"]
CACHE = {"cpu": "1G", "cuda": "32G"}
"""On a GPU, room for all of a section's prompts at once."""
BATCH = {
    "cpu": ["--max-num-seqs", "32"],
    "cuda": ["--max-num-seqs", "256", "--max-num-batched-tokens", "8192", "--cudagraph-capture-sizes",
             "8", "16", "32", "48", "64", "96", "128", "144"],
}  # fmt: skip
WORTH = ("model", "tokens", "documents", "keys", "seed", "tasks", "kl_prompts", "kl_tokens", "agreement_prompt",
         "agreement_prompts", "output_tokens", "calibrated", "flags")  # fmt: skip
"""Settings that rows of one file have in common."""


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def arguments() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.selectors", description=__doc__, formatter_class=raw
    )
    add = parser.add_argument
    add("model", help="folder of a model with a chat template, or `embedded`")
    add("--output", type=Path, required=True, help="JSON of all rows; rows that are in it aren't measured again")
    add("--sections", nargs="+", choices=list(BUDGETS), default=list(BUDGETS))
    add("--tasks", nargs="+", choices=list(ANSWER_TOKENS), default=list(ANSWER_TOKENS), help="of `needles`")
    add("--selectors", nargs="+", metavar="NAME[,ARG=VALUE...]", help=f"default: {' '.join(SELECTORS)}, and loki")
    add("--policies", nargs="*", default=POLICIES, help="compression at equal K, in `needles`")
    add("--budgets", type=numbers, help=f"K, in every section; default: {BUDGETS}")
    add("--calibration", type=Path, help="of `longreach calibrate`")
    add("--states", type=int, default=144, help="most requests of a batch")
    add("--tokens", type=int, default=7000, help="of prompts in `needles` and `kl`")
    add("--documents", type=int, default=32, help="of `needles`, of each kind")
    add("--keys", type=int, default=4, help="in a document with several")
    add("--seed", type=int, default=0)
    add("--kl-prompts", type=int, default=12)
    add("--kl-tokens", type=int, default=64, help="of an answer, at most")
    add("--agreement-prompts", type=int, default=16)
    add("--agreement-prompt", type=int, default=4000, help="tokens")
    add("--output-tokens", type=int, default=4000, help="of an answer in `agreement`")
    return parser


class Results:
    """Rows and what they have in common, in a file that is whole after every row."""

    def __init__(self, path: Path, settings: dict[str, Any], commit: str | None) -> None:
        """
        Raises:
            ValueError: the file is of a run with other settings.
        """
        self.path, self.settings = path, settings
        self.rows: list[dict[str, Any]] = []
        self.commits = [commit]
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["settings"] != json.loads(json.dumps(settings)):
                raise ValueError(f"{path.name} is of a run with other settings: choose another file")
            self.rows = known["rows"]
            self.commits = list(dict.fromkeys([*known["commits"], commit]))

    def has(self, section: str, kind: str, label: str, tokens: int) -> bool:
        asked = (section, kind, label, tokens)
        return any((row["section"], row["kind"], row["label"], row["tokens"]) == asked for row in self.rows)

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """All rows of a cell come together, so that a cell is there whole or not at all; known ones are left out."""
        new = [row for row in rows if not self.has(row["section"], row["kind"], row["label"], row["tokens"])]
        for row in new:
            print(json.dumps(row), flush=True)
        self.rows += new
        self._write()

    def _write(self) -> None:
        found = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "commits": self.commits,
            "settings": self.settings, "rows": self.rows,
        }  # fmt: skip
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)


def start(args: argparse.Namespace, flags: Sequence[str], selectors: Sequence[str]) -> InProcessEngine:
    """The engine with these selectors; `flags` are of `longreach serve` and stand behind ours."""
    from server.inprocess import build_engine
    from server.platforms import detect

    platform = detect().name
    cache = CACHE.get(platform, CACHE["cpu"])
    model = [] if args.model == EMBEDDED else [args.model]
    words = [*model, "--kv-cache-memory-bytes", cache, *BATCH.get(platform, BATCH["cpu"]), *flags]
    file = str(args.calibration.resolve()) if args.calibration else None
    decode = {"selectors": list(selectors), "states": args.states, "calibration": file}
    return build_engine(words, max_logprobs=-1, additional_config={"longreach": {"decode": decode}})


def run(engine: InProcessEngine, args: argparse.Namespace, results: Results, say: Callable[[str], None]) -> None:
    """Section by section, only what isn't there yet."""
    from benchmarks.quality.selector_engine import Driver, make_cells
    from benchmarks.quality.selector_sections import SECTIONS

    states = min(args.states, engine.engine.vllm_config.scheduler_config.max_num_seqs)
    driver = Driver(engine, states)
    for section in args.sections:
        policies = args.policies if section == NEEDLES else []
        measure, dense = SECTIONS[section]
        cells = [dense, *make_cells(args.selectors, policies, args.budgets or BUDGETS[section])]
        left = [cell for cell in cells if not results.has(section, cell.kind, cell.label, cell.tokens)]
        say(f"{section}: {len(left)} of {len(cells)} cells to do")
        if left:
            measure(driver, left, args, results.add)


def main(argv: Sequence[str] | None = None) -> int:
    args, flags = arguments().parse_known_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from attention_plugins.decode.registry import selectors
    from benchmarks.quality.run import commit
    from benchmarks.quality.selector_engine import make_cells
    from server.embedded import EmbeddedModelError
    from server.errors import StartError, one_line

    args.selectors = args.selectors or [*SELECTORS, *(CALIBRATED if args.calibration else [])]
    model = EMBEDDED if args.model == EMBEDDED else Path(args.model).name
    source = commit()  # now: the checkout may change while this runs
    known = {**vars(args), "model": model, "calibrated": args.calibration is not None, "flags": flags}
    try:
        names = list(dict.fromkeys(cell.name for cell in make_cells(args.selectors, [], [512])))
        if not args.calibration and (lacking := [name for name in names if selectors()[name].needs_calibration]):
            raise ValueError(f"{', '.join(lacking)}: only with --calibration FILE, written by `longreach calibrate`")
        engine = start(args, flags, names)
        settings = {**{name: known[name] for name in WORTH}, "device": engine.device, "vllm": engine.version}
        run(engine, args, Results(args.output, settings, source), lambda line: print(line, file=sys.stderr))
    except (ValueError, StartError, EmbeddedModelError) as error:
        print(f"python -m benchmarks.quality.selectors: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
