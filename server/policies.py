"""Which policies this server can run, and the check of a request's `kv_cache` field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from kvcache.policies.base import Policy
from kvcache.registry import NONE, PARTS, PolicyError, make_policy, policies, policy_words


class PolicyDesk:
    """What one running server accepts.

    Args:
        default: the server's own policy, `{"policy": name, ...}`.
        page_size: tokens per page of the running engine; decides the smallest budget.
        unavailable: None when this build can compress, else why it can't.
    """

    def __init__(self, default: dict[str, Any], page_size: int, unavailable: str | None = None) -> None:
        self.page_size, self.unavailable = page_size, unavailable
        self.missing: dict[str, str] = {}
        self.default = self.check(default)

    def lacks(self, missing: Mapping[str, str]) -> None:
        """Refuse policies that need evidence which this server's model doesn't give.

        Args:
            missing: by kind of evidence, why it can't be gathered.

        Raises:
            PolicyError: the server's own policy is one of them.
        """
        self.missing.update(missing)
        self.check(self.default)

    def check(self, words: Any) -> dict[str, Any]:
        """The policy a request gets, with every argument spelled out.

        Raises:
            PolicyError: names the field and what is allowed.
        """
        policy = make_policy(words)
        if policy is None:
            return policy_words(None)
        if self.unavailable:
            raise PolicyError("kv_cache.policy", f"{policy.name} is not available: {self.unavailable}.", NONE)
        if reason := self._why_not(type(policy)):
            raise PolicyError("kv_cache.policy", f"{policy.name} {reason}.", self._runnable())
        budget, least = policy.args.budget, policy.minimum_budget(self.page_size)
        if budget.tokens is not None and budget.tokens < least:
            raise PolicyError(
                "kv_cache.budget",
                f"{budget.tokens} is too small for {policy.name} with these arguments.",
                f">= {least} tokens (sinks, recent window and two pages of {self.page_size} tokens)",
            )
        return policy_words(policy)

    def describe(self) -> dict[str, Any]:
        """The answer of `GET /v1/kv/policies`."""
        return {
            "object": "list",
            "default": self.default,
            "page_size": self.page_size,
            "available": self.unavailable is None,
            "unavailable_reason": self.unavailable,
            "allocators": {field: [part.describe() for part in known.values()] for field, known in PARTS.items()},
            "data": [
                {
                    "name": NONE,
                    "title": "Keep everything: stock vLLM",
                    "paper": "none",
                    "arguments": {"type": "object", "properties": {}, "additionalProperties": False},
                },
                *(self._describe(policy) for policy in policies().values()),
            ],
        }

    def _describe(self, policy: type[Policy]) -> dict[str, Any]:
        try:
            least = policy(policy.Args.model_validate({})).minimum_budget(self.page_size)
        except ValidationError:  # some argument has no default
            least = None
        return {**policy.describe(), "minimum_budget": least, "unavailable_reason": self._why_not(policy)}

    def _why_not(self, policy: type[Policy]) -> str | None:
        """Which of its needs this server can't meet, and why."""
        needs = [need.value for need in policy.needs if need.value in self.missing]
        return f"needs {needs[0]}, which this server has not: {self.missing[needs[0]]}" if needs else None

    def _runnable(self) -> str:
        return ", ".join([NONE, *(name for name, policy in policies().items() if not self._why_not(policy))])
