"""Clients of a soak: each asks, reads or leaves, and looks at what it got."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.soak.mix import Ask, Mix

LIMIT = 600.0
"""Seconds that an answer may take before it counts as a hang."""


@dataclass
class Found:
    """What clients have seen so far.

    Attributes:
        asked: requests by kind; `tags`: by what was in them.
        answers: HTTP statuses, and `left` for clients that did not wait.
        failures: sentences, one for each answer that is not what it should be; the first 50.
        canaries: by name, how many answers there were and how many were the first one's.
        tokens: of all whole answers; `kept`: answers whose compressed length was checked.
        say: gets each failure as it is found.
    """

    asked: Counter[str] = field(default_factory=Counter)
    tags: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    canaries: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokens: int = 0
    kept: int = 0
    say: Callable[[str], None] = lambda line: None

    def fail(self, text: str) -> None:
        if len(self.failures) < 50:
            self.failures.append(text[:500])
            self.say(f"FAILURE: {text[:500]}")

    def same_canaries(self) -> str:
        """How many answers of canaries were the first one's."""
        same, asked = (sum(told[key] for told in self.canaries.values()) for key in ("same", "asked"))
        return f"{same} of {asked} canaries the same"


class Clients:
    """Several clients of one server, for as long as `running` says so."""

    def __init__(self, url: str, found: Found, running: Callable[[], bool]) -> None:
        self.found, self.running = found, running
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self.http = httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(LIMIT), limits=limits)

    async def ask_on(self, mix: Mix) -> None:
        """One client: a request after the other."""
        while self.running():
            ask = mix.draw()
            self.found.asked[ask.kind] += 1
            self.found.tags.update(ask.tags)
            try:
                await self._one(ask)
            except httpx.HTTPError as error:
                self.found.fail(f"{ask.kind}: {type(error).__name__}: {error}")
                if isinstance(error, httpx.ConnectError):
                    return

    async def _one(self, ask: Ask) -> None:
        if ask.cut_seconds is not None:
            try:
                await asyncio.wait_for(self._whole(ask), ask.cut_seconds)
            except TimeoutError:
                self.found.answers["left"] += 1
        elif ask.body.get("stream"):
            await self._stream(ask)
        else:
            await self._whole(ask)

    async def _whole(self, ask: Ask) -> None:
        answer = await self.http.post(ask.path, json=ask.body)
        self.found.answers[str(answer.status_code)] += 1
        if ask.refused or answer.status_code != 200:
            if answer.status_code != (400 if ask.refused else 200):
                self.found.fail(f"{ask.kind} {_short(ask.body)}: {answer.status_code} {answer.text}")
            return
        body = answer.json()
        self._check(ask, body["usage"])
        if len(body["choices"]) != ask.body.get("n", 1):
            self.found.fail(f"{len(body['choices'])} answers to {_short(ask.body)}")
        if ask.kind == "structured" and body["choices"][0]["finish_reason"] == "stop":
            self._check_json(body["choices"][0]["message"]["content"])

    def _check_json(self, text: str) -> None:
        try:
            fields = set(json.loads(text))
        except ValueError:
            fields = set()
        if not fields >= {"name", "age"}:
            self.found.fail(f"not the object that was asked for: {text}")

    async def _stream(self, ask: Ask) -> None:
        chunks, usage = 0, None
        async with self.http.stream("POST", ask.path, json=ask.body) as answer:
            self.found.answers[str(answer.status_code)] += 1
            if answer.status_code != 200:
                self.found.fail(f"{ask.kind} {_short(ask.body)}: {answer.status_code} {await answer.aread()!r}")
                return
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    self.found.fail(f"{ask.kind}: {chunk}")
                usage = chunk.get("usage") or usage
                chunks += 1
                if ask.cut_after is not None and chunks >= ask.cut_after:
                    self.found.answers["left"] += 1
                    return
        if usage is None:
            self.found.fail(f"a stream without usage: {_short(ask.body)}")
        else:
            self._check(ask, usage)

    def _check(self, ask: Ask, usage: dict[str, Any]) -> None:
        """Whether the answer is as long as asked for, and what was kept within the budget."""
        self.found.tokens += usage["completion_tokens"]
        wanted = ask.body["max_tokens"] * ask.body.get("n", 1)
        if usage["completion_tokens"] > wanted or (ask.body.get("ignore_eos") and usage["completion_tokens"] < wanted
                                                   and ask.kind != "structured"):  # fmt: skip
            self.found.fail(f"{usage['completion_tokens']} tokens, {wanted} wanted: {_short(ask.body)}")
        told = usage.get("kv_cache") or {}
        wants = ask.body.get("kv_cache")
        if wants and told.get("policy") != wants["policy"]:
            self.found.fail(f"asked for {wants}, told {told}")
        if ask.budget is None or told.get("not_compressed") or not told.get("bytes_freed"):
            return
        self.found.kept += 1
        if told["kept_tokens"]["mean"] > ask.budget:
            self.found.fail(f"{told['kept_tokens']} kept, the budget is {ask.budget}: {_short(ask.body)}")

    async def watch_canaries(self, canaries: dict[str, dict[str, Any]], pause: float) -> None:
        """Ask for each again and again, beside all that the others do."""
        names = list(canaries)
        number = 0
        while self.running():
            name = names[number % len(names)]
            number += 1
            try:
                await self.canary(name, canaries[name])
            except httpx.ConnectError:
                return
            except httpx.HTTPError as error:
                self.found.fail(f"canary {name}: {type(error).__name__}: {error}")
            await asyncio.sleep(pause)

    async def canary(self, name: str, body: dict[str, Any]) -> None:
        """Ask once, and compare with the first answer."""
        answer = await self.http.post("/v1/completions", json=body)
        if answer.status_code != 200:
            self.found.fail(f"canary {name}: {answer.status_code} {answer.text}")
            return
        body = answer.json()
        choice = body["choices"][0]
        tokens, top = choice["token_ids"], choice["logprobs"]["top_logprobs"]
        known = self.found.canaries.setdefault(name, {"first": (tokens, top), "asked": 0, "same": 0, "different": []})
        known["asked"] += 1
        before, before_top = known["first"]
        if tokens == before:
            known["same"] += 1
        else:
            known["different"].append(_difference(before, before_top, tokens, top))


def _difference(
    first: list[int], first_top: list[dict[str, float]], tokens: list[int], top: list[dict[str, float]]
) -> dict[str, Any]:
    """Where two answers part, and how: `margin` of the first's token over its second, and `noise`, how far the two
    runs' log-probabilities were apart at the places before and there."""
    pairs = enumerate(zip(first, tokens, strict=False))
    place = next((number for number, (one, other) in pairs if one != other), min(len(first), len(tokens)))
    here = sorted(first_top[place].values(), reverse=True)
    noise = 0.0
    for one, other in zip(first_top[: place + 1], top[: place + 1], strict=True):
        noise = max([noise, *(abs(one[token] - other[token]) for token in one.keys() & other.keys())])
    return {"token": place, "margin": round(here[0] - here[1], 5), "noise": round(noise, 5)}


def _short(body: dict[str, Any]) -> str:
    prompt = body.get("prompt")
    told = {name: value for name, value in body.items() if name not in ("prompt", "messages")}
    return json.dumps({**told, "prompt": f"{len(prompt)} tokens" if isinstance(prompt, list) else "a question"})


async def wait_until(moment: float, running: Callable[[], bool]) -> None:
    """Sleep until then, or as long as `running`."""
    while running() and time.monotonic() < moment:
        await asyncio.sleep(0.2)
