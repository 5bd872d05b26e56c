"""The principal directions of each KV head's keys, for the selector loki."""

from __future__ import annotations

import torch


class KeyDirections:
    """Second moments of post-RoPE keys, added up over texts; no mean is taken off, as in Loki's code."""

    def __init__(self) -> None:
        self._moments: dict[int, torch.Tensor] = {}

    def see(self, layer: int, keys: torch.Tensor) -> None:
        """
        Args:
            keys: [num_kv_heads, n, head_dim].
        """
        keys = keys.float()
        moment = (keys.transpose(1, 2) @ keys).double().cpu()
        self._moments[layer] = moment + self._moments.get(layer, 0)

    def basis(self, rank: int) -> tuple[torch.Tensor, float]:
        """The first directions, and the share of the keys' squared length that lies in them.

        Returns:
            float32 [num_layers, num_kv_heads, head_dim, rank], largest first; each direction's largest component is
            positive, so that two measurements can be compared. And the mean share over layers and heads.
        """
        moments = torch.stack([self._moments[layer] for layer in sorted(self._moments)])
        values, vectors = torch.linalg.eigh(moments)  # smallest first
        values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)[..., :rank]
        largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
        share = values[..., :rank].sum(-1) / values.sum(-1).clamp(min=1e-300)
        return (vectors * largest.sign()).float().contiguous(), float(share.mean())
