"""The readers that a server's settings ask for, and their memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType

import torch
from safetensors.torch import load_file
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from attention_plugins.decode.base import Buffers, Place, Reader, ReadPages
from attention_plugins.decode.loki import BASIS
from attention_plugins.decode.registry import selectors
from attention_plugins.decode.settings import DecodeSettings, score_capacity
from kvcache.pages import PageGeometry


def read_calibration(settings: DecodeSettings, num_kv_heads: int) -> dict[str, torch.Tensor]:
    """What `longreach calibrate` has found, of this rank's heads; the server has looked at the file before.

    Args:
        num_kv_heads: of this rank.
    """
    if settings.calibration is None:
        return {}
    found = load_file(settings.calibration)
    if BASIS in found:
        # Ranks have their heads in order; where there are more ranks than heads, some have the same one.
        first = get_tensor_model_parallel_rank() * found[BASIS].shape[1] // get_tensor_model_parallel_world_size()
        found[BASIS] = found[BASIS][:, first : first + num_kv_heads]
    return found


def _capacity(num_blocks: int, page_size: int, max_model_len: int) -> int:
    """What the scheduler hands out, and a page that nobody has."""
    return score_capacity(num_blocks, page_size, max_model_len) + page_size


def place_for(
    settings: DecodeSettings,
    geometry: PageGeometry,
    *,
    num_blocks: int,
    group: int,
    dtype: torch.dtype,
    device: torch.device,
    max_num_seqs: int,
    max_model_len: int,
    calibration: Mapping[str, torch.Tensor],
) -> Place:
    """Where readers work.

    Args:
        geometry: of the cache.
        num_blocks: of the cache.
        group: query heads of a KV head.
        dtype: the model's.
    """
    rows = min(settings.states, max_num_seqs)
    return Place(
        geometry,
        num_pages=num_blocks * geometry.num_layers * geometry.num_kv_heads,
        group=group,
        dtype=dtype,
        device=device,
        rows=rows,
        states=settings.states + 1,  # one that nobody has
        width=-(-max_model_len // geometry.page_size) + 1,
        capacity=_capacity(num_blocks, geometry.page_size, max_model_len),
        calibration=calibration,
    )


def make_readers(settings: DecodeSettings, place: Place, ops: ModuleType, read_pages: ReadPages) -> dict[str, Reader]:
    """By selector's name."""
    if not settings.selectors:
        return {}
    buffers = Buffers.make(place)
    return {name: selectors()[name].reader(place, buffers, ops, read_pages) for name in settings.selectors}


def readers_bytes(settings: DecodeSettings, place: Place) -> int:
    """Memory of `make_readers`."""
    if not settings.selectors:
        return 0
    return Buffers.nbytes(place) + sum(selectors()[name].reader.nbytes(place) for name in settings.selectors)


def blocks_beside_readers(settings: DecodeSettings, place: Place, available: int, block_bytes: int) -> int:
    """How many blocks fit beside readers that hold something for each of them.

    Args:
        place: for any number of blocks.
        available: bytes for both.
    """
    size, by_block = place.geometry.page_size, place.geometry.num_layers * place.geometry.num_kv_heads

    def needed(blocks: int) -> int:
        capacity = _capacity(blocks, size, (place.width - 1) * size)
        return readers_bytes(settings, replace(place, num_pages=blocks * by_block, capacity=capacity))

    low, high = 0, available // block_bytes
    while low < high:
        middle = (low + high + 1) // 2
        if middle * block_bytes + needed(middle) <= available:
            low = middle
        else:
            high = middle - 1
    return low
