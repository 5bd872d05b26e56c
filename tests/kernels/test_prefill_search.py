"""HiP's search as one kernel, against its plain twin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from attention_plugins.kernels import prefill as kernels
from attention_plugins.prefill import plain
from tests.kernels.prefill_chunk import Case

# The interpreter's numpy warns of infinities and NaNs, which belong here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CASES = [
    Case(130, 700),
    Case(40, 700, group=3, page=8),
    Case(300, 999, kv_heads=3, group=1, dim=32, page=32),
    Case(130, 600, dim=24, group=8),
    Case(140, 420, kv_heads=1, group=3, dim=256),
]


def starts_of(case: Case, size: int, heads: int, device: torch.device) -> torch.Tensor:
    """Of chunks in any order, other ones for each block; the last may reach behind the last key."""
    generator, chunks = torch.Generator().manual_seed(size), -(-case.k_len // size)
    drawn = torch.randint(chunks, (heads, -(-case.q_len // 128), min(70, 2 * chunks)), generator=generator)
    return (drawn * size).to(device)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [256, 32, 8, 1])
@pytest.mark.parametrize(("stride", "share_heads"), [(4, True), (4, False), (3, True)])
def test_search(case: Case, size: int, stride: int, share_heads: bool, device: torch.device) -> None:
    chunk, expected = case.make(device)
    starts = starts_of(case, size, 1 if share_heads else case.kv_heads, device)
    found, wanted = (
        ops.best_of_chunks(one, starts, size, stride, share_heads) for ops, one in ((kernels, chunk), (plain, expected))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_half(device: torch.device) -> None:
    """Keys whose products are far enough from each other to be ranked alike in float16."""
    chunk, expected = Case(130, 700, dtype=torch.float16).make(device)
    starts = starts_of(Case(130, 700), 2, 1, device)
    found, wanted = (ops.best_of_chunks(one, starts, 2, 4, True) for ops, one in ((kernels, chunk), (plain, expected)))
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


def test_fp8_keys(device: torch.device) -> None:
    case = Case(130, 300, dtype=torch.float16)
    chunk, expected = case.make(device)
    assert isinstance(expected.keys, torch.Tensor)
    stored = (expected.keys / 0.5).to(torch.float8_e4m3fn)
    chunk = replace(chunk, keys=case.paged(stored.view(torch.uint8), 0.5))
    expected = replace(expected, keys=(stored.float() * 0.5).half())
    starts = starts_of(case, 2, 1, device)
    found, wanted = (ops.best_of_chunks(one, starts, 2, 4, True) for ops, one in ((kernels, chunk), (plain, expected)))
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("share_heads", [True, False])
def test_numbers_that_are_none(share_heads: bool, device: torch.device) -> None:
    chunk, expected = Case(130, 700).make(device)
    assert isinstance(expected.keys, torch.Tensor)
    keys = expected.keys.clone()
    keys[1, 300] = float("nan")
    chunk, expected = replace(chunk, keys=Case(130, 700).paged(keys)), replace(expected, keys=keys)
    starts = torch.arange(0, 700, 2, device=device).expand(1 if share_heads else 2, 2, -1)
    found, wanted = (
        ops.best_of_chunks(one, starts, 2, 4, share_heads) for ops, one in ((kernels, chunk), (plain, expected))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert wanted[-1].isnan().any() and (share_heads or not wanted[0].isnan().any())
