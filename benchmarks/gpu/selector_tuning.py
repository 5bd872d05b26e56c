"""Other constants in the selectors' kernels that read much: microseconds, taken as in `selector_kernels`.

python -m benchmarks.gpu.selector_tuning [--context 126000] [--batch 1] [--budget 2048]
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from itertools import product

import torch

from attention_plugins import kernels
from benchmarks.gpu.selector_cache import SELECT, FakeCache
from benchmarks.gpu.selector_kernels import CALLS, row


def variants(module: str, **values: list[int]) -> Iterator[str]:
    """Set a module's constants to all combinations of these values, one after the other, and then back."""
    found = importlib.import_module(f"attention_plugins.kernels.{module}")
    before = {name: getattr(found, name) for name in values}
    for chosen in product(*values.values()):
        for name, value in zip(values, chosen, strict=True):
            setattr(found, name, value)
        yield ", ".join(f"{name} {value}" for name, value in zip(values, chosen, strict=True))
    for name, value in before.items():
        setattr(found, name, value)


def tune(cache: FakeCache, budget: int) -> None:
    """Constants of the kernels that read much."""
    rows, layers, scores = cache.rows, cache.layers, cache.scores(cache.columns)
    bounds = kernels.page_bounds(len(layers[0].pages), cache.dim, cache.device)
    tokens = cache.token_lists(budget, CALLS)
    out, logits = torch.empty_like(cache.queries), torch.zeros(*cache.shape, budget + 16, device="cuda")
    few = cache.with_tokens(budget)
    slots, counts = cache.empty(*cache.shape, budget + 16), cache.empty(*cache.shape)

    def score(i: int) -> None:
        kernels.token_scores(scores, rows, layers[i % len(layers)], cache.queries, SELECT)

    def score_pages(i: int) -> None:
        kernels.page_scores(scores, bounds, rows, layers[i % len(layers)], cache.queries, SELECT)

    def attend(i: int) -> None:
        lists, layer = tokens[i % CALLS], layers[i % len(layers)]
        kernels.slot_attention(out, cache.queries, *lists, rows.places, rows, layer, SELECT, logits)

    def top(i: int) -> None:
        kernels.top_slots(slots, counts, scores, few, layers[i % len(layers)], SELECT, rows.places)

    stages = [2, 3, 4]
    for name in variants("scores", _TOKENS=[64, 128, 256], _WARPS=[4, 8], _STAGES=stages):
        row(cache, f"token_scores, {name}", score)
    for name in variants("scores", _PROGRAMS=[528, 1056, 2112, 8448], _STAGES=stages):
        row(cache, f"token_scores, {name}", score)
    for name in variants("quest", _PAGES=[32, 64, 128], _WARPS=[4, 8], _STAGES=stages):
        row(cache, f"page_scores, {name}", score_pages)
    for name in variants("attention", _TOKENS=[32, 64, 128], _WARPS=[4, 8], _STAGES=stages, _PROGRAMS=[264, 528]):
        row(cache, f"slot_attention, {name}", attend, budget)
    for name in variants("top", _CHUNK=[4096, 8192]):
        row(cache, f"top_slots, {name}", top, budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=126_000)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--budget", type=int, default=2048)
    args = parser.parse_args()
    tune(FakeCache(args.context, args.batch), args.budget)


if __name__ == "__main__":
    main()
