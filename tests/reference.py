"""The model's answer by transformers, in plain torch, with evicted columns masked: what compression must equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM

_masks: list[torch.Tensor] | None = None
Reads = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, queries [num_kv_heads, group, d] times the scale, keys [num_kv_heads, n, d]) -> bool [num_kv_heads, n]."""
_reads: Reads | None = None
Watches = Callable[[int, torch.Tensor, torch.Tensor], None]
"""(layer, queries [num_kv_heads, group, n, d] times the scale, keys [num_kv_heads, n, d]) of a prompt."""
_watches: Watches | None = None
Attends = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, queries [q, num_heads, d], keys, values [num_kv_heads, n, d]) -> [q, num_heads, d]."""
_attends: Attends | None = None


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention; in full-attention layers, columns where `_masks`, while it is set, is False are not seen.

    query [1, num_heads, q, d], key and value [1, num_kv_heads, n, d]; masks bool [num_kv_heads, prompt_len], one for
    each full-attention layer; s_aux [num_heads], learned sinks.
    """
    if _attends is not None:
        return _attends(module.layer_idx, query[0].transpose(0, 1), key[0], value[0])[None], None
    group = query.shape[1] // key.shape[1]
    q, n = query.shape[2], key.shape[2]
    if _watches is not None:
        _watches(module.layer_idx, query[0].unflatten(0, (-1, group)) * scaling, key[0])
    columns, rows = torch.arange(n), torch.arange(n - q, n)[:, None]
    visible = columns <= rows
    if sliding_window:  # of such layers, the cache holds the last columns alone
        visible &= columns > rows - sliding_window
    visible = visible.expand(key.shape[1], q, n).clone()
    if not sliding_window:
        layer = _full_layers(module.config).index(module.layer_idx)
        if _masks is not None:
            mask = _masks[layer]
            visible[:, :, : mask.shape[1]] &= mask[:, None, :]
        if _reads is not None:
            queries = query[0, :, 0].unflatten(0, (-1, group)) * scaling
            visible[:, 0] &= _reads(layer, queries, key[0])
    visible = visible.repeat_interleave(group, 0)
    logits = query[0] @ key[0].repeat_interleave(group, 0).transpose(1, 2) * scaling
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    logits = logits.masked_fill(~visible, float("-inf"))
    if s_aux is not None:
        logits = torch.cat([logits, s_aux[:, None, None].expand(-1, q, 1).to(logits)], -1)
    output = logits.softmax(-1)[..., :n] @ value[0].repeat_interleave(group, 0)
    return output.transpose(0, 1)[None], None


AttentionInterface.register("longreach_reference", _attention)


def _full_layers(config: Any) -> list[int]:
    """The layers whose caches shrink."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [index for index, kind in enumerate(kinds) if kind == "full_attention"]


def _mask(kept: list[torch.Tensor], length: int, tail_from: int) -> torch.Tensor:
    """bool [num_kv_heads, length], whether a column is seen: kept ones, and all from `tail_from` on."""
    mask = torch.zeros(len(kept), length, dtype=torch.bool)
    for row, positions in zip(mask, kept, strict=True):
        row[positions] = True
    mask[:, tail_from:] = True
    return mask


class Reference:
    """A causal LM in float32 whose decoding sees only kept prompt columns."""

    def __init__(self, model: str, dtype: torch.dtype = torch.float32) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation="longreach_reference"
        ).eval()

    @torch.inference_mode()
    def greedy_compacted(
        self, prompt: list[int], max_tokens: int, compactions: list[tuple[int, list[list[torch.Tensor]]]], page: int
    ) -> list[int]:
        """Greedy tokens where columns are dropped again and again.

        Args:
            prompt: token ids.
            compactions: (boundary, kept positions by layer and KV head): tokens from the boundary on see these, and
                what stands in pages that weren't full there or came later.
            page: tokens of a page.
        """
        global _masks
        _masks, cache, known, done = None, None, list(prompt), 0
        boundaries = [boundary for boundary, _ in compactions]
        while len(known) < len(prompt) + max_tokens:
            for boundary, kept in compactions:
                if boundary == done:
                    _masks = [_mask(heads, boundary, boundary // page * page) for heads in kept]
            stop = min([len(known), *(boundary for boundary in boundaries if boundary > done)])
            output = self.model(torch.tensor([known[done:stop]]), past_key_values=cache, use_cache=True)
            cache, done = output.past_key_values, stop
            if done == len(known):
                known.append(int(output.logits[0, -1].argmax()))
        _masks = None
        return known[len(prompt) :]

    @torch.inference_mode()
    def greedy_reading(self, prompt: list[int], max_tokens: int, reads: Reads) -> list[int]:
        """Greedy tokens where each step after the prompt sees what `reads` says; its `prompt`, if it has one, is shown
        the prompt."""
        global _masks, _reads, _watches
        _masks, _watches = None, getattr(reads, "prompt", None)
        try:
            output = self.model(torch.tensor([prompt]), use_cache=True)
        finally:
            _watches = None
        tokens = [int(output.logits[0, -1].argmax())]
        _reads = reads
        try:
            while len(tokens) < max_tokens:
                output = self.model(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)
                tokens.append(int(output.logits[0, -1].argmax()))
        finally:
            _reads = None
        return tokens

    @torch.inference_mode()
    def greedy_planned(self, prompt: list[int], max_tokens: int, attends: Attends, chunk: int) -> list[int]:
        """Greedy tokens where the prompt, so many tokens at a time, is attended as `attends` says."""
        global _attends, _masks
        _masks, cache = None, None
        _attends = attends
        try:
            for first in range(0, len(prompt), chunk):
                piece = torch.tensor([prompt[first : first + chunk]])
                output = self.model(piece, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
        finally:
            _attends = None
        tokens = [int(output.logits[0, -1].argmax())]
        while len(tokens) < max_tokens:
            output = self.model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            tokens.append(int(output.logits[0, -1].argmax()))
        return tokens

    @torch.inference_mode()
    def greedy(
        self, prompt: list[int], max_tokens: int, kept: list[list[torch.Tensor]] | None = None, tail_from: int = 0
    ) -> tuple[list[int], list[torch.Tensor]]:
        """Greedy tokens and the logits before each.

        Args:
            prompt: token ids.
            kept: by layer and KV head, the kept positions below `tail_from`; None: dense.
            tail_from: from this position on every prompt token is kept.
        """
        global _masks
        _masks = None
        output = self.model(torch.tensor([prompt]), use_cache=True)
        logits = [output.logits[0, -1]]
        tokens = [int(logits[0].argmax())]
        if kept is not None:
            _masks = [_mask(heads, len(prompt), tail_from) for heads in kept]
        while len(tokens) < max_tokens:
            output = self.model(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits[0, -1])
            tokens.append(int(logits[-1].argmax()))
        _masks = None
        return tokens, logits
