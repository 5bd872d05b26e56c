"""Files of `longreach calibrate`, as servers read them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.calibration import CacheShape, read_calibration
from server.errors import StartError
from tests.server.calibrations import tensors, write

MODEL = CacheShape(3, 2, 8)


def test_a_file_that_fits_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "c.safetensors", mine__own=torch.ones(1))
    for model in (None, MODEL):
        found = read_calibration(file, model)
        assert set(found) == {*tensors(), "mine.own"}
        assert torch.equal(found["loki.basis"], tensors()["loki.basis"])


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"loki__basis": None}, "lacks loki.basis; write it anew with `longreach calibrate`"),
        ({"tidal__layers": None, "lessismore__layers": None}, "lacks tidal.layers, lessismore.layers"),
        ({"loki__basis": torch.ones(3, 2, 8, 4).half()}, r"must be float32 .*torch.float16 \[3, 2, 8, 4\]"),
        ({"loki__basis": torch.ones(3, 2, 8)}, r"must be float32 \[layers, KV heads, head_dim, rank\].*\[3, 2, 8\]"),
        ({"loki__basis": torch.ones(3, 2, 8, 9)}, r"must be float32"),
        ({"loki__basis": torch.full((3, 2, 8, 4), float("nan"))}, "no number"),
        ({"loki__basis": torch.ones(4, 2, 8, 4)}, "of 4 layers, 2 KV heads and head_dim 8, the model has 3, 2 and 8"),
        ({"tidal__layers": torch.tensor([1, 1])}, r"tidal.layers must be some of the 3 layers.* is \[1, 1\]"),
        ({"tidal__layers": torch.tensor([0, 3])}, r"tidal.layers must be some of the 3 layers"),
        ({"lessismore__layers": torch.zeros(0, dtype=torch.int64)}, r"lessismore.layers must be some"),
        ({"lessismore__layers": torch.tensor([0.0, 1.0])}, r"lessismore.layers must be some"),
    ],
)
def test_a_file_that_does_not_fit_ends_the_start(
    changed: dict[str, torch.Tensor | None], problem: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "c.safetensors", **changed)
    with pytest.raises(StartError, match=problem) as caught:
        read_calibration(file, MODEL)
    assert str(caught.value).startswith(f"--decode-calibration {file}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_a_file_that_can_not_be_read_ends_the_start(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(StartError, match=r"c\.safetensors: can't be read as safetensors") as caught:
        read_calibration(file)
    assert "\n" not in str(caught.value)
