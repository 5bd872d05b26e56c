"""D2O's search for the most similar kept key by a kernel, against the naive twin on the same numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kvcache.merging import nearest
from kvcache.selection import left_over

pytest.importorskip("triton")
# The interpreter's numpy warns of infinities and NaNs, which belong to these keys.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Triton's interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


def fused(keys: torch.Tensor, kept: torch.Tensor, dropped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from kvcache.kernels.nearest_keys import nearest_fused

    return nearest_fused(keys, kept, dropped)


def draw(heads: int, n: int, dim: int, counts: list[int], seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Keys of any length, and what heads keep and drop of them; n fills rows up."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(heads, n, dim, generator=generator) * (0.1 + 9 * torch.rand(heads, n, 1, generator=generator))
    kept = torch.full((heads, max(counts)), n)
    for head, count in enumerate(counts):
        kept[head, :count] = torch.randperm(n, generator=generator)[:count].sort().values
    return keys, kept, left_over(kept, n, n - min(counts))


def assert_like_twin(keys: torch.Tensor, kept: torch.Tensor, dropped: torch.Tensor, device: torch.device) -> None:
    """The twin's similarities, and a kept key that has them: of two as similar either may be named."""
    expected, _ = nearest(keys, torch.zeros_like(keys), kept, dropped)
    found, slot = (part.cpu() for part in fused(keys.to(device), kept.to(device), dropped.to(device)))
    assert found.dtype == torch.float32 and slot.dtype == torch.int64 and found.shape == dropped.shape
    n, known = keys.shape[1], expected > -math.inf
    assert torch.equal(found[dropped < n] > -math.inf, known[dropped < n])
    torch.testing.assert_close(found[known], expected[known], atol=1e-5, rtol=0)
    unit = F.normalize(keys.double(), dim=-1)
    heads = torch.arange(len(keys))[:, None]
    to = kept.gather(1, slot)
    assert (to[known] < n).all()
    named = (unit[heads, to.clamp(max=n - 1)] * unit[heads, dropped.clamp(max=n - 1)]).sum(-1)
    torch.testing.assert_close(named[known], expected[known].double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 24, 64, 128])
@pytest.mark.parametrize(("n", "counts"), [(2, [1, 1]), (140, [3, 3]), (400, [130, 257])], ids=str)
def test_shapes(n: int, counts: list[int], dim: int, dtype: torch.dtype, device: torch.device) -> None:
    keys, kept, dropped = draw(2, n, dim, counts, seed=n)
    assert_like_twin(keys.to(dtype), kept, dropped, device)


def test_keys_may_lie_between_values(device: torch.device) -> None:
    keys, kept, dropped = draw(2, 150, 16, [20, 40])
    beside = torch.cat([keys, torch.full_like(keys, math.nan)], -1)[..., :16]
    assert_like_twin(beside, kept, dropped, device)


def test_the_first_of_equal_ones_is_named(device: torch.device) -> None:
    keys = torch.ones(1, 300, 16)
    _, slot = fused(keys.to(device), torch.arange(200)[None].to(device), torch.arange(200, 300)[None].to(device))
    assert (slot == 0).all()


def test_broken_keys_are_like_no_other(device: torch.device) -> None:
    keys, kept, dropped = draw(1, 200, 16, [60])
    keys[0, kept[0, 5], 3], keys[0, kept[0, 7], 1], keys[0, kept[0, 9]] = math.nan, math.inf, 0.0
    keys[0, dropped[0, 11], 2], keys[0, dropped[0, 13], 2], keys[0, dropped[0, 15]] = math.nan, -math.inf, 0.0
    assert_like_twin(keys, kept, dropped, device)
    similarity, slot = (part.cpu()[0] for part in fused(keys.to(device), kept.to(device), dropped.to(device)))
    assert (similarity == -math.inf).nonzero().flatten().tolist() == [11, 13]
    assert not torch.isin(slot[similarity > 0], torch.tensor([5, 7])).any()


def test_rows_that_keep_nothing_are_like_nothing(device: torch.device) -> None:
    keys, kept, dropped = draw(2, 50, 16, [10, 0])
    similarity, _ = fused(keys.to(device), kept.to(device), dropped.to(device))
    assert (similarity[1] == -math.inf).all() and similarity[0, :40].isfinite().all()
