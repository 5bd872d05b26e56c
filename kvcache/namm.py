"""NAMM's network: from the history of a token's attention to whether it should stay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

WIDTH, FREQUENCIES, AGE_DIM = 32, 17, 8
MAX_PERIOD = 50_000.0
NO_WEIGHTS = "it was started without trained weights (--kv-namm-weights FILE)"
_INPUTS = FREQUENCIES + AGE_DIM
SHAPES: dict[str, tuple[int, ...]] = {
    **{f"attention.{part}.weight": (WIDTH, _INPUTS) for part in ("query", "key", "value")},
    **{f"attention.{part}.bias": (WIDTH,) for part in ("query", "key", "value")},
    "score.weight": (1, WIDTH),
    "score.bias": (1,),
}
# Bounds the memory of `Network.scores`: attention logits held at once, 4 bytes each in a few copies.
_MAX_LOGITS = 1 << 23


@dataclass(frozen=True)
class Network:
    """One self-attention head over a (layer, KV head)'s tokens and a linear map to a score; the same for all of them.

    A token sees itself and newer ones, so that it can tell when it has been superseded. The layout of published
    checkpoints is not verified: theirs have to be renamed to `names`, and their details may differ.

    Attributes:
        weights: float32, by name.
    """

    weights: dict[str, torch.Tensor]

    @staticmethod
    def names() -> str:
        """The tensors of a file, with their shapes."""
        return ", ".join(f"{name} {list(shape)}" for name, shape in SHAPES.items())

    @classmethod
    def load(cls, file: str | Path, device: torch.device | str = "cpu") -> Network:
        """Read a safetensors file.

        Raises:
            ValueError: it can't be read or doesn't hold these tensors; the message says which.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(file, device=str(device))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} can't be read as safetensors: {error}") from error
        wrong = [name for name, shape in SHAPES.items() if name not in found or tuple(found[name].shape) != shape]
        if wrong or len(found) != len(SHAPES):
            other = sorted({*wrong, *(found.keys() - SHAPES.keys())})
            raise ValueError(f"{file} doesn't fit in {', '.join(other)}; it must hold {cls.names()}")
        return cls({name: tensor.float() for name, tensor in found.items()})

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """float32 [n]: above 0 the published method keeps a token. A block of tokens at a time.

        Args:
            features: float32 [n, FREQUENCIES], by position.
        """
        n = len(features)
        ages = torch.arange(n - 1, -1, -1, device=features.device)
        inputs = torch.cat((features, age_embedding(ages)), -1)
        query, key, value = (self._linear(inputs, f"attention.{part}") for part in ("query", "key", "value"))
        attended, step = torch.empty_like(value), max(1, _MAX_LOGITS // n)
        for start in range(0, n, step):
            rows = query[start : start + step]
            logits = rows @ key[start:].T / math.sqrt(WIDTH)
            older = torch.ones_like(logits, dtype=torch.bool).tril_(-1)
            attended[start : start + step] = logits.masked_fill_(older, float("-inf")).softmax(-1) @ value[start:]
        return self._linear(attended, "score")[:, 0]

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])


def age_embedding(ages: torch.Tensor) -> torch.Tensor:
    """Four sines, then four cosines, of an age in tokens; their periods grow up to 2 pi 50,000: float32 [n, 8]."""
    half = AGE_DIM // 2
    speeds = MAX_PERIOD ** (-torch.arange(half, device=ages.device) / half)
    angles = ages.float()[:, None] * speeds
    return torch.cat((angles.sin(), angles.cos()), -1)
