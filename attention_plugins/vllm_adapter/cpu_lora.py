"""vLLM's LoRA on CPUs, with adapters only for those who asked for them."""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class OwnAdapters(PunicaWrapperCPU):
    """vLLM marks rows without an adapter by -1, and its CPU operators look that up as the last adapter's place. So in a
    batch with any adapter, requests of the base model were answered with somebody's weights, and the prefix cache kept
    their keys. Here such rows get nothing added."""

    def _shrink_prefill(self, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float) -> None:
        super()._shrink_prefill(y, x, w_t_all, scale)
        y[self.token_lora_indices < 0] = 0

    def _shrink_decode(self, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float) -> None:
        super()._shrink_decode(y, x, w_t_all, scale)
        y[self.token_lora_indices < 0] = 0

    def add_lora_embedding(self, y: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        super().add_lora_embedding(y, x.masked_fill(self.token_lora_indices[:, None] < 0, 0), *args, **kwargs)

    def add_lora_logits(self, y: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        alone = self.sampler_indices < 0
        if alone.all():  # also where `y` isn't what is sampled but a prompt, whose rows vLLM doesn't tell
            return
        before = y[alone]
        super().add_lora_logits(y, *args, **kwargs)
        y[alone] = before


def keep_adapters_apart(model_runner: Any) -> None:
    """Give a runner's LoRA layers, if it has any, these operators, in place; they have no state of their own."""
    if manager := getattr(model_runner, "lora_manager", None):
        for wrapper in manager._adapter_manager.punica_wrapper_mapping.values():
            wrapper.__class__ = OwnAdapters
