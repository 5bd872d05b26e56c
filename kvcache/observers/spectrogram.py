"""Spectrograms of the attention that each token gets."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from kvcache.evidence import LayerEvidence, dequantise
from kvcache.model import ModelFacts
from kvcache.namm import FREQUENCIES
from kvcache.observers.base import Observer

PERIOD = 512
"""Queries between two updates."""
N_FFT, HOP = 32, 16
DECAY = 0.99
# Bounds the memory of the STFT: samples taken together, 4 bytes each, in about five copies.
_MAX_SAMPLES = 1 << 22


class Spectrogram(Observer):
    """How the attention to each token fluctuates: magnitudes of 17 frequencies, by layer and KV head (NAMM).

    Every 512 queries each token's column of attention (the mean over the query heads of a KV head; 0 for queries
    before it) goes through an STFT (32 samples, hop 16, Hann, centred: 17 frequencies in 33 frames), and the frames
    one after the other into a moving average that starts at 0 (`m <- 0.99 m + 0.01 frame`). What is left at the
    prompt's end makes a shorter update.

    This is the reference path, and slow: full attention of 512 queries to all tokens is computed once more, one query
    head at a time, O(n^2) over the prompt. Queries are kept until an update is due, so any chunks give the very same.
    """

    name = "spectrogram"

    def __init__(self, num_layers: int, prompt_len: int, model: ModelFacts) -> None:
        super().__init__(num_layers, 0, prompt_len)
        self.num_layers, self.model, self.period = num_layers, model, PERIOD
        self._waiting: torch.Tensor | None = None
        self._average: torch.Tensor | None = None

    @staticmethod
    def nbytes(num_layers: int, num_heads: int, num_kv_heads: int, head_dim: int, prompt_len: int) -> int:
        """Memory of one prompt, and of an update."""
        waiting = num_layers * PERIOD * num_heads * head_dim * 2
        average = num_layers * num_kv_heads * prompt_len * FREQUENCIES * 4
        update = 4 * PERIOD * prompt_len * 4 + 5 * _MAX_SAMPLES * 4 + num_kv_heads * prompt_len * head_dim * 4
        return waiting + average + update

    def observe(
        self, layer: int, position: int, queries: torch.Tensor, so_far: Callable[[], LayerEvidence] | None
    ) -> None:
        if so_far is None:
            raise RuntimeError("spectrograms need the prompt's keys beside its queries")
        if self._waiting is None:
            self._waiting = queries.new_empty(self.num_layers, self.period, *queries.shape[1:])
        while len(queries):
            slot = position % self.period
            taken = queries[: self.period - slot]
            self._waiting[layer, slot : slot + len(taken)] = taken
            queries, position = queries[len(taken) :], position + len(taken)
            if position % self.period == 0 or position == self.end:
                waiting = self._waiting[layer, : slot + len(taken)]
                self._update(layer, position, dequantise(waiting, self.model.query_scale(layer)), so_far())

    def found(self, layer: int) -> torch.Tensor:
        """float32 [num_kv_heads, prompt_len, FREQUENCIES]."""
        if self._average is None:
            raise RuntimeError("no query has come yet")
        return self._average[layer]

    def _update(self, layer: int, end: int, queries: torch.Tensor, evidence: LayerEvidence) -> None:
        """Take in the attention of `queries` [m, num_heads, head_dim], the last ones before position `end`."""
        num_kv_heads = evidence.shape[0]
        if self._average is None:
            size = (self.num_layers, num_kv_heads, self.end, FREQUENCIES)
            self._average = torch.zeros(size, device=queries.device)
        grouped = queries.float().unflatten(1, (num_kv_heads, -1))
        for head in range(num_kv_heads):
            columns = attention_columns(grouped[:, head], evidence.keys[head, :end].float(), evidence.scale)
            step = max(1, _MAX_SAMPLES // (2 * max(len(columns), N_FFT)))
            for start in range(0, end, step):
                tokens = self._average[layer, head, start : min(start + step, end)]
                tokens.copy_(averaged(tokens, magnitudes(columns[:, start : start + step].T)))


def attention_columns(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the last m queries, mean over their heads: float32 [m, n].

    Args:
        queries: float32 [m, group, head_dim]; keys: float32 [n, head_dim].
    """
    m, group, _ = queries.shape
    n = len(keys)
    columns = keys.new_zeros(m, n)
    for head in range(group):
        logits = queries[:, head] @ keys.T * scale
        future = torch.ones_like(logits, dtype=torch.bool).triu_(n - m + 1)
        columns += logits.masked_fill_(future, float("-inf")).softmax(-1)
    return columns / group


def magnitudes(signals: torch.Tensor) -> torch.Tensor:
    """Of the STFT: float32 [rows, FREQUENCIES, 1 + samples // HOP].

    Args:
        signals: float32 [rows, samples]; zeros go before fewer than 32.
    """
    if (missing := N_FFT - signals.shape[1]) > 0:
        signals = F.pad(signals, (missing, 0))
    window = torch.hann_window(N_FFT, device=signals.device)
    return torch.stft(signals, N_FFT, HOP, window=window, center=True, return_complex=True).abs()


def averaged(before: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """The moving average [rows, FREQUENCIES] after these frames [rows, FREQUENCIES, number]."""
    number = frames.shape[-1]
    weights = (1 - DECAY) * DECAY ** torch.arange(number - 1, -1, -1, device=frames.device)
    return DECAY**number * before + frames @ weights
