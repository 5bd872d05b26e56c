"""R-KV's search for the newest similar key by a kernel, against the naive twin on the same numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kvcache.policies.rkv import newest_similar, redundancy

pytest.importorskip("triton")
# The interpreter's numpy warns of infinities and NaNs, which belong to these keys.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CUDA = torch.cuda.is_available()
ON_CUDA = pytest.mark.skipif(not CUDA, reason="needs a GPU")
# Triton's interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if CUDA else [torch.float32, torch.float16]


def fused(keys: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    from kvcache.kernels.similar_keys import newest_similar_fused

    return newest_similar_fused(keys, threshold)


def draw(heads: int, n: int, dim: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Keys of any length; some of them in groups that resemble each other, as in a model."""
    generator = torch.Generator().manual_seed(seed)
    themes = torch.randn(heads, 5, dim, generator=generator)[:, torch.randint(0, 5, (n,), generator=generator)]
    mixed = torch.randn(heads, n, dim, generator=generator) + torch.rand(heads, n, 1, generator=generator) * themes
    return (mixed * (0.1 + 10 * torch.rand(heads, n, 1, generator=generator))).to(dtype)


def by_pairs(keys: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Cosines of keys with those at their places, 0 where that is -1: float64."""
    unit = F.normalize(keys.double(), dim=-1)
    other = unit.gather(1, place.clamp(min=0)[..., None].expand_as(unit))
    return (unit * other).sum(-1).masked_fill(place < 0, 0)


def assert_like_twin(keys: torch.Tensor, threshold: float, device: torch.device) -> torch.Tensor:
    """Places are the twin's but where rounding decides whether a key is similar."""
    expected, expected_cosine = newest_similar(keys, threshold)
    place, cosine = (part.cpu() for part in fused(keys.to(device), threshold))
    assert place.dtype == torch.int64 and cosine.dtype == torch.float32 and place.shape == keys.shape[:2]
    torch.testing.assert_close(cosine.double(), by_pairs(keys, place), atol=1e-5, rtol=0)
    torch.testing.assert_close(expected_cosine.double(), by_pairs(keys, expected), atol=1e-5, rtol=0)
    either = torch.maximum(place, expected)
    close = (by_pairs(keys, either) - threshold).abs() < 1e-5
    assert ((place == expected) | close).all()
    assert close.sum() <= 0.01 * close.numel()
    return place


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 24, 64, 128])
@pytest.mark.parametrize("n", [1, 2, 130, 300])
def test_shapes(n: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_like_twin(draw(2, n, dim, dtype, seed=n), 0.4, device)


@pytest.mark.parametrize("threshold", [-1.0, -0.2, 0.0, 0.3, 0.9, 1.0])
def test_thresholds(threshold: float, device: torch.device) -> None:
    place = assert_like_twin(draw(3, 200, 16, torch.float16), threshold, device)
    if threshold == -1.0:  # everything is similar: the last key, and of that the one before it
        assert (place[:, :-1] == 199).all() and (place[:, -1] == 198).all()
    assert threshold != 1.0 or (place == -1).float().mean() > 0.9


@pytest.mark.parametrize("at", [0, 1, 700, 1023, 1024, 1299])
def test_a_similar_key_is_found_anywhere(at: int, device: torch.device) -> None:
    """Two keys are alike and like no other, so all rows but theirs search to the end."""
    keys = torch.zeros(1, 1300, 16)
    keys[0, torch.arange(1300), torch.arange(1300) % 8] = 1.0
    keys[0, :, 8:] = torch.randn(1300, 8, generator=torch.Generator().manual_seed(at)) * 3
    keys[0, at] = 0
    keys[0, 650] = 0
    keys[0, at, 0] = keys[0, 650, 0] = 5.0
    place = assert_like_twin(keys, 0.999, device)
    assert (int(place[0, 650]), int(place[0, at])) == (at, 650)


def test_steps_and_blocks_do_not_matter(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = draw(1, 700, 16, torch.float16)
    whole = fused(keys.to(device), 0.6)
    for steps in (1, 3):
        monkeypatch.setattr("kvcache.kernels.similar_keys._STEPS", steps)
        assert all(torch.equal(one, other) for one, other in zip(fused(keys.to(device), 0.6), whole, strict=True))


def test_keys_may_lie_between_values(device: torch.device) -> None:
    """As they are read from pages: their numbers follow each other, the keys don't."""
    keys = draw(2, 150, 16, torch.float16)
    beside = torch.cat([keys, torch.full_like(keys, math.nan)], -1).to(device)[..., :16]
    assert torch.equal(fused(beside, 0.5)[0].cpu(), newest_similar(keys, 0.5)[0])


def test_broken_keys_are_like_no_other(device: torch.device) -> None:
    keys = draw(1, 150, 16, torch.float32)
    keys[0, 149, 3], keys[0, 20], keys[0, 30] = math.nan, 0.0, math.inf
    place = assert_like_twin(keys, 0.2, device)
    assert (place[0, [20, 30, 149]] == -1).all() and not torch.isin(place, torch.tensor([20, 30, 149])).any()


def test_keys_that_the_kernel_cannot_read_are_errors(device: torch.device) -> None:
    for keys in (torch.zeros(1, 4, 257), torch.zeros(1, 16, 4).transpose(1, 2)):
        with pytest.raises(ValueError, match="adjacent numbers"):
            fused(keys.to(device), 0.5)


@ON_CUDA
@pytest.mark.parametrize(("n", "threshold"), [(5000, 0.5), (5000, 0.95), (20_000, 0.7)])
def test_redundancy_on_a_gpu(n: int, threshold: float, device: torch.device) -> None:
    """The same bits every time, and what the CPU finds."""
    keys = draw(2, n, 128, torch.bfloat16)
    found = redundancy(keys.to(device), threshold)
    assert torch.equal(found, redundancy(keys.to(device), threshold))
    if n == 5000:  # the CPU takes its time
        torch.testing.assert_close(found.cpu().log(), redundancy(keys, threshold).log(), atol=1e-3, rtol=0)
