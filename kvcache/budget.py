"""A budget: how many tokens each layer and KV head keeps on average."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

_RATIO = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*%\s*$")
ALLOWED = "a whole number of tokens >= 1, or a share of the prompt such as '25%' (over 0%, up to 100%)"


@dataclass(frozen=True)
class Budget:
    """Either `tokens` or `ratio` (of the prompt, 0 < ratio <= 1) is set.

    A ratio becomes tokens at admission, when the prompt's length is known; nothing after that sees ratios.
    """

    tokens: int | None = None
    ratio: float | None = None

    @classmethod
    def parse(cls, value: object) -> Budget:
        """Read 512, "512" or "25%".

        Raises:
            ValueError: for anything else; the message names what is allowed.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, str):
            if match := _RATIO.match(value):
                ratio = float(match.group(1) + "e-2")
                if 0 < ratio <= 1:
                    return cls(ratio=ratio)
            elif value.strip().isdecimal():
                value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return cls(tokens=value)
        raise ValueError(f"Input should be {ALLOWED}; got {value!r}")

    def resolve(self, prompt_len: int) -> int:
        """Tokens for a prompt of `prompt_len` tokens; a ratio is rounded up, as in the L2-norm paper's code."""
        if self.tokens is not None:
            return self.tokens
        assert self.ratio is not None
        # 1e-9: 0.29 * 100 is 28.999999999999996 in binary floating point, and 0.07 * 100 is 7.000000000000001.
        return max(1, math.ceil(self.ratio * prompt_len - 1e-9))

    def __str__(self) -> str:
        # Decimal: `parse` knows no exponents such as 1e-05%, and every digit has to come back.
        return str(self.tokens) if self.tokens is not None else f"{Decimal(repr(self.ratio)).scaleb(2):f}%"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda budget: budget.tokens if budget.tokens is not None else str(budget)
            ),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {
            "anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*%?\s*$"}],
            "description": "Tokens kept per layer and KV head on average: " + ALLOWED,
        }
