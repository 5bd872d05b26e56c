"""Delta Attention."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from attention_plugins.prefill.base import Chunk, DenseRows, Pattern, Plan, Reader
from attention_plugins.prefill.grid import ROWS
from kvcache.method import Arguments


class Delta(Pattern):
    """Measures what another pattern does to every `gamma`-th row, and takes that off the rows behind it.

    Every `gamma`-th query of the prompt is attended densely as well, which costs a `gamma`-th of dense attention. Its
    output replaces the pattern's, and the difference is added to the outputs up to the next such row. The prompt's last
    rows, `max(128, gamma)` and what is left over from whole groups, are dense: whole blocks of 128 queries, so often a
    few more. When and where it applies is up to the base.

    Chunks: groups are counted from the prompt's start. Where one is open when a chunk ends, its difference is carried
    over; a chunk that starts inside a group whose difference isn't known (behind a cached prefix) measures its first
    row. So chunks whose length is a multiple of 128 change nothing, if they don't for the base. The prompt's length has
    to be known before its last chunk, or only that chunk's rows are dense.

    Formula:
        O_i = S_i + D_j - S_j, j = gamma * floor(i / gamma), S the pattern's output and D dense attention's.
    """

    name = "delta"
    title = "Delta Attention: corrects what a pattern leaves out"
    paper = "arXiv 2505.11254"
    corrects = True

    class Args(Arguments):
        base: dict[str, Any] = Field(
            default_factory=lambda: {"pattern": "streaming"},
            description="The pattern that is corrected, in the words that a request would use for it.",
            examples=[{"pattern": "streaming"}],
        )
        gamma: int = Field(64, ge=1, le=4096, description="Of so many rows, one is attended densely as well.")

    args: Args

    def __init__(self, args: Arguments, base: Pattern) -> None:
        super().__init__(args)
        self.base = base
        # What of a class is true of one of these depends on its base.
        for name in ("needs_training", "needs_calibration", "per_kv_head", "chunk_exact"):
            setattr(self, name, getattr(base, name))

    def applies(self, layer: int, k_len: int) -> bool:
        return self.base.applies(layer, k_len)

    def dense_from(self, chunk: Chunk) -> int:
        """First row, counted from the chunk's start, of the dense rows at the prompt's end; may lie behind its end."""
        gamma = self.args.gamma
        return chunk.block_of(chunk.prompt_end - chunk.prompt_end % gamma - max(ROWS, gamma))

    def plan(self, chunk: Chunk) -> Plan:
        return self.base.planned(chunk).dense_from(self.dense_from(chunk))

    def planned(self, chunk: Chunk) -> Plan:
        """`plan`: the base has the argument."""
        return self.plan(chunk)

    def correct(
        self,
        chunk: Chunk,
        values: torch.Tensor | Reader,
        plan: Plan,
        out: torch.Tensor,
        carry: torch.Tensor | None,
        dense_rows: DenseRows,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        gamma, device = self.args.gamma, out.device
        end = min(self.dense_from(chunk), chunk.q_len)
        if not end:
            return out, None
        open_rows = min(-chunk.offset % gamma, end)
        if open_rows and carry is None:
            rows = torch.cat([torch.zeros(1, dtype=torch.int64, device=device),
                              torch.arange(open_rows, end, gamma, device=device)])  # fmt: skip
            start = 0
        else:
            rows, start = torch.arange(open_rows, end, gamma, device=device), open_rows
        out = out.float()
        dense = dense_rows(chunk, values, rows)
        moves = dense - out[rows]
        group = torch.bucketize(torch.arange(start, end, device=device), rows, right=True) - 1
        corrected = out.clone()
        if start and carry is not None:
            corrected[:start] += carry
        if len(rows):
            corrected[start:end] += moves[group]
            corrected[rows] = dense
        carry = moves[-1] if len(rows) else carry
        return corrected, carry if (chunk.k_len % gamma and end == chunk.q_len) else None
