"""Rotations done as transformers does them, and undone."""

from __future__ import annotations

import cmath
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as interleaved_rope
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kvcache.rotary import Rotary
from tests.kvcache.brute_force import turned
from tests.kvcache.synthetic import rotary_table

POSITIONS = torch.tensor([0, 1, 5, 17, 300, 1023])
# The embedded model's, and Llama 3's and a YaRN scaling over it.
EMBEDDED: dict[str, Any] = {"rope_type": "default", "rope_theta": 100_000.0}
SCALED: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 100_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
LONGER: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 100_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}


def transformers_rope(rope: dict[str, Any]) -> LlamaRotaryEmbedding:
    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=576,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=1024,
            rope_parameters=rope,
        )
    )


@pytest.mark.parametrize("rope", [EMBEDDED, SCALED, LONGER], ids=lambda rope: rope["rope_type"])
def test_transformers_rotation_is_done_and_undone(rope: dict[str, Any]) -> None:
    torch.manual_seed(0)
    queries = torch.randn(len(POSITIONS), 9, 64)
    embedding = transformers_rope(rope)
    cosines, sines = embedding(queries, POSITIONS[None])
    heads = queries.transpose(0, 1)[None]
    rotated = apply_rotary_pos_emb(heads, heads, cosines, sines)[0][0].transpose(0, 1)
    table = torch.cat([part[0, :, :32] for part in embedding(queries, torch.arange(1024)[None])], -1)
    rotary = Rotary(table, neox=True)
    torch.testing.assert_close(rotary.rotate(queries, POSITIONS[:, None]), rotated)
    torch.testing.assert_close(rotary.unrotate(rotated, POSITIONS[:, None]), queries)
    longer = rotated.norm(dim=-1) / queries.norm(dim=-1)
    assert bool((longer > 1.05).all()) == (rope is LONGER), "YaRN makes vectors longer"


def test_interleaved_pairs_of_a_part_of_the_head() -> None:
    """GPT-J's: neighbours are pairs, and the last numbers of a head are left alone."""
    torch.manual_seed(0)
    queries, table = torch.randn(len(POSITIONS), 3, 16), rotary_table(1024, 10, 10_000.0)
    cosines, sines = (part[None] for part in table[POSITIONS].chunk(2, -1))
    rotated = torch.cat((interleaved_rope(queries[None, ..., :10], sines, cosines)[0], queries[..., 10:]), -1)
    rotary = Rotary(table, neox=False)
    torch.testing.assert_close(rotary.rotate(queries, POSITIONS[:, None]), rotated)
    torch.testing.assert_close(rotary.unrotate(rotated, POSITIONS[:, None]), queries)
    assert torch.equal(rotary.unrotate(rotated, POSITIONS[:, None])[..., 10:], queries[..., 10:])


@pytest.mark.parametrize("rotary_dim", [2, 6, 8])
def test_a_part_of_the_head_in_halves(rotary_dim: int) -> None:
    torch.manual_seed(0)
    rotary, vector = Rotary(rotary_table(1024, rotary_dim, 50.0), neox=True), torch.randn(8)
    for position in POSITIONS.tolist():
        expected = torch.tensor(turned(vector.tolist(), position, rotary_dim, 50.0))
        torch.testing.assert_close(rotary.rotate(vector, torch.tensor(position)), expected)


def test_a_rounded_table_is_undone_exactly() -> None:
    """bfloat16 cosines and sines don't have length 1; what the model did with them is what must be undone."""
    torch.manual_seed(0)
    rotary = Rotary(rotary_table(1024, 8, 10_000.0).bfloat16(), neox=True)
    vectors = torch.randn(6, 8)
    rotated = rotary.rotate(vectors, POSITIONS)
    assert rotated.dtype == torch.float32 and (rotated.norm(dim=-1) - vectors.norm(dim=-1)).abs().max() > 1e-3
    torch.testing.assert_close(rotary.unrotate(rotated, POSITIONS), vectors, atol=1e-6, rtol=1e-6)


def test_the_mean_of_rotations() -> None:
    rotary, x = Rotary(rotary_table(100, 2, 1.0), neox=True), torch.tensor([[3.0, 4.0, 7.0]])
    mean = sum(cmath.exp(1j * position) for position in range(10, 30)) / 20 * (3 + 4j)
    found = rotary.rotate_on_average(x, 10, 30)
    torch.testing.assert_close(found, torch.tensor([[mean.real, mean.imag, 7.0]]))
    torch.testing.assert_close(rotary.rotate_on_average(x, 10, 11), rotary.rotate(x, torch.tensor(10)))
    # Where the table ends the model ends: no query will stand there.
    torch.testing.assert_close(rotary.rotate_on_average(x, 90, 500), rotary.rotate_on_average(x, 90, 100))
    torch.testing.assert_close(rotary.rotate_on_average(x, 100, 612), rotary.rotate(x, torch.tensor(99)))
