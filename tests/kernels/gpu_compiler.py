"""Triton's compiler for an H100 where there is none: what each kernel that is launched would take there.

python -m tests.kernels.gpu_compiler HEAD_DIM DTYPE prints a line of JSON for each: name, bytes of shared memory.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from attention_plugins.kernels import prefill as ops
from attention_plugins.prefill.base import Chunk
from attention_plugins.prefill.grid import ROWS
from attention_plugins.prefill.paged import PagedTokens
from kvcache.pages import InterleavedCodec


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only() -> None:
    """Launches compile from now on, say what came of it, and run nothing."""
    driver.set_active(Hopper())
    launch, known = JITFunction.run, set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        kernel: Any = launch(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in known:
            known.add(kernel.hash)
            print(json.dumps({"kernel": self.__name__, "shared": kernel.metadata.shared}), flush=True)

    JITFunction.run = run


def chunk(head_dim: int, dtype: torch.dtype) -> Chunk:
    """Of three query heads for a KV head; what numbers it has doesn't matter."""
    queries, tokens, page = 300, 2000, 16
    blocks = triton.cdiv(tokens, page)
    pages = torch.zeros(blocks, 2 * page * head_dim, dtype=dtype)
    codec = InterleavedCodec(page, head_dim)
    keys = PagedTokens(pages, torch.arange(blocks)[None], codec, page, head_dim, tokens, False, dtype)
    return Chunk(torch.zeros(queries, 3, head_dim, dtype=dtype), keys, head_dim**-0.5, unit=page, ops=ops)


def main(head_dim: int, dtype: torch.dtype) -> None:
    compile_only()
    one = chunk(head_dim, dtype)
    ops.best_of_chunks(one, torch.zeros(1, one.grid.q_blocks, 64, dtype=torch.int64), 32, 4, True)
    ops.last_row_sums(one, ROWS)
    ops.column_sums(one, torch.arange(ROWS))
    ops.group_slack(one, ops.near_maxima(one, 1024), 1024)
    for stride in (4, 64, 128):
        ops.antidiagonal_masses(one, stride)
    ops.pooled_keys(one, ROWS)
    ops.pooled_queries(one)


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]))
