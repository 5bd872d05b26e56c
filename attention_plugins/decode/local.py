"""Local or global heads by the moments of their keys."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from attention_plugins.decode.base import Place, Reader, Selector, SelectorArgs, shortest
from attention_plugins.decode.rows import DecodeRows, LayerCache, Mode
from kvcache.evidence import dequantise

SINKS = 16
"""First tokens that count as near."""


def bulk_attention(
    queries: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor, tokens: torch.Tensor, scale: float
) -> torch.Tensor:
    """Log of what a query gives to keys that are normally distributed, before it is divided by the sum.

    Args:
        queries: float32 [..., group, head_dim].
        mean: float32 [..., head_dim].
        covariance: float32 [..., head_dim, head_dim].
        tokens: float32 [..., 1], how many keys.

    Returns:
        float32 [..., group]: `log T + q.mean s + q^T covariance q s^2 / 2`.
    """
    linear = (queries @ mean[..., None])[..., 0] * scale
    square = ((queries @ covariance) * queries).sum(-1) * (scale * scale / 2)
    return tokens.clamp(min=1).log() + linear + square


class LocalOrGlobalReader(Reader):
    """By request, layer and KV head the mean and the covariance of the keys."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        place, g = self.place, self.place.geometry
        shape = place.states, g.num_layers, g.num_kv_heads, g.head_dim
        self.mean = torch.zeros(shape, device=place.device)
        self.covariance = torch.zeros(*shape, g.head_dim, device=place.device)
        self.first, self.most = self._near_pages(place)
        sequences = place.rows * g.num_kv_heads
        self.near = torch.zeros(sequences, self.most, dtype=torch.int32, device=place.device)

    @classmethod
    def nbytes(cls, place: Place) -> int:
        g = place.geometry
        moments = place.states * g.num_layers * g.num_kv_heads * 4 * g.head_dim * (1 + g.head_dim)
        return moments + 4 * place.rows * g.num_kv_heads * cls._near_pages(place)[1]

    @staticmethod
    def _near_pages(place: Place) -> tuple[int, int]:
        """Pages of the first tokens, and of all near ones where they are most."""
        size = place.geometry.page_size
        first = -(-SINKS // size)
        return first, first + -(-place.tokens // size) + 1

    def prepare(self, pages: torch.Tensor, lengths: torch.Tensor, caches: list[LayerCache], state: int) -> None:
        for cache in caches:
            for head, (row, length) in enumerate(zip(pages[cache.layer], lengths[cache.layer].tolist(), strict=True)):
                content, _ = cache.codec.unpack(cache.pages[row[: -(-length // self.place.geometry.page_size)]])
                keys = dequantise(content.flatten(0, 1)[:length], cache.quant.key).float()
                mean = keys.mean(0)
                self.mean[state, cache.layer, head] = mean
                self.covariance[state, cache.layer, head] = keys.T @ keys / length - torch.outer(mean, mean)

    def read(self, out: torch.Tensor, queries: torch.Tensor, rows: DecodeRows, cache: LayerCache, whole: int) -> None:
        n, g = len(rows), self.place.geometry
        pages, lengths = self.tables(n)
        self.ops.full_rows(pages, lengths, rows, cache, Mode.DENSE | Mode.SELECT)
        near, near_lengths, far = self._near(pages, lengths, rows)
        found = torch.empty_like(out)
        log_near = self.read_pages(found, queries, near, near_lengths, cache)

        state = rows.places.clamp(min=0).long()
        mean, covariance = (table[:, cache.layer].index_select(0, state) for table in (self.mean, self.covariance))
        real = dequantise(queries, cache.quant.query).float()
        log_far = bulk_attention(real, mean, covariance, far.view(n, g.num_kv_heads, 1).float(), cache.scale)
        share = torch.sigmoid(log_near - log_far)  # of all that is attended, what the near tokens get
        local = (share >= rows.thresholds[:, None, None]).all(-1) | (far.view(n, -1) <= 0)
        local &= (rows.modes == int(Mode.SELECT))[:, None]
        lengths.masked_fill_(local.flatten(), 0)
        self.read_pages(out, queries, pages, lengths, cache)
        out.copy_(torch.where(local[..., None, None], found, out))

    def _near(
        self, pages: torch.Tensor, lengths: torch.Tensor, rows: DecodeRows
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pages of the first and the last tokens, how many tokens they hold, and how many are left out."""
        size, heads = self.place.geometry.page_size, self.place.geometry.num_kv_heads
        total = (lengths + size - 1) // size
        last = (rows.tokens.repeat_interleave(heads) - SINKS + size - 1) // size + 1
        held = torch.minimum(total, self.first + last)
        column = torch.arange(self.most, device=pages.device)
        at = torch.where(column < self.first, column, total[:, None] - held[:, None] + column)
        near = self.near[: len(pages)]
        near.copy_(pages.gather(1, at.clamp(0, pages.shape[1] - 1).long()))
        left_out = (total - held) * size
        return near, lengths - left_out, left_out


class LocalOrGlobal(Selector):
    """Finds, for each query and without training, the heads to which only near tokens matter.

    A head's keys are taken as normally distributed, with the moments of the prompt's keys. That gives an estimate of
    what a query would give to all far tokens together; what it gives to the near ones (the first 16 and the last,
    `tokens` in all, in whole pages) is computed. Where the near share is at least `share`, for all query heads of a KV
    head, only near tokens are read. The paper's defaults are not verified.

    Formula:
        log far = log T + q.mu / sqrt d + q^T Sigma q / (2 d); near only if near / (near + far) >= share.
    """

    name = "local"
    title = "Local or global heads, by the moments of their keys"
    paper = "arXiv 2502.09647"
    reader = LocalOrGlobalReader
    keeps_state = True
    prepares = True
    with_policies = False

    class Args(SelectorArgs):
        min_context: int = shortest(98304)
        share: float = Field(0.95, gt=0, lt=1, description="Near share from which far tokens aren't read.")

    args: Args

    @property
    def threshold(self) -> float:
        return self.args.share
