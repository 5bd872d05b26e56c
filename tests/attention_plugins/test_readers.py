"""Readers' memory: what is said of it before there is a cache, and what they take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from attention_plugins import naive
from attention_plugins.decode.base import Place
from attention_plugins.decode.registry import selectors
from attention_plugins.decode.settings import DecodeSettings, score_capacity
from attention_plugins.decode.tidal import TidalReader
from attention_plugins.naive.paged_attention import read_pages
from attention_plugins.vllm_adapter import readers as worker_readers
from attention_plugins.vllm_adapter.readers import (
    blocks_beside_readers,
    make_readers,
    place_for,
    read_calibration,
    readers_bytes,
)
from kvcache.pages import PageGeometry

ALL = tuple(selectors())
SIZES = pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"layers": 5, "heads": 3, "page_size": 32, "head_dim": 16, "group": 4, "rank": 3, "dtype": torch.bfloat16},
        {"num_blocks": 7, "states": 9, "max_num_seqs": 4, "max_model_len": 1000, "page_size": 8},
    ],
    ids=["plain", "other", "few"],
)


def place(asked: DecodeSettings, **sizes: Any) -> Place:
    given: dict[str, Any] = {
        "layers": 2, "heads": 2, "page_size": 16, "head_dim": 8, "group": 2, "rank": 8, "num_blocks": 40,
        "max_num_seqs": 5, "max_model_len": 200, "dtype": torch.float32, **sizes,
    }  # fmt: skip
    layers, heads, dim = (given.pop(name) for name in ("layers", "heads", "head_dim"))
    basis = torch.randn(layers, heads, dim, given.pop("rank"))
    geometry = PageGeometry(tuple(range(layers)), layers * heads, heads, given.pop("page_size"), dim)
    given.pop("states", None)
    return place_for(asked, geometry, device=torch.device("cpu"), calibration={"loki.basis": basis}, **given)


def settings(selectors: Iterable[str], **sizes: Any) -> DecodeSettings:
    return DecodeSettings(tuple(selectors), sizes.get("states", 6))


def held(*objects: Any) -> int:
    """Bytes behind the objects' tensors, each storage once."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for item in [*objects, *(thing.pins for thing in objects if hasattr(thing, "pins"))]
        for value in vars(item).values()
        if isinstance(value, torch.Tensor)
    }
    return sum(storages.values())


@SIZES
@pytest.mark.parametrize("asked", [*((name,) for name in ALL), ALL, ("recycled", "quest")], ids=" ".join)
def test_memory_is_what_was_said(asked: tuple[str, ...], sizes: dict[str, Any]) -> None:
    words = settings(asked, **sizes)
    where = place(words, **sizes)
    readers = make_readers(words, where, naive, read_pages)
    assert tuple(readers) == asked and all(type(readers[name]) is selectors()[name].reader for name in asked)
    buffers = readers[asked[0]].buffers
    assert all(reader.buffers is buffers for reader in readers.values()), "one for all"
    assert readers_bytes(words, where) == held(buffers, *readers.values())


def test_no_selector_takes_nothing() -> None:
    words = settings(())
    assert make_readers(words, place(words), naive, read_pages) == {} and readers_bytes(words, place(words)) == 0


def test_where_readers_work() -> None:
    words = settings(ALL, states=6)
    where = place(words, layers=3, heads=2, num_blocks=10, max_num_seqs=5, max_model_len=200)
    assert (where.num_pages, where.rows, where.states, where.width) == (60, 5, 7, 14)
    assert where.capacity == 4 * 10 * 16 + 16, "a page more than the scheduler hands out"
    assert place(words, max_num_seqs=50).rows == 6
    assert place(words, num_blocks=1).capacity == 208 + 16, "the longest request always has room"


@pytest.mark.parametrize(
    ("blocks", "page_size", "longest", "expected"), [(10, 16, 100, 640), (1, 16, 100, 112), (1, 32, 96, 128)]
)
def test_columns_of_scores(blocks: int, page_size: int, longest: int, expected: int) -> None:
    assert score_capacity(blocks, page_size, longest) == expected


@SIZES
@pytest.mark.parametrize("asked", [("tidal",), ("quest",), ("loki",), ALL], ids=" ".join)
def test_as_many_blocks_as_fit(asked: tuple[str, ...], sizes: dict[str, Any]) -> None:
    """Beside readers that are made for so many blocks; with one more there would be too little memory."""
    words, block_bytes = settings(asked, **sizes), 4096

    def needed(blocks: int) -> int:
        return blocks * block_bytes + readers_bytes(words, place(words, **{**sizes, "num_blocks": blocks}))

    for blocks in (1, 2, 60, 1000):
        for available in (needed(blocks), needed(blocks) + 1, needed(blocks + 1) - 1):
            empty = place(words, **{**sizes, "num_blocks": 0})
            assert blocks_beside_readers(words, empty, available, block_bytes) == blocks


def test_memory_that_readers_take_alone() -> None:
    words = settings(ALL)
    where = place(words, num_blocks=0)
    assert blocks_beside_readers(words, where, readers_bytes(words, where) - 1, 4096) == 0
    assert blocks_beside_readers(words, where, 100, 4096) == 0
    assert blocks_beside_readers(settings(()), where, 10 * 4096 + 4095, 4096) == 10


def test_settings_travel_in_vllms_configuration() -> None:
    assert DecodeSettings.of(None) == DecodeSettings.of({"longreach": {}}) == DecodeSettings()
    words = {"longreach": {"decode": {"selectors": ["quest", "loki"], "states": 12, "calibration": "file"}}}
    assert DecodeSettings.of(words) == DecodeSettings(("quest", "loki"), 12, "file")


@pytest.mark.parametrize(
    ("rank", "ranks", "heads", "expected"),
    [(0, 1, 4, [0, 1, 2, 3]), (1, 2, 2, [2, 3]), (3, 4, 1, [3]), (3, 8, 1, [1]), (7, 8, 1, [3])],
)
def test_a_calibration_is_read_for_a_ranks_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int, heads: int, expected: list[int]
) -> None:
    """Where there are more ranks than heads, two and two have the same one."""
    monkeypatch.setattr(worker_readers, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(worker_readers, "get_tensor_model_parallel_world_size", lambda: ranks)
    file, basis = tmp_path / "found.safetensors", torch.randn(2, 4, 8, 3)
    save_file({"tidal.layers": torch.tensor([3, 5]), "loki.basis": basis}, file)
    found = read_calibration(DecodeSettings(calibration=str(file)), heads)
    assert torch.equal(found["loki.basis"], basis[:, expected])
    assert found["tidal.layers"].tolist() == [3, 5]
    assert read_calibration(DecodeSettings(), heads) == {}


@pytest.mark.parametrize(
    ("layers", "rule"), [(32, (2, 13)), (36, (2, 15)), (16, (2, 6)), (4, (2,)), (3, (1, 2)), (1, (0,))]
)
def test_layers_that_choose_for_others(layers: int, rule: tuple[int, ...]) -> None:
    """The model's, where they were measured; else by the shipped rule."""
    words = settings(("tidal", "lessismore"))
    where = replace(place(words, layers=layers), calibration={"tidal.layers": torch.tensor([3, 5])})
    readers = make_readers(words, where, naive, read_pages)
    tidal, lessismore = (readers[name] for name in words.selectors)
    assert isinstance(tidal, TidalReader) and isinstance(lessismore, TidalReader)
    assert (tidal.selecting, lessismore.selecting) == ((3, 5), rule)
