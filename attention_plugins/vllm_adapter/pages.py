"""vLLM's KV cache, as our pages."""

from __future__ import annotations

import torch

from kvcache.pages import PageGeometry, PermutedCodec


def flat_pages(kv_caches: list[torch.Tensor]) -> tuple[torch.Tensor, PageGeometry]:
    """All layers' pages as one tensor, without copying.

    Args:
        kv_caches: one view [num_blocks, num_kv_heads, page_size, 2 * head_dim] per layer, all of one allocation.

    Returns:
        [num_pages, 2 * page_size * head_dim] and how its pages are numbered.

    Raises:
        ValueError: when the views are laid out in a way we don't know.
    """
    first = kv_caches[0]
    _, num_kv_heads, page_size, content = first.shape
    elements = page_size * content
    storage = first.untyped_storage()
    for cache in kv_caches:
        if (
            cache.untyped_storage().data_ptr() != storage.data_ptr()
            or cache.shape != first.shape
            or cache.stride() != first.stride()
            or cache.stride()[1:] != (elements, content, 1)
            or cache.storage_offset() % elements
            or cache.stride(0) % elements
        ):
            raise ValueError(f"unknown KV cache layout: shape {tuple(cache.shape)}, strides {cache.stride()}")
    num_pages = storage.nbytes() // (elements * first.element_size())
    pages = torch.as_strided(first, (num_pages, elements), (elements, 1), 0)
    geometry = PageGeometry(
        layer_base=tuple(cache.storage_offset() // elements for cache in kv_caches),
        block_stride=first.stride(0) // elements,
        num_kv_heads=num_kv_heads,
        page_size=page_size,
        head_dim=content // 2,
    )
    return pages, geometry


def probe_codec(page_size: int, head_dim: int, dtype: torch.dtype, isa: str) -> PermutedCodec:
    """Find out how the CPU kernel orders a page, by writing one and looking.

    The order depends on the instruction set and isn't documented. Element i is written with bit b of i in round b,
    so that every dtype can carry it; what comes back at each place spells the element's number.

    Raises:
        RuntimeError: when a page is not a permutation of its elements.
    """
    from vllm import _custom_ops as ops

    elements = 2 * page_size * head_dim
    numbers = torch.arange(elements)
    found = torch.zeros(elements, dtype=torch.int64)
    slots = torch.arange(page_size)
    for bit in range(elements.bit_length()):
        plain = (numbers >> bit & 1).to(dtype).view(2, page_size, 1, head_dim)
        cache = torch.zeros(1, 1, 2 * page_size, head_dim, dtype=dtype)
        key_cache, value_cache = cache.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(plain[0].contiguous(), plain[1].contiguous(), key_cache, value_cache, slots, isa)
        found += cache.flatten().to(torch.int64) << bit
    if not torch.equal(found.sort().values, numbers):
        raise RuntimeError(f"the CPU attention's page layout for {isa}, {dtype} is no permutation of its elements")
    return PermutedCodec(found.argsort(), page_size, head_dim)
