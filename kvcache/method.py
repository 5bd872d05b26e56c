"""What policies and allocators have in common."""

from __future__ import annotations

import inspect
from abc import ABC
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict

from kvcache.evidence import Evidence


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
    """A published method, or a part of one: what policies and allocators have in common."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    evidence: ClassVar[Evidence] = Evidence.NONE
    """The costliest thing it needs."""

    class Args(Arguments):
        """No arguments."""

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """Name, title, paper, needs and argument schema, as JSON-able data."""
        return {
            "name": cls.name,
            "title": cls.title,
            "paper": cls.paper,
            "evidence": cls.evidence.value,
            "description": inspect.cleandoc(cls.__doc__ or ""),
            "arguments": cls.Args.model_json_schema(),
        }
