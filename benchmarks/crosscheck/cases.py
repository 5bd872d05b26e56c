"""What is compared: a press of kvpress and the request of ours that means the same. Plain data for both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NUM_LAYERS, NUM_KV_HEADS = 30, 3
"""Of SmolLM2-135M."""
FUTURE = 512
"""Positions behind a prompt that Expected Attention looks at."""


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: key in dumps and results.
        press: a kvpress class by `class`, with its arguments; a nested one under `press`.
        words: our request, without the budget, which is the number of tokens that kvpress keeps.
        keep: share of the prompt that stays (1 - kvpress' compression ratio).
        identical: least share of (document, layer, head) whose kept sets have to be identical.
        overlap: least share of kept tokens that both sides keep.
        gap: largest distance of scores, as a share, at which tokens may be exchanged: ties and rounding.
        same_counts: whether both sides have to give each layer and head the same number of tokens.
        attentions: whether the press is given the full attention matrix.
    """

    name: str
    press: dict[str, Any]
    words: dict[str, Any]
    keep: float
    identical: float = 0.97
    overlap: float = 0.9999
    gap: float = 1e-5
    same_counts: bool = True
    attentions: bool = False


def gates() -> list[list[float]]:
    """A head pattern of the model's shape, all gates different."""
    return [
        [(layer * NUM_KV_HEADS + head) * 37 % 90 / 90 + 0.005 for head in range(NUM_KV_HEADS)]
        for layer in range(NUM_LAYERS)
    ]


_SNAP = {"class": "SnapKVPress", "window_size": 32, "kernel_size": 5}
_NARROW = {"window_size": 16, "kernel_size": 5}
_VOTES = {"window": 32, "kernel": 5, "pooling": "avg", "window_reduce": "mean", "group_reduce": "mean", "sinks": 0}


def cases_at(keep: float) -> list[Case]:
    """All comparisons at one share."""
    found = [
        Case("streamingllm", {"class": "StreamingLLMPress", "n_sink": 4}, {"policy": "streamingllm", "sinks": 4}, keep),
        Case("l2norm", {"class": "KnormPress"}, {"policy": "l2norm", "sinks": 0, "recent": 0}, keep,
             identical=0.95, overlap=0.999),
        Case("keydiff", {"class": "KeyDiffPress"}, {"policy": "keydiff", "sinks": 0, "recent": 0}, keep),
        Case("tova", {"class": "TOVAPress"}, {"policy": "tova", "sinks": 0, "window": 1}, keep),
        Case("snapkv", _SNAP, {"policy": "snapkv", **_VOTES}, keep),
        Case("pyramidkv", {"class": "PyramidKVPress", "beta": 20, **_NARROW},
             {"policy": "pyramidkv", "beta": 20, **_VOTES, "window": 16}, keep, same_counts=False),
        Case("adakv", {"class": "AdaKVPress", "alpha_safeguard": 0.2, "press": _SNAP},
             {"policy": "adakv", "floor": 0.2, **_VOTES}, keep),
        Case("criticalkv", {"class": "CriticalKVPress", "press": _SNAP}, {"policy": "criticalkv", **_VOTES}, keep,
             identical=0, overlap=0.9, gap=1),
        Case("criticalkv, values as they are", {"class": "PlainValues", "press": _SNAP},
             {"policy": "criticalkv", **_VOTES}, keep),
        Case("expectedattention", {"class": "ExpectedAttentionPress", "n_future_positions": FUTURE, "n_sink": 4},
             {"policy": "expectedattention", "sinks": 4, "recent": 0, "future": FUTURE, "epsilon": 0.0}, keep,
             identical=0.9, overlap=0.999, gap=1e-3),
        Case("observedattention", {"class": "ObservedAttentionPress"},
             {"policy": "observedattention", "sinks": 0, "recent": 0}, keep, attentions=True),
    ]  # fmt: skip
    if keep == 0.5:  # its pattern decides how much stays
        found.append(
            Case("duoattention", {"class": "GivenPattern", "head_compression_ratio": 0.5},
                 {"policy": "duoattention", "gates": gates(), "sinks": 64, "recent": 256}, keep, same_counts=False)
        )  # fmt: skip
    return [Case(**{**vars(case), "name": f"{case.name} @{keep:.0%}"}) for case in found]


CASES: list[Case] = [case for keep in (0.5, 0.25) for case in cases_at(keep)]
