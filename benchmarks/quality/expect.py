"""Policies as the command line names them, and expectations about how many keys they find.

An expectation is `<policy><op><number or policy>`, for example `none>=31`, `random:512<snapkv:512`, or the control
`streamingllm==window`: exactly those documents are found whose key lies in what StreamingLLM keeps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SINKS = 4
WINDOW = "window"
UNCOMPRESSED = ("none", "plain")
OPERATORS = {
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    "==": lambda a, b: a == b,
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
}


@dataclass(frozen=True)
class Policy:
    """`name[:budget][,arg=value...]`."""

    label: str
    name: str
    budget: int | None = None
    args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """What goes into the request; `plain` sends nothing, for servers that refuse unknown fields."""
        if self.name == "plain":
            return {}
        budget = {} if self.budget is None else {"budget": self.budget}
        return {"kv_cache": {"policy": self.name, **budget, **self.args}}


def parse_policy(text: str) -> Policy:
    head, *pairs = text.split(",")
    match = re.fullmatch(r"([A-Za-z][\w.-]*)(?::(\d+))?", head)
    if match is None:
        raise ValueError(f"policy {text!r} is not of the form name[:budget][,arg=value...]")
    args: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier() or key in ("policy", "budget") or key in args:
            raise ValueError(f"policy {text!r}: {pair!r} is not a new arg=value")
        try:
            args[key] = json.loads(value)
        except json.JSONDecodeError:
            args[key] = value
    budget = None if match[2] is None else int(match[2])
    if match[1] == "plain" and (budget is not None or args):
        raise ValueError(f"policy {text!r}: 'plain' sends no arguments")
    return Policy(text, match[1], budget, args)


@dataclass(frozen=True)
class Expectation:
    text: str
    left: str
    op: str
    right: str


def parse_expectation(text: str, policies: Sequence[Policy]) -> Expectation:
    """Refuses, before anything runs, what could not be checked afterwards."""
    match = re.fullmatch(r"\s*([^<>=\s]+(?:=[^<>=\s]+)*)\s*(>=|<=|==|<|>)\s*([^<>=\s]+(?:=[^<>=\s]+)*)\s*", text)
    if match is None:
        raise ValueError(f"expectation {text!r} is not of the form policy>=number, policy<policy or policy==window")
    expectation = Expectation(text, match[1], match[2], match[3])
    lefts = matching(expectation.left, policies)
    if not lefts:
        raise ValueError(f"expectation {text!r}: {expectation.left!r} is not among the policies of this run")
    if expectation.right == WINDOW:
        if expectation.op != "==":
            raise ValueError(f"expectation {text!r}: only '==' goes with 'window'")
        if any(policy.budget is None for policy in lefts):
            raise ValueError(f"expectation {text!r}: the window follows from a budget, and there is none")
    elif not expectation.right.isdigit() and len(matching(expectation.right, policies)) != 1:
        raise ValueError(f"expectation {text!r}: {expectation.right!r} is not one policy of this run")
    return expectation


def matching(name: str, policies: Sequence[Policy]) -> list[Policy]:
    """The policy with this label, or else every policy with this name."""
    exact = [policy for policy in policies if policy.label == name]
    return exact or [policy for policy in policies if policy.name == name]


def kept_ranges(prompt: int, budget: int, page: int, sinks: int = SINKS) -> list[tuple[int, int]]:
    """Prompt tokens that StreamingLLM keeps, as half-open ranges.

    The partly filled last page always stays. The rest of the budget is whole pages, and their slots hold the first
    `sinks` tokens and the last ones of the prompt's full pages.
    """
    tail = prompt % page
    full = prompt - tail
    slots = (budget - tail) // page * page
    if slots >= full:
        return [(0, prompt)]
    if slots <= 0:
        return [(full, prompt)]
    first = min(sinks, slots)
    return [(0, first), (full - (slots - first), prompt)]


def visibility(span: tuple[int, int], ranges: Sequence[tuple[int, int]]) -> str:
    """`inside`, `outside` or `partly`: how much of a token span lies in the ranges."""
    start, end = span
    seen = sum(max(0, min(end, stop) - max(start, begin)) for begin, stop in ranges)
    return "inside" if seen == end - start else "partly" if seen else "outside"


def window_mismatches(
    policy: Policy,
    found: Mapping[int, bool],
    spans: Mapping[int, tuple[int, int]],
    lengths: Mapping[int, int],
    page: int,
) -> list[str]:
    """Documents that contradict the kept window. A key that is visible in part says nothing."""
    assert policy.budget is not None
    sinks, wrong = int(policy.args.get("sinks", SINKS)), []
    for document, hit in found.items():
        ranges = kept_ranges(lengths[document], policy.budget, page, sinks)
        where = visibility(spans[document], ranges)
        if where != "partly" and hit != (where == "inside"):
            start, end = spans[document]
            wrong.append(
                f"document {document}: key at tokens {start}..{end - 1} of {lengths[document]} is {where} the kept "
                f"{ranges}, but was {'found' if hit else 'not found'}"
            )
    return wrong


def failures(
    expectations: Sequence[Expectation],
    policies: Sequence[Policy],
    found: Mapping[str, Mapping[int, bool]],
    spans: Mapping[int, tuple[int, int]],
    lengths: Mapping[int, int],
    page: int,
) -> list[str]:
    """One line for each expectation that does not hold. `found`: policy label -> document -> found."""
    wrong: list[str] = []
    for expectation in expectations:
        for policy in matching(expectation.left, policies):
            hits = sum(found[policy.label].values())
            if expectation.right == WINDOW:
                lines = window_mismatches(policy, found[policy.label], spans, lengths, page)
                wrong += [f"{expectation.text} ({policy.label}): {line}" for line in lines]
                continue
            if expectation.right.isdigit():
                bound, against = int(expectation.right), ""
            else:
                other = matching(expectation.right, policies)[0]
                bound = sum(found[other.label].values())
                against = f", {other.label} found {bound}"
            if not OPERATORS[expectation.op](hits, bound):
                wrong.append(f"{expectation.text}: {policy.label} found {hits}{against}")
    return wrong
