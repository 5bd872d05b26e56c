"""FlashAttention's paged kernel in plain torch: what the CUDA adapter runs on where there is no GPU."""

from __future__ import annotations

import ast
import inspect
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

MODULE = "vllm.vllm_flash_attn"


def real_signature() -> inspect.Signature:
    """What vLLM's own function takes, from its source: importing that needs the CUDA build."""
    vllm = find_spec("vllm")
    assert vllm is not None and vllm.origin
    source = (Path(vllm.origin).parent / "vllm_flash_attn" / "flash_attn_interface.py").read_text()
    (function,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == flash_attn_varlen_func.__name__
    )
    names = [argument.arg for argument in function.args.args]
    required = len(names) - len(function.args.defaults)
    kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    return inspect.Signature(
        [inspect.Parameter(name, kind, default=empty if i < required else None) for i, name in enumerate(names)]
    )


def install(patch: pytest.MonkeyPatch) -> None:
    """Let vLLM's CPU build have the function; its module can't even be imported there. It is known by the parameters of
    the real one, as start-up compares them."""
    stand_in = ModuleType(MODULE)
    patch.setattr(flash_attn_varlen_func, "__signature__", real_signature(), raising=False)
    stand_in.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    patch.setitem(sys.modules, MODULE, stand_in)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [tokens, heads, d], k and v [kv_heads, n, d], seen bool [kv_heads, tokens, n], sinks [heads] -> float32
    [tokens, heads, d]."""
    logits = logits_of(q, k, seen, scale, softcap)
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None, None].expand(-1, len(q), 1)], -1)
    weights = logits.softmax(-1)[..., : k.shape[1]]
    return (weights @ v.float().repeat_interleave(q.shape[1] // k.shape[0], 0)).transpose(0, 1)


def logits_of(q: torch.Tensor, k: torch.Tensor, seen: torch.Tensor, scale: float, softcap: float) -> torch.Tensor:
    """As `attention` takes them -> float32 [heads, tokens, n]."""
    k, seen = (tensor.repeat_interleave(q.shape[1] // k.shape[0], 0) for tensor in (k.float(), seen))
    logits = q.float().transpose(0, 1) @ k.transpose(1, 2) * scale
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    return logits.masked_fill(~seen, float("-inf"))


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_k: int,
    *,
    seqused_k: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    block_table: torch.Tensor,
    softcap: float,
    num_splits: int,
    fa_version: int,
    out: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    return_softmax_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """What vLLM's builds 2 and 3 of the kernel compute and insist on, as far as the adapter uses it.

    q [tokens, heads, d]; k and v [pages, page_size, kv_heads, d], of any strides; block_table [sequences, width].
    Like the kernel, it writes nothing behind the last sequence's queries, and zeros where there is no key. Log
    denominators come head by head, [heads, tokens]: minus infinity (build 3) or infinity (build 2) where there is none.
    """
    sequences, page_size, kv_heads = len(cu_seqlens_q) - 1, k.shape[1], k.shape[2]
    fp8 = q.dtype == torch.float8_e4m3fn
    descales = (q_descale, k_descale, v_descale)
    if fa_version == 2 and num_splits > 1:
        raise NotImplementedError("FA2 does not support num_splits > 1")
    assert fa_version == 3 if fp8 else fa_version in (2, 3)
    assert q.dtype == k.dtype == v.dtype and k.stride(-1) == v.stride(-1) == 1
    for tensor, shape in ((cu_seqlens_q, [sequences + 1]), (seqused_k, [sequences])):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous() and list(tensor.shape) == shape
    assert block_table.dtype == torch.int32 and len(block_table) == sequences and block_table.stride(-1) == 1
    factors = []
    for descale in descales:
        assert (descale is not None) == fp8
        assert descale is None or (descale.dtype == torch.float32 and descale.shape == (sequences, kv_heads))
        factors.append(torch.ones(sequences, kv_heads) if descale is None else descale)
    dtype = torch.bfloat16 if fp8 else q.dtype
    out = torch.empty(q.shape, dtype=dtype) if out is None else out
    assert out.dtype == dtype and out.shape == q.shape
    lse = torch.full((q.shape[1], len(q)), float("-inf") if fa_version == 3 else float("inf"))

    starts, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
    assert starts[0] == 0 and starts[-1] <= len(q)
    for sequence, length in enumerate(lengths):
        first, last = starts[sequence : sequence + 2]
        assert 0 <= last - first <= max_seqlen_q and 0 <= length <= max_seqlen_k
        if not length:
            out[first:last] = 0
        if not length or first == last:
            continue
        pages = block_table[sequence, : -(-length // page_size)].long()
        assert len(pages) == -(-length // page_size) and int(pages.min()) >= 0 and int(pages.max()) < len(k)
        of_q, of_k, of_v = (factor[sequence].view(-1, 1, 1) for factor in factors)
        keys, values = (content[pages].flatten(0, 1)[:length].transpose(0, 1).float() for content in (k, v))
        queries = q[first:last].float() * of_q.repeat_interleave(q.shape[1] // kv_heads, 0).view(1, -1, 1)
        seen = torch.ones(last - first, length, dtype=torch.bool)
        if causal:
            seen = torch.arange(length) <= torch.arange(length - (last - first), length)[:, None]
        seen = seen.expand(kv_heads, -1, -1)
        out[first:last] = attention(queries, keys * of_k, values * of_v, seen, softmax_scale, softcap).to(dtype)
        lse[:, first:last] = logits_of(queries, keys * of_k, seen, softmax_scale, softcap).logsumexp(-1)
    return (out, lse) if return_softmax_lse else out
