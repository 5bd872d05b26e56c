"""Which models' rotation the worker takes for one that can be undone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope, phi3_long_rope_scaled_rope

from attention_plugins.vllm_adapter.rotary import UnknownRotary, find_rotary

DIM, LENGTH = 32, 128
PLAIN: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 64,
}
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * (DIM // 2),
    "long_factor": [2.0] * (DIM // 2),
    "original_max_position_embeddings": 64,
}
SEVERAL_AXES: dict[str, Any] = {**PLAIN, "mrope_section": [8, 4, 4]}


def rope(parameters: dict[str, Any], *, neox: bool = True) -> nn.Module:
    with set_current_vllm_config(VllmConfig()):
        return get_rope(DIM, LENGTH, neox, parameters, dtype=torch.float32)


class Block(nn.Module):
    """Attention as vLLM's models have it: what rotates, and what attends."""

    def __init__(self, rotary: nn.Module | None) -> None:
        super().__init__()
        self.qkv, self.rotary_emb, self.attn = nn.Linear(1, 1), rotary, nn.Identity()


class Model(nn.Module):
    def __init__(self, *rotaries: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(rotary) for rotary in rotaries)

    @property
    def attention(self) -> list[nn.Module]:
        return [block.attn for block in self.layers]  # type: ignore[misc]


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize(
    "parameters",
    [PLAIN, {**PLAIN, "partial_rotary_factor": 0.5}, LLAMA3, YARN],
    ids=["plain", "partial", "llama3", "yarn"],
)
def test_what_vllm_rotates_is_rotated_back(parameters: dict[str, Any], neox: bool) -> None:
    embedding = rope(parameters, neox=neox)
    model = Model(embedding, embedding)
    rotary = find_rotary(model, model.attention, "llama")
    assert rotary.neox is neox and rotary.table is embedding.cos_sin_cache
    positions, plain = torch.tensor([0, 3, 90, 127]), torch.randn(4, 2, DIM)
    rotated, _ = embedding.forward_native(positions, plain.flatten(1).clone(), None)  # type: ignore[operator]
    torch.testing.assert_close(rotary.rotate(plain, positions[:, None]), rotated.view_as(plain))
    torch.testing.assert_close(rotary.unrotate(rotated.view_as(plain), positions[:, None]), plain)


@pytest.mark.parametrize(
    ("rotaries", "kind", "why"),
    [
        ([PLAIN, None], "llama", "layers without a rotary embedding"),
        ([None, None], "opt", "layers without a rotary embedding"),
        ([PLAIN, LLAMA3], "llama", "different rotary embeddings"),
        ([SEVERAL_AXES, SEVERAL_AXES], "qwen2_vl", "MRotaryEmbedding.* is not a table"),
        ([PLAIN, PLAIN], "cohere2", "models of type cohere2"),
        ([PLAIN, PLAIN], "llama4_text", "models of type llama4_text"),
    ],
)
def test_other_rotations_are_refused_by_name(rotaries: list[dict[str, Any] | None], kind: str, why: str) -> None:
    made = {id(parameters): rope(parameters) for parameters in rotaries if parameters}
    model = Model(*(made.get(id(parameters)) for parameters in rotaries))
    with pytest.raises(UnknownRotary, match=why):
        find_rotary(model, model.attention, kind)


def test_switched_tables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """LongRoPE looks up in one of two tables."""
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=LENGTH))
    monkeypatch.setattr(phi3_long_rope_scaled_rope, "get_current_vllm_config", lambda: config)
    embedding = rope(LONG)
    model = Model(embedding)
    with pytest.raises(UnknownRotary, match="rotary embedding"):
        find_rotary(model, model.attention, "phi3")


def test_attention_that_is_elsewhere_is_refused() -> None:
    """transformers' models under vLLM: attention layers in a list of their own, a rotary embedding of transformers'."""
    model = Model(rope(PLAIN))
    with pytest.raises(UnknownRotary, match="not where its rotary embedding is"):
        find_rotary(model, [*model.attention, nn.Identity()], "llama")
