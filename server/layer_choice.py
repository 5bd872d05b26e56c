"""Which layers should select for TidalDecode and LessIsMore: measured by what their lists would miss."""

from __future__ import annotations

from collections.abc import Callable

import torch

from attention_plugins.decode.lessismore import SINKS, rank_major, shares
from attention_plugins.decode.tidal import FIRST_SELECTION

QUERIES = 64
"""Last queries of a text that are looked at."""
SHARE = 16
"""K is a context's length by this."""
NEAR = 16, 128
"""First and last tokens that most heads look at anyway: what is held of their attention says nothing of a selection."""
SHORTEST = 1024
"""Tokens of a text that says something of long ones."""

Lists = Callable[[torch.Tensor], torch.Tensor]
"""From a layer's strongest probabilities to what it selects: float32 [num_kv_heads, q, n] (those of the last q of n
queries) to int64 [num_kv_heads or 1, q, K], places of tokens."""


def tidal_lists(strongest: torch.Tensor) -> torch.Tensor:
    """The newest token and the K - 1 others that get most of all KV heads together: one list."""
    _, queries, n = strongest.shape
    rows = torch.arange(queries, device=strongest.device)
    scores = strongest.sum(0, keepdim=True)
    scores[:, rows, n - queries + rows] = float("inf")
    return scores.topk(n // SHARE, dim=-1).indices


def lessismore_lists(strongest: torch.Tensor) -> torch.Tensor:
    """One list for all heads: first tokens, last ones, and the heads' favourites in turn."""
    heads, queries, n = strongest.shape
    device = strongest.device
    tokens = torch.full((queries,), n // SHARE, device=device)
    most, last = shares(tokens)
    first = torch.arange(SINKS, device=device).expand(queries, -1)
    own = n - queries + torch.arange(queries, device=device)[:, None]
    near = torch.cat((first, own - torch.arange(int(last[0]), device=device)), -1)
    scores = strongest.scatter(-1, near.expand(heads, -1, -1), float("-inf"))
    scores.masked_fill_(torch.arange(n, device=device) > own, float("-inf"))
    places = scores.topk(int(most[0]), dim=-1).indices.transpose(0, 1)
    ranks = torch.arange(places.shape[-1], device=device).expand_as(places)
    offset = n * torch.arange(queries, device=device)
    taken = torch.empty(queries * n, dtype=torch.int64, device=device)
    union = rank_major(places + offset[:, None, None], ranks, most, taken) - offset[:, None]
    return torch.cat((near, union), -1)[None]


SELECTORS: dict[str, Lists] = {"tidal": tidal_lists, "lessismore": lessismore_lists}


class LayerChoice:
    """How much of each layer's far attention goes to the tokens that an earlier layer would have selected for it."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers, self.texts = num_layers, 0
        self.mass = {name: torch.zeros(num_layers, num_layers, dtype=torch.double) for name in SELECTORS}
        """By selector: [selecting layer, reading layer], summed over texts."""
        self._lists: dict[str, list[torch.Tensor]] = {}

    def begin(self) -> None:
        """A new text."""
        self.texts += 1
        self._lists = {name: [] for name in SELECTORS}

    def see(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, scale: float) -> None:
        """Layers come in their order.

        Args:
            queries: [num_heads, n, head_dim], post-RoPE.
            keys: [num_kv_heads, n, head_dim], post-RoPE.
            scale: softmax scale.
        """
        heads, n = keys.shape[:2]
        grouped = queries[:, -QUERIES:].float().unflatten(0, (heads, -1))
        place, own = torch.arange(n, device=keys.device), torch.arange(n - QUERIES, n, device=keys.device)[:, None]
        later, far = place > own, (place >= NEAR[0]) & (place <= own - NEAR[1])
        strongest = torch.empty(heads, QUERIES, n, device=keys.device)
        for head in range(heads):  # one at a time: all of them would take gigabytes
            logits = grouped[head] @ keys[head].float().T * scale
            probabilities = logits.masked_fill_(later, float("-inf")).softmax(-1)
            distant = probabilities * far
            total = float(distant.sum())
            for name, lists in self._lists.items():
                for selecting, chosen in enumerate(lists):
                    places = chosen[min(head, len(chosen) - 1)].long().expand(len(probabilities), -1, -1)
                    self.mass[name][selecting, layer] += float(distant.gather(-1, places).sum()) / total / heads
            strongest[head] = probabilities.amax(0)
        for name, lists in self._lists.items():
            lists.append(SELECTORS[name](strongest).int())

    def best(self, selector: str, count: int = 2) -> tuple[list[int], float]:
        """The selecting layers, and the mean share of attention that their lists hold in the others behind the first.

        The first is the paper's; the others are those that together hold most. Each of them reads everything, so more
        layers hold more and cost more.

        Args:
            count: of selecting layers.

        Raises:
            ValueError: the model has no room for so many.
        """
        layers = self.num_layers
        first = min(FIRST_SELECTION, layers - 2)
        if not 1 <= count <= layers - first:
            raise ValueError(f"{count} selecting layers; allowed are 1 to {layers - first}")
        mass = self.mass[selector] / max(self.texts, 1)
        sums = torch.nn.functional.pad(mass.cumsum(-1), (1, 0))  # [c, l]: over the layers before l

        def held(chosen: int, following: int) -> float:
            return float(sums[chosen, following] - sums[chosen, chosen + 1])

        # By the last of them: the most that so many selecting layers can hold before it, and which they are.
        ways: dict[int, tuple[float, list[int]]] = {first: (0.0, [first])}
        for _ in range(count - 1):
            ways = {
                last: max((total + held(way[-1], last), [*way, last]) for total, way in ways.values() if way[-1] < last)
                for last in range(first + 1, layers)
                if any(way[-1] < last for _, way in ways.values())
            }
        total, way = max((total + held(way[-1], layers), way) for total, way in ways.values())
        return way, total / max(layers - first - count, 1)
