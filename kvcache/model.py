"""What a worker knows of the running model beside its keys, values and queries."""

from __future__ import annotations

from dataclasses import dataclass

from kvcache.evidence import QuantScales
from kvcache.rotary import Rotary


@dataclass(frozen=True)
class ModelFacts:
    """For observers.

    Attributes:
        rotary: how queries and keys are rotated; None where that isn't known (see `Evidence.QUERY_MOMENTS`).
        quant: by layer, what queries, keys and values are multiplied with; empty where they aren't quantised.
    """

    rotary: Rotary | None = None
    quant: tuple[QuantScales, ...] = ()

    def query_scale(self, layer: int) -> float:
        """What a layer's queries are multiplied with where they are fp8."""
        return self.quant[layer].query if self.quant else 1.0


UNKNOWN = ModelFacts()
"""Nothing, as in processes that run no model."""
