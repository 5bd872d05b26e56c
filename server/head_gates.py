"""Head gates without training: how much of each KV head's attention lies outside sinks and recent tokens.

DuoAttention (arXiv 2410.10819) learns its gates. This is a substitute that needs a few long prompts: a head whose last
queries look into the middle of a prompt is taken for a retrieval head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvcache.scorers import reduced_probabilities
from server.errors import StartError
from server.watching import load, run_all, tokens


@dataclass(frozen=True)
class Reach:
    """What counts as near: the first `sinks` and the last `recent` tokens, seen from the last `window` queries."""

    sinks: int = 64
    recent: int = 256
    window: int = 32

    @property
    def shortest(self) -> int:
        """Tokens of a prompt that has something in between."""
        return self.sinks + max(self.recent, self.window) + 1

    def far_mass(self, queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention of one layer that goes into the middle.

        Args:
            queries: [window, num_heads, head_dim], post-RoPE, the prompt's last ones.
            keys: [num_kv_heads, n, head_dim], post-RoPE.
            scale: softmax scale.

        Returns:
            float32 [num_kv_heads]: mean over the queries; of a group's query heads the one that looks farthest.
        """
        attention = reduced_probabilities(queries, keys, scale)
        return attention[..., self.sinks : keys.shape[1] - max(self.recent, self.window)].sum(-1).amax(-1)


def measure(model: Any, prompts: list[list[int]], reach: Reach, *, bar: bool = False) -> list[list[float]]:
    """Gates by layer and KV head, spread over 0 ... 1: the mean over prompts, lowest head 0, highest 1.

    Args:
        model: a causal language model of transformers, all of whose layers attend to everything.
        prompts: token ids.
        bar: show on stderr how far it is.

    Raises:
        StartError: a prompt is too short to tell near from far, or there is none.
    """
    found: dict[int, torch.Tensor] = {}

    def see(layer: int, queries: torch.Tensor, keys: torch.Tensor, _: torch.Tensor, scale: float) -> None:
        mass = reach.far_mass(queries[:, -reach.window :].transpose(0, 1), keys, scale).double().cpu()
        found[layer] = mass + found.get(layer, 0)

    run_all(model, prompts, reach.shortest, lambda: see, bar)
    if not found:
        raise StartError("head gates need at least one prompt")
    total = torch.stack([found[layer] for layer in sorted(found)])
    low, high = total.min(), total.max()
    return ((total - low) / (high - low).clamp(min=1e-12)).tolist()


def gates_of_texts(model_path: str, texts: list[str], reach: Reach, *, bar: bool = False) -> list[list[float]]:
    """Load a model, on a GPU if there is one, and measure its gates on these user messages.

    Raises:
        StartError: the model can't be loaded, or a prompt is too short.
    """
    tokenizer, model = load(model_path)
    return measure(model, [tokens(tokenizer, text) for text in texts], reach, bar=bar)
