"""The model's answer by transformers, in plain torch, with evicted columns masked: what compression must equal."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM

_masks: list[torch.Tensor] | None = None


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention; while `_masks` is set, columns where it is False are not seen.

    query [1, num_heads, q, d], key and value [1, num_kv_heads, n, d]; masks bool [num_kv_heads, prompt_len].
    """
    group = query.shape[1] // key.shape[1]
    q, n = query.shape[2], key.shape[2]
    visible = torch.arange(n) <= torch.arange(n - q, n)[:, None]
    visible = visible.expand(key.shape[1], q, n).clone()
    if _masks is not None:
        mask = _masks[module.layer_idx]
        visible[:, :, : mask.shape[1]] &= mask[:, None, :]
    visible = visible.repeat_interleave(group, 0)
    logits = query[0] @ key[0].repeat_interleave(group, 0).transpose(1, 2) * scaling
    output = logits.masked_fill(~visible, float("-inf")).softmax(-1) @ value[0].repeat_interleave(group, 0)
    return output.transpose(0, 1)[None], None


AttentionInterface.register("longreach_reference", _attention)


class Reference:
    """A causal LM in float32 whose decoding sees only kept prompt columns."""

    def __init__(self, model: str, dtype: torch.dtype = torch.float32) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation="longreach_reference"
        ).eval()

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
            _masks = []
            for heads in kept:
                mask = torch.zeros(len(heads), len(prompt), dtype=torch.bool)
                for row, positions in zip(mask, heads, strict=True):
                    row[positions] = True
                mask[:, tail_from:] = True
                _masks.append(mask)
        while len(tokens) < max_tokens:
            output = self.model(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits[0, -1])
            tokens.append(int(logits[-1].argmax()))
        _masks = None
        return tokens, logits
