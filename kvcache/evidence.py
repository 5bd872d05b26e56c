"""What a scorer may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from types import MappingProxyType

import torch

from kvcache.model import UNKNOWN, ModelFacts
from kvcache.pages import PageCodec, PageGeometry


class Evidence(StrEnum):
    """The costliest thing a policy needs, cheapest first (algorithms: 'evidence lattice')."""

    NONE = "none"
    KEYS = "keys"
    QUERY_MOMENTS = "query moments"
    WINDOW_QUERIES = "last-w queries"
    COLUMN_SUMS = "column sums"
    SPECTROGRAMS = "attention spectrograms"

    @staticmethod
    def costliest(*needs: Evidence) -> Evidence:
        """The one that includes all of these."""
        return max(needs, key=list(Evidence).index)


@dataclass(frozen=True)
class QuantScales:
    """What one layer's stored numbers are multiplied with: 1.0 unless the KV cache is quantised (fp8)."""

    query: float = 1.0
    key: float = 1.0
    value: float = 1.0


POSITIONS, HISTORY = "positions", "history"
"""Names in `LayerEvidence.observed` that no observer has."""


class LayerEvidence:
    """What one layer of one request knows when its prompt is done, or an interval of its answer ("prompt" then means
    the tokens that were kept, and those that came since).

    Attributes:
        layer: index of the layer.
        keys: [num_kv_heads, prompt_len, head_dim], post-RoPE; the model's dtype, float32 where the cache is fp8.
        values: the same shape.
        window_queries: [window, num_heads, head_dim], post-RoPE, or None for policies that don't ask for it.
        scale: softmax scale (1/sqrt(head_dim) in most models).
        observed: what the policy's observers found, by their names (see `kvcache.observers`).
        model: what is known of the model.
    """

    def __init__(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        window_queries: torch.Tensor | None,
        scale: float,
        observed: Mapping[str, torch.Tensor] = MappingProxyType({}),
        model: ModelFacts = UNKNOWN,
    ) -> None:
        self.layer, self.keys, self.values = layer, keys, values
        self.window_queries, self.scale, self.observed, self.model = window_queries, scale, observed, model

    @cached_property
    def window_attention(self) -> torch.Tensor:
        """What the window's queries give to each earlier token, their mean: float32 [num_heads, prompt_len - w].

        Raises:
            ValueError: the evidence has no queries.
        """
        from kvcache.scorers import window_probabilities

        return window_probabilities(self)

    @property
    def column_sums(self) -> torch.Tensor:
        """What each token got from all of the prompt's queries (see `kvcache.observers.column_sums`): float32
        [num_kv_heads, prompt_len].

        Raises:
            ValueError: nothing observed them.
        """
        if "column_sums" not in self.observed:
            raise ValueError("the prompt's column sums are needed and were not observed")
        return self.observed["column_sums"]

    @cached_property
    def watched_attention(self) -> torch.Tensor:
        """What each of the window's queries gives to each token: float32 [num_kv_heads, w, n].

        Raises:
            ValueError: the evidence has no queries.
        """
        from kvcache.usage_tracking import watched_attention

        return watched_attention(self)

    @property
    def shape(self) -> tuple[int, int, int]:
        """num_kv_heads, prompt_len, head_dim."""
        num_kv_heads, prompt_len, head_dim = self.keys.shape
        return num_kv_heads, prompt_len, head_dim

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @cached_property
    def positions(self) -> torch.Tensor:
        """Where each token stood: int64 [num_kv_heads, n], ascending; without gaps in a prompt."""
        if POSITIONS in self.observed:
            return self.observed[POSITIONS]
        num_kv_heads, n, _ = self.shape
        return torch.arange(n, device=self.device).expand(num_kv_heads, n)

    @property
    def history(self) -> torch.Tensor | None:
        """What the policy's `carry` said at the last compaction, of a prompt's tail too: float32 [num_kv_heads, n], NaN
        for tokens that came since; None at the first."""
        return self.observed.get(HISTORY)


class PagedEvidence(LayerEvidence):
    """Evidence that lies in pages: keys and values are read when a scorer asks for them, kernels read the pages."""

    def __init__(
        self,
        layer: int,
        pages: torch.Tensor,
        page_table: torch.Tensor,
        geometry: PageGeometry,
        codec: PageCodec,
        *,
        prompt_len: int,
        raw_queries: torch.Tensor | None,
        scale: float,
        quant: QuantScales,
        observed: Mapping[str, torch.Tensor] = MappingProxyType({}),
        model: ModelFacts = UNKNOWN,
    ) -> None:
        """
        Args:
            pages: the whole cache, [num_pages, 2 * page_size * head_dim].
            page_table: int64 [num_kv_heads, n], the layer's pages, in the order of their tokens.
            raw_queries: the window's queries of this layer as recorded, or None.
            quant: what raw queries, keys and values are multiplied with.
        """
        self.observed, self.model = observed, model
        self.layer, self.pages, self.page_table, self.geometry, self.codec = layer, pages, page_table, geometry, codec
        self.raw_queries, self.scale, self.quant = raw_queries, scale, quant
        self._prompt_len = prompt_len

    @cached_property
    def keys(self) -> torch.Tensor:  # type: ignore[override]
        return self._read(0, self.quant.key)

    @cached_property
    def values(self) -> torch.Tensor:  # type: ignore[override]
        return self._read(1, self.quant.value)

    @cached_property
    def window_queries(self) -> torch.Tensor | None:  # type: ignore[override]
        return None if self.raw_queries is None else dequantise(self.raw_queries, self.quant.query)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.geometry.num_kv_heads, self._prompt_len, self.geometry.head_dim

    @property
    def device(self) -> torch.device:
        return self.pages.device

    def _read(self, part: int, factor: float) -> torch.Tensor:
        content = self.codec.unpack(self.pages[self.page_table])[part]
        return dequantise(content.flatten(1, 2)[:, : self._prompt_len], factor)


def dequantise(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """Real numbers of stored ones: float32 of fp8 (which vLLM keeps as bytes), anything else as it is."""
    if tensor.element_size() > 1:
        return tensor
    return tensor.contiguous().view(torch.float8_e4m3fn).float() * factor


def quantise(tensor: torch.Tensor, factor: float, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `dequantise`: real numbers as a cache of `dtype` stores them; beyond fp8's range its largest."""
    if dtype.itemsize > 1:
        return tensor.to(dtype)
    most = torch.finfo(torch.float8_e4m3fn).max
    return (tensor.float() / factor).clamp(-most, most).to(torch.float8_e4m3fn).view(dtype)
