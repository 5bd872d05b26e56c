"""Estimators of sparse prefill as kernels, against their plain twins."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from attention_plugins.kernels import prefill as kernels
from attention_plugins.prefill import plain
from tests.kernels.prefill_chunk import DTYPES, Case

# The interpreter's numpy warns of infinities and NaNs, which belong to these sums.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CASES = [
    Case(1, 1),
    Case(130, 130),
    Case(64, 700, group=4),
    Case(200, 1035, group=3),
    Case(300, 999, kv_heads=1, group=1, dim=32, page=32),
    Case(130, 600, dim=24),
    Case(140, 420, kv_heads=1, group=3, dim=256),
]
TOLERANCE = {torch.float32: (1e-4, 1e-6), torch.float16: (1e-2, 2e-3), torch.bfloat16: (5e-2, 2e-2)}


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [1, 33, 128])
def test_last_row_sums(case: Case, count: int, dtype: torch.dtype, device: torch.device) -> None:
    chunk, expected = replace(case, dtype=dtype).make(device)
    close(kernels.last_row_sums(chunk, count), plain.last_row_sums(expected, count), dtype)


def test_last_row_sums_of_many_splits(device: torch.device) -> None:
    chunk, expected = Case(128, 5000).make(device)
    close(kernels.last_row_sums(chunk, 128), plain.last_row_sums(expected, 128), torch.float32)


def test_more_rows_than_there_is_room_for(device: torch.device) -> None:
    with pytest.raises(ValueError, match="128"):
        kernels.last_row_sums(Case(300, 300).make(device)[0], 129)


def test_keys_that_are_no_pages(device: torch.device) -> None:
    with pytest.raises(ValueError, match="pages"):
        kernels.last_row_sums(Case(64, 64).make(device)[1], 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_column_sums(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    chunk, expected = replace(case, dtype=dtype).make(device)
    rows = torch.arange(0, case.q_len, 7, device=device)
    close(kernels.column_sums(chunk, rows), plain.column_sums(expected, rows), dtype)


@pytest.mark.parametrize("case", [Case(300, 999, group=3), Case(140, 5000)])
def test_column_sums_of_several_programs(case: Case, device: torch.device) -> None:
    chunk, expected = case.make(device)
    rows = torch.arange(case.q_len, device=device)
    close(kernels.column_sums(chunk, rows), plain.column_sums(expected, rows), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_pools(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    chunk, expected = replace(case, dtype=dtype).make(device)
    close(kernels.pooled_queries(chunk), plain.pooled_queries(expected), torch.float32)
    for block in (64, 128):
        close(kernels.pooled_keys(chunk, block), plain.pooled_keys(expected, block), torch.float32)
        close(kernels.block_logits(chunk, block), plain.block_logits(expected, block), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, Case(300, 4500), Case(128, 256)])
@pytest.mark.parametrize("stride", [8, 16, 32, 64, 128])
def test_antidiagonals(case: Case, stride: int, dtype: torch.dtype, device: torch.device) -> None:
    chunk, expected = replace(case, dtype=dtype).make(device)
    close(kernels.antidiagonal_masses(chunk, stride), plain.antidiagonal_masses(expected, stride), dtype)


@pytest.mark.parametrize("stride", [8, 128])
def test_antidiagonals_of_programs_with_rows_of_several_heads(stride: int, device: torch.device) -> None:
    chunk, expected = Case(1100, 2500, group=3).make(device)
    close(kernels.antidiagonal_masses(chunk, stride), plain.antidiagonal_masses(expected, stride), torch.float32)


def test_antidiagonals_of_a_few_heads_at_a_time(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk, expected = Case(200, 1035, kv_heads=3).make(device)
    for most in (1, 4 * 2 * 25 * 9 * 2):
        monkeypatch.setattr("attention_plugins.kernels.prefill.antidiagonals.BYTES", most)
        found = kernels.antidiagonal_masses(chunk, 8)
        close(found, plain.antidiagonal_masses(expected, 8), torch.float32)


@pytest.mark.parametrize("page", [8, 128])
def test_tiles_of_several_pages_and_pages_of_several_tiles(page: int, device: torch.device) -> None:
    chunk, expected = Case(300, 700, page=page).make(device)
    close(kernels.antidiagonal_masses(chunk, 16), plain.antidiagonal_masses(expected, 16), torch.float32)


@pytest.mark.parametrize("name", ["last_row_sums", "column_sums", "antidiagonal_masses", "pooled_keys"])
def test_fp8_keys(name: str, device: torch.device) -> None:
    """Bytes in the cache, multiplied by a scale."""
    case = Case(100, 300, dtype=torch.float16)
    chunk, expected = case.make(device)
    assert isinstance(expected.keys, torch.Tensor)
    stored = (expected.keys / 0.5).to(torch.float8_e4m3fn)
    chunk = replace(chunk, keys=case.paged(stored.view(torch.uint8), 0.5))
    expected = replace(expected, keys=(stored.float() * 0.5).half())
    more = torch.arange(0, 100, 3, device=device) if name == "column_sums" else 64 if name == "last_row_sums" else 8
    close(getattr(kernels, name)(chunk, more), getattr(plain, name)(expected, more), torch.float16)


@pytest.mark.parametrize("name", ["last_row_sums", "column_sums", "antidiagonal_masses"])
def test_numbers_that_are_none(name: str, device: torch.device) -> None:
    """A key that isn't a number spoils the softmax of its own head alone."""
    chunk, expected = Case(200, 600).make(device)
    assert isinstance(expected.keys, torch.Tensor)
    keys = expected.keys.clone()
    keys[1, 300] = float("nan")
    more = torch.arange(0, 200, 3, device=device) if name == "column_sums" else 128 if name == "last_row_sums" else 8
    chunk, expected = replace(chunk, keys=Case(200, 600).paged(keys)), replace(expected, keys=keys)
    found, wanted = getattr(kernels, name)(chunk, more), getattr(plain, name)(expected, more)
    heads = 1 if name == "last_row_sums" else 0
    (clean, spoilt), (clean_wanted, spoilt_wanted) = (both.chunk(2, heads) for both in (found, wanted))
    close(clean, clean_wanted, torch.float32)
    assert spoilt.isnan().any() and spoilt_wanted.isnan().any()
