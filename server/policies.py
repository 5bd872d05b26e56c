"""Which policies this server can run, and the check of a request's `kv_cache` field."""

from __future__ import annotations

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
        self.default = self.check(default)

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
        return {**policy.describe(), "minimum_budget": least}
