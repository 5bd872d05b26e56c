"""DuoAttention's two classes of heads."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, field_validator

from kvcache.allocation import apportion
from kvcache.allocators.base import HeadAllocator
from kvcache.method import Arguments, ModelShape, PolicyError
from kvcache.plan import RetentionPlan

Gate = Annotated[float, Field(ge=0, le=1)]


def streaming_heads(gates: list[list[float]], sparsity: float) -> torch.Tensor:
    """Which heads keep sinks and recent tokens only: those with the lowest gates (arXiv 2410.10819).

    The threshold is the gate below which `sparsity` of all heads lie. Heads at it keep everything, so equal gates fare
    alike (the published code breaks ties by chance); a gate of 0 streams in any case.

    Args:
        gates: by layer and KV head, 0 ... 1.
        sparsity: share of the heads that stream.

    Returns:
        bool [num_layers, num_kv_heads], on the CPU.
    """
    table = torch.tensor(gates, dtype=torch.float64)
    ranked = table.flatten().sort().values
    below = round(sparsity * len(ranked))
    threshold = float(ranked[below]) if below < len(ranked) else float("inf")
    return (table < threshold) | (table == 0)


class GateHeads(HeadAllocator):
    """Retrieval heads keep everything, streaming heads what is forced: sinks and recent tokens.

    A table of gates, one per KV head of each layer, says which head is which: published for some models (gates learnt
    by distillation), or made from a model's own attention by `longreach head-gates`. Pages that are left over from
    rounding up go to streaming heads.

    Formula:
        streaming head: gate = 0, or gate < the value below which `sparsity` of all gates lie
        tokens(head) = prompt for retrieval heads, sinks + recent in whole pages for streaming ones
    """

    name = "gates"
    title = "DuoAttention: heads that keep all, heads that stream"
    paper = "arXiv 2410.10819"
    needs_scores = False
    decides_layers = True

    class Args(Arguments):
        gates: list[Annotated[list[Gate], Field(min_length=1, max_length=1024)]] = Field(
            [], max_length=1024, description="A gate from 0 to 1 for each KV head, a list a layer; high ones keep all."
        )
        sparsity: float = Field(0.5, ge=0, le=1, description="Share of the KV heads that stream: the lowest gates.")

        @field_validator("gates")
        @classmethod
        def _rectangular(cls, gates: list[list[float]]) -> list[list[float]]:
            if len({len(layer) for layer in gates}) > 1:
                raise ValueError("every layer must have the same number of gates")
            return gates

    def check_model(self, model: ModelShape | None) -> None:
        gates = self.args.gates
        shape = f"{model.num_layers} lists of {model.num_kv_heads} numbers" if model else "one list a layer"
        if not gates:
            problem = "are missing, and the server has none of its own (--kv-head-gates FILE)."
            raise PolicyError("kv_cache.gates", problem, shape)
        if model and (len(gates), len(gates[0])) != (model.num_layers, model.num_kv_heads):
            problem = f"are {len(gates)} layers of {len(gates[0])} KV heads, which isn't the model's shape."
            raise PolicyError("kv_cache.gates", problem, shape)
        if model and model.tensor_parallel > 1:
            problem = "head gates don't run with tensor parallel (--tensor-parallel-size above 1) yet."
            raise PolicyError("kv_cache.policy", problem, "policies without gates")

    def pages(self, plan: RetentionPlan, low: int) -> torch.Tensor | None:
        if not self.args.gates:
            return None
        streaming = streaming_heads(self.args.gates, self.args.sparsity)
        wished = torch.where(streaming, low, plan.full_pages)
        total = plan.kept_pages * streaming.numel()
        return apportion(wished.flatten(), total, low, plan.full_pages).view_as(streaming)

    def shares(self, scores: torch.Tensor, tokens: int) -> torch.Tensor:
        return scores.new_full((len(scores),), float(tokens))
