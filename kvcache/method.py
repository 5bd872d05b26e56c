"""What policies and allocators have in common."""

from __future__ import annotations

import inspect
from abc import ABC
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict

from kvcache.evidence import Evidence


class PolicyError(ValueError):
    """A policy or one of its arguments can't be used. `field` names which, `allowed` says what is."""

    def __init__(self, field: str, problem: str, allowed: str) -> None:
        super().__init__(f"{field}: {problem} Allowed: {allowed}.")
        self.field, self.problem, self.allowed = field, problem, allowed


@dataclass(frozen=True)
class ModelShape:
    """What a policy may know of the served model: its layers, its KV heads, and over how many GPUs these are spread."""

    num_layers: int
    num_kv_heads: int
    tensor_parallel: int = 1


class Arguments(BaseModel):
    """Arguments of a policy or of a part of one. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _odd(kernel: int) -> int:
    if kernel % 2 == 0:
        raise ValueError("kernel must be odd")
    return kernel


Odd = Annotated[int, AfterValidator(_odd)]
"""Width of a kernel with a middle."""


class Method(ABC):
    """A published method, or a part of one: what policies and allocators have in common.

    The docstring of each describes it; what stands below a line "Formula:" at its end is its formula.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    evidence: ClassVar[Evidence] = Evidence.NONE
    """The costliest thing it needs."""

    class Args(Arguments):
        """No arguments."""

    def check_model(self, model: ModelShape | None) -> None:  # noqa: B027
        """Whether the arguments are complete and fit the served model; None where it isn't known yet.

        Raises:
            PolicyError: they don't; a request then is a 400.
        """

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """Name, title, paper, needs, formula and argument schema, as JSON-able data."""
        description, _, formula = inspect.cleandoc(cls.__doc__ or "").partition("\n\nFormula:\n")
        return {
            "name": cls.name,
            "title": cls.title,
            "paper": cls.paper,
            "evidence": cls.evidence.value,
            "description": description,
            "formula": inspect.cleandoc(formula),
            "arguments": cls.Args.model_json_schema(),
        }
