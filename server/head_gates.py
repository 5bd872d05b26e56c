"""Head gates without training: how much of each KV head's attention lies outside sinks and recent tokens.

DuoAttention (arXiv 2410.10819) learns its gates. This is a substitute that needs a few long prompts: a head whose last
queries look into the middle of a prompt is taken for a retrieval head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kvcache.scorers import mean_probabilities
from server.errors import StartError

_ATTENTION = "longreach_head_gates"


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
        attention = mean_probabilities(queries, keys, scale)
        return attention[..., self.sinks : keys.shape[1] - max(self.recent, self.window)].sum(-1).amax(-1)


@contextmanager
def _watched(model: Any, reach: Reach, found: dict[int, torch.Tensor]) -> Iterator[None]:
    """While this holds, a forward pass of one prompt leaves each layer's far mass in `found`."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **rest: Any) -> Any:
        queries = query[0, :, -reach.window :].transpose(0, 1)
        found[module.layer_idx] = reach.far_mass(queries, key[0], scaling).cpu()
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **rest)

    AttentionInterface.register(_ATTENTION, attend)
    before = model.config._attn_implementation
    model.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def measure(model: Any, prompts: list[list[int]], reach: Reach) -> list[list[float]]:
    """Gates by layer and KV head, spread over 0 ... 1: the mean over prompts, lowest head 0, highest 1.

    Args:
        model: a causal language model of transformers, all of whose layers attend to everything.
        prompts: token ids.

    Raises:
        StartError: a prompt is too short to tell near from far.
    """
    total: torch.Tensor | None = None
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) < reach.shortest:
            raise StartError(f"prompt {number} has {len(prompt)} tokens; at least {reach.shortest} are needed")
        found: dict[int, torch.Tensor] = {}
        with _watched(model, reach, found):
            # The body alone: logits of a long prompt would take gigabytes.
            model.base_model(torch.tensor([prompt], device=model.device), use_cache=False)
        masses = torch.stack([found[layer] for layer in sorted(found)]).double()
        total = masses if total is None else total + masses
    if total is None:
        raise StartError("head gates need at least one prompt")
    low, high = total.min(), total.max()
    return ((total - low) / (high - low).clamp(min=1e-12)).tolist()


def gates_of_texts(model_path: str, texts: list[str], reach: Reach) -> list[list[float]]:
    """Load a model, on a GPU if there is one, and measure its gates on these user messages.

    Raises:
        StartError: the model can't be loaded, or a prompt is too short.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from server.errors import one_line

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto").to(device).eval()
    except (OSError, ValueError) as error:
        raise StartError(f"{model_path} can't be loaded: {one_line(error)}") from error
    return measure(model, [_tokens(tokenizer, text) for text in texts], reach)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    """A prompt as a server renders it: with the chat template where the model has one."""
    if tokenizer.chat_template is None:
        return list(tokenizer(text)["input_ids"])
    message = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
