"""Prompts as token ids, by the endpoint's own tokenizer: from a local folder, or over the server's /tokenize.

Prompts are sent as token ids, so that their length is exact and the server can't render them otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.quality.passkeys import Tokenizer

MARK = "<<<what the user says>>>"
"""Stands for the user's message while the chat template is found out."""


class RemoteTokenizer:
    """The part of a transformers tokenizer that is used here, over vLLM's `/tokenize` and `/detokenize`."""

    def __init__(self, url: str, model: str, api_key: str = "none", timeout: float = 120.0) -> None:
        """
        Args:
            url: the endpoint's, with or without `/v1`.
        """
        self.model = model
        root = url.rstrip("/").removesuffix("/v1")
        self.client = httpx.Client(base_url=root, timeout=timeout, headers={"Authorization": f"Bearer {api_key}"})
        self._template: tuple[str, str] | None = None

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            LookupError: the server has no such route, or refuses.
        """
        try:
            reply = self.client.post(path, json={"model": self.model, **body})
            reply.raise_for_status()
            content: dict[str, Any] = reply.json()
        except (httpx.HTTPError, ValueError) as error:
            raise LookupError(
                f"{path} of the server gives no tokens ({error}): name the model's folder by --tokenizer"
            ) from error
        return content

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        special = bool(kwargs.get("add_special_tokens", True))
        ids = list(self._post("/tokenize", {"prompt": text, "add_special_tokens": special})["tokens"])
        return {"input_ids": ids[: kwargs["max_length"]] if kwargs.get("truncation") else ids}

    def decode(self, ids: Sequence[int], **kwargs: Any) -> str:
        return str(self._post("/detokenize", {"tokens": list(ids)})["prompt"])

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> str:
        """One user message; the server's template is asked for once."""
        if self._template is None:
            messages = [{"role": "user", "content": MARK}]
            ids = self._post("/tokenize", {"messages": messages, "add_generation_prompt": True})["tokens"]
            self._template = split_template(self.decode(ids))
        before, after = self._template
        return f"{before}{conversation[0]['content']}{after}"


def split_template(rendered: str) -> tuple[str, str]:
    """What a chat template puts before and behind the user's message.

    Raises:
        LookupError: the message isn't in it as it was given.
    """
    before, mark, after = rendered.partition(MARK)
    if not mark:
        raise LookupError("the chat template changes the user's message: use --no-chat-template")
    return before, after


def local_tokenizer(path: str | None, card: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer at `path`, or the served model's own if its id or root is a local folder, or None.

    Args:
        card: the model's entry in /v1/models.

    Raises:
        LookupError: there is none at `path`.
    """
    places = [path] if path else [str(card[key]) for key in ("root", "id") if card.get(key)]
    for place in places:
        if path or Path(place).is_dir():
            from transformers import AutoTokenizer

            try:
                # Its own limit would only be a warning at every haystack that is longer.
                tokenizer: Tokenizer = AutoTokenizer.from_pretrained(place, model_max_length=10**9)
            except (OSError, ValueError) as error:
                raise LookupError(f"no tokenizer at {place}: {error}") from error
            return tokenizer
    return None


def load_tokenizer(path: str | None, card: dict[str, Any], url: str, api_key: str = "none") -> Tokenizer:
    """The local one, or else what the server's route says.

    Raises:
        LookupError: neither.
    """
    if local := local_tokenizer(path, card):
        return local
    remote = RemoteTokenizer(url, str(card["id"]), api_key)
    remote("A route that isn't there is found out here.")
    return remote


@dataclass(frozen=True)
class Prompt:
    """Token ids, of which the last `hidden` are behind the document: the question, the template's end, the answer's
    first words. A policy's `suffix` of that length compacts the document without seeing the question."""

    ids: list[int]
    hidden: int


class Prompter:
    """Renders and encodes prompts as the server would."""

    def __init__(self, tokenizer: Tokenizer, chat: bool = True) -> None:
        """
        Args:
            chat: put prompts into the chat template, as a user's message. False: for models without one.

        Raises:
            LookupError: there is no chat template.
        """
        self.tokenizer, self.chat = tokenizer, chat
        self.before, self.after = "", ""
        if chat:
            messages = [{"role": "user", "content": MARK}]
            try:
                rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except ValueError as error:
                raise LookupError(f"the tokenizer has no chat template (--no-chat-template): {error}") from error
            self.before, self.after = split_template(str(rendered))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def prompt(self, head: str, tail: str, begun: str = "") -> Prompt:
        """
        Args:
            head: instructions and document.
            tail: the question, with what parts it from the document.
            begun: the answer's first words, which the model goes on with.
        """
        end = f"{tail}{self.after}{begun}"
        ids = self.encode(f"{self.before}{head}{end}", special=not self.chat)
        # A token that straddles the document's end belongs to the document.
        return Prompt(ids, common_suffix(ids, self.encode(end)))

    def fingerprint(self) -> str:
        """The same for the same tokenizer and template: rows of different ones don't belong in one file."""
        ids = self.prompt("The quick brown fox: 1234567, ünïcode, 中文.\n\n", "What?").ids
        return hashlib.sha256(repr(ids).encode()).hexdigest()[:16]


def common_suffix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many last entries are the same."""
    same = 0
    while same < min(len(a), len(b)) and a[-1 - same] == b[-1 - same]:
        same += 1
    return same
