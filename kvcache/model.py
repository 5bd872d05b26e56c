"""What a worker knows of the running model beside its keys, values and queries."""

from __future__ import annotations

from dataclasses import dataclass

from kvcache.namm import Network
from kvcache.rotary import Rotary


@dataclass(frozen=True)
class ModelFacts:
    """For observers and scorers.

    Attributes:
        rotary: how queries and keys are rotated; None where that isn't known (see `Evidence.QUERY_MOMENTS`).
        namm: NAMM's network, if the server was given one.
        query_scales: by layer, what queries are multiplied with where they are fp8; empty where they aren't.
    """

    rotary: Rotary | None = None
    namm: Network | None = None
    query_scales: tuple[float, ...] = ()

    def query_scale(self, layer: int) -> float:
        """What a layer's queries are multiplied with where they are fp8."""
        return self.query_scales[layer] if self.query_scales else 1.0


UNKNOWN = ModelFacts()
"""Nothing, as in processes that run no model."""
