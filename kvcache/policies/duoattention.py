"""DuoAttention."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field

from kvcache.allocators.gates import GateHeads, streaming_heads
from kvcache.evidence import LayerEvidence
from kvcache.method import Arguments
from kvcache.plan import RetentionPlan
from kvcache.policies.base import MOST_SINKS, Policy


class DuoAttention(Policy):
    """Retrieval heads keep the whole prompt, streaming heads its sinks and its last tokens.

    Which heads are which is a property of the model: `gates`, in the request or for the whole server
    (`--kv-head-gates FILE`; the published `full_attention_heads.tsv` or one made by `longreach head-gates`). There is
    no budget: pattern and prompt decide what is kept. Prefill runs dense (the paper's streaming heads skip attention
    there too), and answers are kept whole by all heads. Not with tensor parallelism yet.

    Formula:
        streaming head: gate = 0, or gate < the value below which `sparsity` of all gates lie
        streaming heads keep tokens j < sinks and j >= n - recent, all others every j
    """

    name = "duoattention"
    title = "DuoAttention: retrieval heads keep all, streaming heads sinks and recent tokens"
    paper = "arXiv 2410.10819"
    heads = GateHeads

    class Args(Arguments):
        sinks: int = Field(64, ge=0, le=MOST_SINKS, description="First tokens of the prompt that always stay.")
        suffix: int = Field(0, ge=0, description="Last tokens of the prompt that compression neither sees nor drops.")
        recent: int = Field(256, ge=1, le=65536, description="Last tokens of the prompt that always stay.")

    def plan(self, prompt_len: int, page_size: int) -> RetentionPlan | None:
        """Whole pages of all heads, their mean rounded up; nothing is dropped without gates."""
        if not self.args.gates:
            return None
        seen = max(0, prompt_len - self.args.suffix)
        whole = RetentionPlan(seen, page_size, seen // page_size, pinned=self.args.sinks)
        streaming = streaming_heads(self.args.gates, self.args.sparsity)
        least = min(whole.min_pages(self.recent), whole.full_pages)
        pages = int(torch.where(streaming, least, whole.full_pages).sum())
        kept = -(-pages // streaming.numel())
        return replace(whole, kept_pages=kept) if kept < whole.full_pages else None

    def scores(self, evidence: LayerEvidence) -> torch.Tensor:
        num_kv_heads, prompt_len, _ = evidence.shape
        positions = torch.arange(prompt_len, dtype=torch.float32, device=evidence.device)
        return positions.expand(num_kv_heads, prompt_len)
