"""What policies and allocators have in common."""

from __future__ import annotations

import inspect
import json
from abc import ABC
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

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


def explain(where: str, name: str, args: type[Arguments], taken: list[str], error: ValidationError) -> PolicyError:
    """The first of pydantic's errors, in terms of the request's field.

    Args:
        where: the field that holds the arguments.
        name: of the method that they are for.
        taken: the fields it takes.
    """
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0]) if first["loc"] else "policy"
    schema = args.model_json_schema()["properties"].get(field)
    if schema is None:
        return PolicyError(f"{where}.{field}", f"{name} has no such argument.", ", ".join(taken))
    problem = first["msg"].removeprefix("Value error, ").removesuffix(f"; got {first['input']!r}")
    return PolicyError(f"{where}.{field}", f"{problem}; got {first['input']!r}.", _allowed(schema))


def _allowed(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(repr(value) for value in schema["enum"])
    if "anyOf" in schema:
        return "a whole number of tokens or a share of the prompt such as '25%'"
    if schema.get("type") == "array":
        return f"a list, each item {_allowed(schema['items'])}"
    if "examples" in schema:
        return f"{schema.get('type', 'anything')} such as {json.dumps(schema['examples'][0])}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema]
    return " ".join([str(schema.get("type", "any")), " and ".join(bounds)]).strip()
