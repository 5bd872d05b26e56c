"""One OpenAI-compatible endpoint: what it serves, and completions of token ids."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx

from benchmarks.evaluation.suite import Reply
from benchmarks.evaluation.variants import NAMES, NEUTRAL

ROUTES = {
    "kv_cache": "/v1/kv/policies",
    "decode_attention": "/v1/decode/selectors",
    "prefill_attention": "/v1/prefill/patterns",
}
"""Where a Longreach server lists the methods of a request field: it is there if the server knows the field."""
LEAST_TIMEOUT = 60.0
"""Seconds. Clients' defaults of 30 turn slow prompts into failures."""


class Refused(Exception):
    """An error status, or an answer that isn't one."""


class TimedOut(Exception):
    """No answer in time."""


class Gone(Exception):
    """The endpoint doesn't even tell its models any more."""


class Endpoint:
    """An endpoint and one model that it serves."""

    def __init__(self, url: str, model: str | None = None, api_key: str = "none", timeout: float = 1800.0) -> None:
        """
        Args:
            url: with `/v1` at its end, or not.
            model: default: the first of /v1/models.
            timeout: seconds for one request, at least `LEAST_TIMEOUT`.

        Raises:
            LookupError: no such model, or nobody there.
        """
        if timeout < LEAST_TIMEOUT:
            raise LookupError(f"a timeout of {timeout:g} s is too short for long prompts; at least {LEAST_TIMEOUT:g}")
        self.root = url.rstrip("/").removesuffix("/v1")
        self.headers = {"Authorization": f"Bearer {api_key}"}
        self.timeout = timeout
        self.card = self._card(model)
        self.model = str(self.card["id"])
        limit = self.card.get("max_model_len")
        self.max_model_len = int(limit) if limit else None
        # Uvicorn closes connections that are idle for 5 seconds: one that is reused just then would fail.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=1.0)
        self.client = httpx.AsyncClient(base_url=self.root, headers=self.headers, timeout=timeout, limits=limits)

    def get(self, path: str) -> Any:
        """JSON of a GET, or None where there is no such route."""
        try:
            reply = httpx.get(f"{self.root}{path}", headers=self.headers, timeout=60)
            return reply.json() if reply.status_code == 200 else None
        except (httpx.HTTPError, ValueError):
            return None

    def _card(self, model: str | None) -> dict[str, Any]:
        cards = (self.get("/v1/models") or {}).get("data") or []
        if not cards:
            raise LookupError(f"{self.root}/v1/models lists no models: is a server there, and is the key right?")
        for card in cards:
            if model is None or card["id"] == model:
                return dict(card)
        there = ", ".join(card["id"] for card in cards)
        raise LookupError(f"{self.root}/v1/models: no model {model}; there is {there}")

    @property
    def version(self) -> str | None:
        told = self.get("/version")
        return str(told["version"]) if isinstance(told, dict) and "version" in told else None

    def neutral_fields(self) -> dict[str, Any]:
        """What a dense request has to say here, so that a server's own defaults don't compress it."""
        return {name: {NAMES[name]: NEUTRAL[name]} for name, route in ROUTES.items() if self.get(route)}

    def alive(self) -> bool:
        return self.get("/v1/models") is not None

    async def complete(self, prompt: list[int], max_tokens: int, fields: Mapping[str, Any], *, stream: bool) -> Reply:
        """One greedy completion.

        Raises:
            Refused: an error status, with what it says, or no completion in the answer.
            TimedOut: see there.
            Gone: see there.
        """
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, **fields}
        began = time.perf_counter()
        try:
            if stream:
                return await self._streamed(body, began)
            answer = await self.client.post("/v1/completions", json=body)
            content = _content(answer.status_code, answer.content)
            choice = content["choices"][0]
            return Reply(
                str(choice["text"]), choice.get("finish_reason"), content.get("usage") or {},
                time.perf_counter() - began, choice.get("logprobs"),
            )  # fmt: skip
        except httpx.TimeoutException as error:
            raise TimedOut(f"no answer in {self.timeout:g} s") from error
        except httpx.TransportError as error:
            if not self.alive():
                raise Gone(f"{self.root} is gone: {type(error).__name__} {error}") from error
            raise Refused(f"{type(error).__name__}: {error}") from error
        except (KeyError, IndexError, TypeError) as error:
            raise Refused(f"the answer isn't a completion: {error!r}") from error

    async def _streamed(self, body: dict[str, Any], began: float) -> Reply:
        """The same with the time of the first token."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        text, finish, ttft = "", None, None
        usage: dict[str, Any] = {}
        async with self.client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                _content(answer.status_code, await answer.aread())
            async for chunk in _events(answer):
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices", []):
                    ttft = time.perf_counter() - began if ttft is None else ttft
                    text += choice.get("text") or ""
                    finish = choice.get("finish_reason") or finish
        return Reply(text, finish, usage, time.perf_counter() - began, ttft=ttft)

    async def close(self) -> None:
        await self.client.aclose()


def _content(status: int, body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except ValueError as error:
        raise Refused(f"status {status}: {body[:300].decode(errors='replace')}") from error
    if status != 200 or not isinstance(content, dict):
        told = content.get("error") if isinstance(content, dict) else None
        message = told.get("message") if isinstance(told, dict) else content
        raise Refused(f"status {status}: {str(message)[:500]}")
    return content


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            chunk = json.loads(data)
            if "error" in chunk:
                raise Refused(str(chunk["error"])[:500])
            yield chunk
