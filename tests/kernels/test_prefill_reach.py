"""AnchorAttention's estimates as kernels, against their plain twins."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from attention_plugins.kernels import prefill as kernels
from attention_plugins.prefill import plain
from attention_plugins.prefill.reach import groups
from tests.kernels.prefill_chunk import DTYPES, Case

# The interpreter's numpy warns of infinities and NaNs, which belong here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CASES = [
    Case(1, 1),
    Case(130, 130),
    Case(64, 700, group=4),
    Case(520, 1035, group=3),
    Case(300, 999, kv_heads=1, group=1, dim=32, page=32),
    Case(260, 600, dim=24, page=8),
    Case(256, 768, page=128),
    Case(140, 420, kv_heads=1, group=3, dim=256),
]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("span", [128, 384, 4096])
def test_reach(case: Case, span: int, dtype: torch.dtype, device: torch.device) -> None:
    chunk, expected = replace(case, dtype=dtype).make(device)
    anchors = plain.near_maxima(expected, span)
    atol = TOLERANCE[dtype]
    torch.testing.assert_close(kernels.near_maxima(chunk, span), anchors, rtol=0, atol=atol)
    found, wanted = kernels.group_slack(chunk, anchors, span), plain.group_slack(expected, anchors, span)
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def test_many_blocks_in_a_group(device: torch.device) -> None:
    """More than are multiplied at once."""
    chunk, expected = Case(128 * 21, 128 * 25, kv_heads=1).make(device)
    anchors = torch.zeros(2, 21, device=device)
    found, wanted = kernels.group_slack(chunk, anchors, 128 * 20), plain.group_slack(expected, anchors, 128 * 20)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_fp8_keys(device: torch.device) -> None:
    case = Case(200, 600, dtype=torch.float16)
    chunk, expected = case.make(device)
    assert isinstance(expected.keys, torch.Tensor)
    stored = (expected.keys / 0.5).to(torch.float8_e4m3fn)
    chunk = replace(chunk, keys=case.paged(stored.view(torch.uint8), 0.5))
    expected = replace(expected, keys=(stored.float() * 0.5).half())
    anchors = plain.near_maxima(expected, 256)
    torch.testing.assert_close(kernels.near_maxima(chunk, 256), anchors, rtol=0, atol=2e-2)
    found, wanted = kernels.group_slack(chunk, anchors, 256), plain.group_slack(expected, anchors, 256)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-2)


@pytest.mark.parametrize("position", [5, 200, 450, 599])
def test_numbers_that_are_none(position: int, device: torch.device) -> None:
    chunk, expected = Case(200, 600).make(device)
    assert isinstance(expected.keys, torch.Tensor)
    keys = expected.keys.clone()
    keys[1, position] = float("nan")
    chunk, expected = replace(chunk, keys=Case(200, 600).paged(keys)), replace(expected, keys=keys)
    found, wanted = (ops.near_maxima(one, 256) for ops, one in ((kernels, chunk), (plain, expected)))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4, equal_nan=True)
    assert not wanted[:2].isnan().any() and wanted[2:].isnan().any() == (position != 200)
    slack, wanted_slack = (ops.group_slack(one, wanted, 256) for ops, one in ((kernels, chunk), (plain, expected)))
    torch.testing.assert_close(slack, wanted_slack, rtol=0, atol=1e-4)
    assert wanted_slack[2:].isposinf().any() and not wanted_slack[:2].isposinf().any()


@pytest.mark.parametrize("case", [Case(300, 999), Case(200, 1035, page=8), Case(517, 1100, page=32), Case(130, 130)])
@pytest.mark.parametrize("span", [128, 256, 2048])
def test_group_plan(case: Case, span: int, device: torch.device) -> None:
    chunk, _ = case.make(device)
    shape = 4, len(groups(chunk.grid, span)), chunk.grid.k_units
    chosen = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.1).to(device)
    assert torch.equal(*(ops.group_plan(chunk, chosen, span).mask for ops in (kernels, plain)))
