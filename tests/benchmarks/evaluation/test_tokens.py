"""Prompts as the server would tokenize them, with a local tokenizer and over the server's own route."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from benchmarks.evaluation.fitting import Draft, fit, largest
from benchmarks.evaluation.tokens import Prompter, RemoteTokenizer, common_suffix, load_tokenizer, split_template
from benchmarks.quality.passkeys import Tokenizer
from tests.benchmarks.evaluation.fake import Fake


def test_the_servers_route_gives_the_same_prompts(fake: Fake, prompter: Prompter) -> None:
    remote = Prompter(load_tokenizer(None, {"id": "tiny", "root": "/nowhere"}, fake.url))
    assert isinstance(remote.tokenizer, RemoteTokenizer) and remote.fingerprint() == prompter.fingerprint()
    text = "Some words, ünïcode and 12345."
    assert remote.prompt(text, "\n\nWhat?", "So:") == prompter.prompt(text, "\n\nWhat?", "So:")
    assert remote.tokenizer.decode(remote.encode(text)) == text


def test_a_local_folder_comes_before_the_route(fake: Fake, model_path: Path) -> None:
    assert not isinstance(load_tokenizer(None, {"id": "tiny", "root": str(model_path)}, fake.url), RemoteTokenizer)
    with pytest.raises(LookupError, match="no tokenizer at /nowhere"):
        load_tokenizer("/nowhere", {"id": "tiny"}, fake.url)


def test_without_a_route_a_folder_is_asked_for() -> None:
    with pytest.raises(LookupError, match="--tokenizer"):
        load_tokenizer(None, {"id": "tiny"}, "http://127.0.0.1:9/v1")
    assert issubclass(httpx.ConnectError, httpx.HTTPError)


def test_prompts_are_what_the_chat_template_makes(prompter: Prompter, tokenizer: Tokenizer) -> None:
    prompt = prompter.prompt("A document.", "\n\nA question?", "The answer is")
    messages = [{"role": "user", "content": "A document.\n\nA question?"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(prompt.ids) == rendered + "The answer is"
    hidden = tokenizer.decode(prompt.ids[-prompt.hidden :])
    assert hidden.lstrip("\n").startswith("A question?") and hidden.endswith("The answer is")


def test_without_a_template_text_is_sent_as_it_is(tokenizer: Tokenizer) -> None:
    prompt = Prompter(tokenizer, chat=False).prompt("A document.", "\nMore", " of it")
    assert tokenizer.decode(prompt.ids) == "A document.\nMore of it"


def test_templates_that_change_the_message_are_refused() -> None:
    assert split_template("a<<<what the user says>>>b") == ("a", "b")
    with pytest.raises(LookupError, match="--no-chat-template"):
        split_template("nothing of it")


def test_common_suffix() -> None:
    assert [common_suffix(*pair) for pair in (([1, 2, 3], [9, 2, 3]), ([1], [2]), ([1, 2], [1, 2]), ([], [1]))] == [
        2, 0, 2, 0,
    ]  # fmt: skip


@pytest.mark.parametrize("size", [1, 3, 7, 40])
@pytest.mark.parametrize("room", [100, 999, 5000])
def test_as_much_as_fits(size: int, room: int) -> None:
    """Exactly the largest where a unit is large beside the tolerance, close to it where it is small."""
    tried: list[int] = []

    def count(units: int) -> int:
        tried.append(units)
        return 50 + size * units

    units = largest(count, room)
    assert count(units) <= room and (count(units + 1) > room or room - count(units) <= room // 500)
    assert len(tried) < 40


def test_what_cannot_fit_is_said(prompter: Prompter) -> None:
    with pytest.raises(ValueError, match="10 tokens are too few"):
        fit(prompter, lambda units, padding: Draft("word " * units, "What?", ("x",)), 10)
    with pytest.raises(ValueError, match="within 1 %"):
        fit(prompter, lambda units, padding: Draft("word " * min(units, 5), "What?", ("x",)), 500)
