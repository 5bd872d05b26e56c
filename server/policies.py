"""Which policies this server can run, and the check of a request's `kv_cache` field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import ValidationError

from kvcache.kept_positions import REPORT
from kvcache.method import ModelShape
from kvcache.policies.base import Policy
from kvcache.policies.duoattention import DuoAttention
from kvcache.registry import NONE, PARTS, PolicyError, make_policy, policies, policy_class, policy_words


@dataclass(frozen=True)
class HouseRules:
    """What a server sets for every request.

    Attributes:
        always_keep: first tokens that every policy keeps; a request's `sinks` can only raise it.
        gates: head gates of the model, for requests whose policy takes some and that bring none.
    """

    always_keep: int = 4
    gates: list[list[float]] | None = None

    def applied(self, words: dict[str, Any]) -> dict[str, Any]:
        """A request's words under these rules.

        Raises:
            PolicyError: an unknown policy or allocator.
        """
        if not isinstance(words, dict) or words.get("policy") == NONE:
            return words
        known = policy_class(words).Args.model_fields
        if self.gates and "gates" in known:
            words = {"gates": self.gates, **words}
        sinks = words.get("sinks", known["sinks"].default)
        if type(sinks) is int and 0 <= sinks < self.always_keep:
            words = {**words, "sinks": self.always_keep}
        return words


class PolicyDesk:
    """What one running server accepts.

    Args:
        default: the server's own policy, `{"policy": name, ...}`.
        page_size: tokens per page of the running engine; decides the smallest budget.
        unavailable: None when this build can compress, else why it can't.
        rules: what holds for every request.
        model: the served model, once it is known.
    """

    field: ClassVar[str] = "kv_cache"
    off: ClassVar[dict[str, Any]] = {"policy": NONE}

    def __init__(
        self,
        default: dict[str, Any],
        page_size: int,
        unavailable: str | None = None,
        rules: HouseRules | None = None,
        model: ModelShape | None = None,
    ) -> None:
        self.page_size, self.unavailable = page_size, unavailable
        self.missing: dict[str, str] = {}
        self.rules, self.model = rules or HouseRules(), model
        self._check_gates()
        self.default = self.check(default)

    def resize(self, page_size: int) -> None:
        """Take the running engine's pages for true.

        Raises:
            PolicyError: the server's own policy has too small a budget for them.
        """
        self.page_size = page_size
        self.default = self.check(self.default)

    def lacks(self, missing: Mapping[str, str]) -> None:
        """Refuse policies that need evidence which this server's model doesn't give.

        Args:
            missing: by kind of evidence, why it can't be gathered.

        Raises:
            PolicyError: the server's own policy is one of them.
        """
        self.missing.update(missing)
        self.check(self.default)

    def _check_gates(self) -> None:
        """Whether the server's own gates fit its model, whatever its default policy.

        Raises:
            PolicyError: they don't.
        """
        if self.rules.gates is None:
            return
        try:
            policy = make_policy({"policy": DuoAttention.name, "gates": self.rules.gates})
            assert policy is not None
            policy.check_model(self.model)
        except PolicyError as error:
            raise PolicyError("kv_cache.head_gates", error.problem, error.allowed) from None

    def check(self, words: Any) -> dict[str, Any]:
        """The policy a request gets, with every argument spelled out.

        Raises:
            PolicyError: names the field and what is allowed.
        """
        policy = make_policy(self.rules.applied(words))
        if policy is None:
            return policy_words(None)
        if self.unavailable:
            raise PolicyError("kv_cache.policy", f"{policy.name} is not available: {self.unavailable}.", NONE)
        if reason := self._why_not(type(policy)):
            raise PolicyError("kv_cache.policy", f"{policy.name} {reason}.", self._runnable())
        policy.check_model(self.model)
        budget, least = getattr(policy.args, "budget", None), policy.minimum_budget(self.page_size)
        if budget is not None and budget.tokens is not None and budget.tokens < least:
            and_suffix = ", the suffix, which compactions of the answer keep," if policy.question else ""
            raise PolicyError(
                "kv_cache.budget",
                f"{budget.tokens} is too small for {policy.name} with these arguments.",
                f">= {least} tokens (sinks, recent window{and_suffix} and two pages of {self.page_size} tokens)",
            )
        return {**policy_words(policy), **({REPORT: words[REPORT]} if REPORT in words else {})}

    def describe(self) -> dict[str, Any]:
        """The answer of `GET /v1/kv/policies`."""
        return {
            "object": "list",
            "default": self.default,
            "page_size": self.page_size,
            "always_keep": self.rules.always_keep,
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
        if "budget" not in policy.Args.model_fields:
            return {**policy.describe(), "minimum_budget": None}
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
