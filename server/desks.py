"""The fields that a request may have beside vLLM's, each with the desk that checks it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from attention_plugins.decode.registry import DENSE, selectors
from kvcache.method import PolicyError
from kvcache.registry import NONE
from server.patterns import PatternDesk
from server.policies import PolicyDesk
from server.selectors import SelectorDesk

BEAM = "use_beam_search"

Words = dict[str, Any]
"""What a field holds."""


class Desk(Protocol):
    """What a field's desk is to the middleware.

    Attributes:
        field: the field's name.
        off: the words for what stock vLLM does.
        default: the server's own words, for requests that have none.
    """

    @property
    def field(self) -> str: ...
    @property
    def off(self) -> Words: ...
    @property
    def default(self) -> Words: ...
    def check(self, words: Any) -> Words: ...


def clash(policy: Words, selector: Words) -> bool:
    """Whether the selector can't read what the policy leaves; both are checked words."""
    name = selector["selector"]
    return policy["policy"] != NONE and name != DENSE and not selectors()[name].with_policies


def companions(enabled: Collection[str] | None = None) -> str:
    """Selectors that go with every policy, of all or of those that are enabled."""
    found = (name for name, selector in selectors().items() if selector.with_policies)
    return ", ".join([DENSE, *(name for name in found if enabled is None or name in enabled)])


@dataclass(frozen=True)
class Desks:
    """All fields of a server."""

    policies: PolicyDesk
    selectors: SelectorDesk
    patterns: PatternDesk

    def __iter__(self) -> Iterator[Desk]:
        return iter((self.policies, self.selectors, self.patterns))

    @property
    def fields(self) -> list[str]:
        return [desk.field for desk in self]

    def completed(self, words: Mapping[str, Words]) -> dict[str, Words]:
        """Every field's words: the request's, or the server's own."""
        return {desk.field: words.get(desk.field, desk.default) for desk in self}

    def refuse_misspelt(self, content: Mapping[str, Any]) -> None:
        """vLLM takes no notice of fields that it doesn't know, so `kvcache` would be answered without a policy.

        Raises:
            PolicyError: a field is nearly one of ours.
        """
        ours = {_plain(field): field for field in self.fields}
        for name in content:
            if name not in self.fields and (near := difflib.get_close_matches(_plain(name), ours, n=1, cutoff=0.85)):
                raise PolicyError(name, f"no field of a request; did you mean {ours[near[0]]}?", ", ".join(self.fields))

    def take(self, content: dict[str, Any]) -> dict[str, Words]:
        """Remove the fields from a request, in place, and return the checked ones.

        Raises:
            PolicyError: a field is wrong, or they don't go together.
        """
        found = {desk.field: words for desk in self if (words := _take_field(content, desk)) is not None}
        self.check_together(found)
        return found

    def check_together(self, words: Mapping[str, Words]) -> None:
        """Whether the fields go together, with the server's own words for those that aren't there.

        Raises:
            PolicyError: they don't; names both.
        """
        completed = self.completed(words)
        policy, selector = completed[self.policies.field], completed[self.selectors.field]
        if clash(policy, selector):
            raise PolicyError(
                f"{self.selectors.field}.selector",
                f"{selector['selector']} needs a whole cache, which {self.policies.field}.policy {policy['policy']} "
                "compresses (a field left out is the server's default).",
                f"{companions(self.selectors.enabled)}; or any selector with {self.policies.field}.policy {NONE}",
            )


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _take_field(content: dict[str, Any], desk: Desk) -> Words | None:
    """Remove a field from a request, in place, and return its checked words; None stands for the server's own.

    Raises:
        PolicyError: the field is wrong.
    """
    extra = content.get("vllm_xargs")
    if isinstance(extra, dict) and desk.field in extra:
        raise PolicyError(f"vllm_xargs.{desk.field}", "is not read.", f"the field `{desk.field}` of the request itself")
    words = content.pop(desk.field, None)
    checked = None if words is None else desk.check(words)
    if not content.get(BEAM):
        return checked
    if checked not in (None, desk.off):
        raise PolicyError(
            desk.field, "beam search starts a new prompt for every token.", "requests without beam search"
        )
    return desk.off
