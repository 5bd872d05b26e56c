"""How much attention the pages get that Quest reads, by `spread`: what its default rests on.

python -m benchmarks.quality.page_mass embedded|MODEL_FOLDER [--spreads 1,0.7,0.5,0.3,0] [--tokens 7000] [--texts 3]

The model's own queries and keys, by transformers, on passages of real text: of the last 64 queries of each, every
eighth chooses `--budget` tokens in pages of 16 of the keys before it, as `attention_plugins.decode.quest` does without
`pinned`. Layers that slide, and the first two of models that have none, are left out. Far attention is all but that to
the first 16 and the last 128 tokens. `best` is what the pages of most attention get: no choice gets more.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from attention_plugins.decode.quest import DENSE_LAYERS
from benchmarks.quality.table import EMBEDDED
from benchmarks.quality.texts import make_passage
from server.embedded import ensure_embedded_model
from server.watching import load, run

PAGE, QUERIES, EVERY = 16, 64, 8
FIRST, LAST = 16, 128
SPREADS = (1.0, 0.7, 0.5, 0.3, 0.0)


def page_scores(queries: torch.Tensor, pages: torch.Tensor, spread: float) -> torch.Tensor:
    """Quest's scores: queries [num_kv_heads, group, dim], pages [num_kv_heads, p, PAGE, dim] -> [num_kv_heads, p]."""
    low, high = pages.amin(2), pages.amax(2)
    wider = spread * queries.abs()
    products = (queries + wider) / 2 @ high.transpose(1, 2) + (queries - wider) / 2 @ low.transpose(1, 2)
    return products.sum(1)


def held(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, budget: int, spreads: Sequence[float]
) -> torch.Tensor:
    """Shares of one query's attention, the group's mean, that lie in the pages of each choice, and in the best pages.

    Args:
        queries: [num_kv_heads, group, dim].
        keys: [num_kv_heads, n, dim], the query's own last.

    Returns:
        float32 [2, len(spreads) + 1, num_kv_heads], of all attention and of the far one.
    """
    n = keys.shape[1]
    full = (n - 1) // PAGE
    given = (queries @ keys.transpose(1, 2) * scale).softmax(-1).mean(1)
    pages = keys[:, : full * PAGE].unflatten(1, (full, PAGE))
    far = given.clone()
    far[:, :FIRST] = far[:, -LAST:] = 0
    most = min(budget // PAGE - 1, full)
    found = []
    for weights in (given, far):
        by_page = weights[:, : full * PAGE].unflatten(1, (full, PAGE)).sum(-1)
        chosen = [page_scores(queries, pages, spread).topk(most).indices for spread in spreads]
        # The best for all attention and for the far one are different pages.
        shares = [by_page.gather(1, each).sum(-1) for each in [*chosen, by_page.topk(most).indices]]
        found.append((torch.stack(shares) + weights[:, full * PAGE :].sum(-1)) / weights.sum(-1))
    return torch.stack(found)


class PageMass:
    """Sums over queries, KV heads, layers and texts."""

    def __init__(self, layers: Sequence[int], budget: int, spreads: Sequence[float]) -> None:
        self.layers, self.budget, self.spreads = frozenset(layers), budget, spreads
        self.sums, self.count = torch.zeros(2, len(spreads) + 1), 0

    def see(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, _: torch.Tensor, scale: float) -> None:
        """See `server.watching.Watch`."""
        if layer not in self.layers:
            return
        heads, n, dim = keys.shape
        grouped = queries[:, -QUERIES:].float().view(heads, -1, QUERIES, dim)
        for back in range(0, QUERIES, EVERY):
            end = n - QUERIES + 1 + back
            shares = held(grouped[:, :, back], keys[:, :end].float(), scale, self.budget, self.spreads)
            self.sums += shares.sum(-1).cpu()
            self.count += heads

    def lines(self) -> list[str]:
        """A table's."""
        names = [*(f"spread {spread:g}" for spread in self.spreads), "best"]
        rows = zip(names, *(self.sums / self.count).tolist(), strict=True)
        return ["| | attention held | of the far attention |", "| --- | ---: | ---: |"] + [
            f"| {name} | {whole:.1%} | {far:.1%} |" for name, whole, far in rows
        ]


def full_layers(config: Any) -> list[int]:
    """Those that Quest chooses in."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    if "sliding_attention" in kinds:
        return [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    return list(range(DENSE_LAYERS, config.num_hidden_layers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--spreads", type=lambda words: [float(word) for word in words.split(",")], default=SPREADS)
    parser.add_argument("--tokens", type=int, default=7000)
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--budget", type=int, default=512)
    args = parser.parse_args()
    tokenizer, model = load(str(ensure_embedded_model()) if args.model == EMBEDDED else args.model)
    if model.device.type == "cpu":
        model = model.float()  # many CPUs have no bfloat16
    mass = PageMass(full_layers(model.config), args.budget, args.spreads)
    for number in range(args.texts):
        run(model, make_passage(tokenizer, args.tokens, 1, number).document, mass.see)
        print(f"{number + 1} of {args.texts} texts", *mass.lines(), sep="\n", flush=True)


if __name__ == "__main__":
    main()
