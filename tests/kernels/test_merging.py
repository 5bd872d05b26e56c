"""Merging is plain torch; on a GPU it must give what it gives on a CPU, and the same bits every time."""

from __future__ import annotations

import pytest
import torch

from kvcache.merging import Merger, MergeRule

ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@ON_CUDA
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rule", ["paper", "scatter"])
def test_merging_on_a_gpu(rule: MergeRule, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(4, 3000, 64, generator=generator).to(dtype) for _ in range(2))
    order = torch.stack([torch.randperm(3000, generator=generator) for _ in range(4)])
    kept, dropped = order[:, :400].sort(-1).values, order[:, 400:].sort(-1).values
    on_gpu = [tensor.to(device) for tensor in (keys, values, kept, dropped)]
    # All are merged, so that rounding doesn't decide which.
    expected = Merger(rule, -2.0).merge(keys, values, kept, dropped)
    found = Merger(rule, -2.0).merge(*on_gpu)
    for got, wanted in zip(found, expected, strict=True):
        # A dropped token with two kept ones of the same similarity may go to either.
        close = torch.isclose(got.cpu().float(), wanted.float(), rtol=1e-2, atol=1e-2).all(-1)
        assert close.float().mean() > 0.99
    for got, again in zip(found, Merger(rule, -2.0).merge(*on_gpu), strict=True):
        assert torch.equal(got, again)
