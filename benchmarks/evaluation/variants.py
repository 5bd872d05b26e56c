"""What is compared: a variant is a name and the fields that its requests carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.evaluation.suite import UNKNOWN, Suite

DENSE = "dense"
POLICY, SELECTOR, PATTERN, OTHER = "policy", "selector", "pattern", "other"
NAMES = {"kv_cache": "policy", "decode_attention": "selector", "prefill_attention": "pattern"}
"""Longreach's request fields, and which word of each names the method. `usage` tells under the same names what ran."""
NEUTRAL = {"kv_cache": "none", "decode_attention": "dense", "prefill_attention": "dense"}


@dataclass(frozen=True)
class Variant:
    """One column of a comparison.

    Attributes:
        name: unique; rows are stored under it.
        fields: of the request's body, any.
        group: dense, policy, selector, pattern or other.
        method: what runs of one method at several budgets share.
        budget: as it was asked for, or None.
        question: for policies, whether compaction sees the question. Not seen: `kv_cache.suffix` covers it.
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    group: str = OTHER
    method: str = ""
    budget: str | None = None
    question: str | None = None

    def body(self, hidden: int) -> dict[str, Any]:
        """The fields for a prompt whose last `hidden` tokens are behind the document."""
        fields = dict(self.fields)
        if self.question == UNKNOWN:
            fields["kv_cache"] = {**fields["kv_cache"], "suffix": hidden}
        return fields

    def goes_with(self, suite: Suite) -> bool:
        return self.group not in suite.skips and (self.question is None or self.question in suite.questions)


def not_run(fields: Mapping[str, Any], usage: Mapping[str, Any]) -> str | None:
    """Why an answer isn't this variant's: the server ignored a field, or ran something else.

    Args:
        usage: the reply's; Longreach says there what ran.
    """
    for name, word in NAMES.items():
        asked = fields.get(name, {}).get(word) if isinstance(fields.get(name), Mapping) else None
        if asked is None:
            continue
        ran = usage.get(name) or {}
        if asked == NEUTRAL[name] and ran.get(word) in (None, asked):
            continue
        if ran.get(word) != asked:
            return f"the server ignored {name}: {asked!r} was asked for, usage says {ran.get(word)!r}"
        if ran.get("not_compressed"):
            return f"nothing was compressed: {ran['not_compressed']}"
    return None
