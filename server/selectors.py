"""Which selectors this server can run, and the check of a request's `decode_attention` field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from attention_plugins.decode.base import Selector
from attention_plugins.decode.registry import DENSE, FIELD, make_selector, selector_words, selectors
from kvcache.method import PolicyError

NOT_CALIBRATED = "needs what was measured of the model: --decode-calibration FILE, written by `longreach calibrate`"
NOT_PARALLEL = "needs all heads on one GPU: --tensor-parallel-size 1"

_NEEDS = (
    ("with_policies", False, "a whole cache, which no policy compresses"),
    ("with_tensor_parallel", False, "all heads on one GPU"),
    ("needs_calibration", True, "a file of `longreach calibrate`"),
    ("keeps_metadata", True, "memory beside every page of the cache"),
)


def needs_of(described: Mapping[str, Any]) -> list[str]:
    """What a selector needs, in words, from its own description."""
    return [text for name, wanted, text in _NEEDS if described[name] is wanted]


class SelectorDesk:
    """What one running server accepts.

    Args:
        default: the server's own selector, `{"selector": name, ...}`.
        enabled: selectors that requests may use.
        unavailable: None when selectors can run here, else why they can't.
        states: most requests that select at once.
        calibrated: whether there is a file of `longreach calibrate`.
        tensor_parallel: how many GPUs the heads are spread over.
    """

    field: ClassVar[str] = FIELD
    off: ClassVar[dict[str, Any]] = {"selector": DENSE}

    def __init__(
        self,
        default: dict[str, Any] | None = None,
        enabled: Sequence[str] = (),
        unavailable: str | None = None,
        *,
        states: int = 1,
        calibrated: bool = False,
        tensor_parallel: int = 1,
    ) -> None:
        self.enabled, self.unavailable, self.states = tuple(enabled), unavailable, states
        self.calibrated, self.tensor_parallel = calibrated, tensor_parallel
        self.default = self.check(default or self.off)

    def check(self, words: Any) -> dict[str, Any]:
        """The selector a request gets, with every argument spelled out.

        Raises:
            PolicyError: names the field and what is allowed.
        """
        try:
            selector = make_selector(words)
        except PolicyError as error:
            if error.field != f"{FIELD}.selector" or not self.enabled:
                raise
            raise PolicyError(error.field, error.problem, self._usable()) from None
        if selector is None:
            return selector_words(None)
        if self.unavailable:
            raise PolicyError(f"{FIELD}.selector", f"{selector.name} is not available: {self.unavailable}.", DENSE)
        if reason := self.why_not(type(selector)):
            raise PolicyError(f"{FIELD}.selector", f"{selector.name} {reason}.", self._usable())
        return selector_words(selector)

    def why_not(self, selector: type[Selector]) -> str | None:
        """Why requests can't use it, or None."""
        if reason := self.needs(selector):
            return reason
        if selector.name in self.enabled:
            return None
        return f"is not enabled on this server; start it with --decode-selectors {selector.name}"

    def needs(self, selector: type[Selector]) -> str | None:
        """Which of its needs this server can't meet, and why; None: it could be enabled."""
        if self.tensor_parallel > 1 and not selector.with_tensor_parallel:
            return NOT_PARALLEL
        return NOT_CALIBRATED if selector.needs_calibration and not self.calibrated else None

    def describe(self) -> dict[str, Any]:
        """The answer of `GET /v1/decode/selectors`."""
        return {
            "object": "list",
            "default": self.default,
            "states": self.states,
            "available": self.unavailable is None,
            "unavailable_reason": self.unavailable,
            "data": [
                {
                    "name": DENSE,
                    "title": "Read everything: stock vLLM",
                    "paper": "none",
                    "arguments": {"type": "object", "properties": {}, "additionalProperties": False},
                    "enabled": True,
                    "unavailable_reason": None,
                },
                *(self._describe(selector) for selector in selectors().values()),
            ],
        }

    def _describe(self, selector: type[Selector]) -> dict[str, Any]:
        reason = self.unavailable or self.why_not(selector)
        return {**selector.describe(), "enabled": reason is None, "unavailable_reason": reason}

    def _usable(self) -> str:
        return ", ".join([DENSE, *(name for name, selector in selectors().items() if not self.why_not(selector))])
