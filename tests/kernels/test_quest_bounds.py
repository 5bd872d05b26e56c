"""Bounds are stored in 8 bits: the kernel's own rounding is torch's, to the bit."""

from __future__ import annotations

import math

import pytest
import torch

from attention_plugins.naive.quest import BOUNDS, as_bounds, page_bounds, write_bounds
from tests.kernels.selector_batch import Batch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from attention_plugins.kernels.quest import _as_bounds  # noqa: E402

# The interpreter's numpy warns of infinities and NaNs, which belong to these numbers.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@triton.jit
def _round_all(numbers, out, N: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, N)
    tl.store(out + place, _as_bounds(tl.load(numbers + place)))


def numbers_of_all_kinds(count: int) -> torch.Tensor:
    """Every number that bounds can be, those in the middle between two, what is no number, and random ones."""
    codes = torch.arange(127, dtype=torch.uint8).view(BOUNDS).float()
    middle = (codes[1:] + codes[:-1]) / 2
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp2(torch.randint(-14, 11, (count,), generator=generator).float())
    numbers = torch.randn(count, generator=generator) * scale
    odd = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40])
    special = torch.cat([codes, -codes, middle, -middle, odd])
    numbers[: len(special)] = special
    return numbers


def test_the_kernel_rounds_as_torch_does(device: torch.device) -> None:
    numbers = numbers_of_all_kinds(8192)
    found = torch.zeros(8192, dtype=BOUNDS, device=device)
    _round_all[(1,)](numbers.to(device), found, N=8192)
    assert found.cpu().view(torch.uint8).tolist() == as_bounds(numbers).view(torch.uint8).tolist()


def test_rounding_keeps_the_order() -> None:
    """So bounds that grow token by token are those of the whole page, whatever order the tokens come in."""
    numbers = numbers_of_all_kinds(8192)
    ordered = as_bounds(numbers[~numbers.isnan()].sort().values).float()
    assert (ordered.diff() >= 0).all()


def test_a_bound_is_at_most_a_sixteenth_short() -> None:
    """Between the smallest normal number and the largest one."""
    batch = Batch(dtype=torch.float32)
    bounds = page_bounds(len(batch.cache.pages), batch.dim)
    write_bounds(bounds, batch.cache, *batch.all_pages())
    for row, length in enumerate(given.length for given in batch.given):
        if length:
            keys, slots = batch.keys[row][0][: batch.page], batch.slots[row][0]
            low, high = bounds[int(slots[0]) // batch.page].float()
            for found, real in ((low, keys.amin(0)), (high, keys.amax(0))):
                assert ((found - real).abs() <= real.abs().clamp(min=2**-6) / 16).all()
