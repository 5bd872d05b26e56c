"""The console in headless Chromium: against the live server with 6,000 tokens, and in front of an API key."""

from __future__ import annotations

import json
import math
import threading
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect
from transformers import AutoTokenizer

from benchmarks.quality.passkeys import make_passkey, needle_span, render
from benchmarks.serving import Server
from server import arguments
from server.embedded import ensure_embedded_model
from server.platforms import Platform
from tests.e2e.browser import Watched, accessibility, chromium, open_browser
from tests.server.vllm_app import application

pytestmark = [pytest.mark.e2e, pytest.mark.browser]

LONG = 600_000.0
"""Milliseconds that two prompts of 6,000 tokens may take on a busy machine."""
SHORT = 60_000.0


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def watched(browser: Browser) -> Iterator[Watched]:
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    yield Watched(page)
    page.close()


@pytest.fixture(scope="module")
def passkey() -> Any:
    tokenizer: Any = AutoTokenizer.from_pretrained(str(ensure_embedded_model()))
    return tokenizer, make_passkey(tokenizer, 6000, 0.4, 7)


@pytest.fixture(scope="module")
def asked(
    browser: Browser, server: Server, passkey: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    """The page once it has uploaded the document and asked for its key, with snapkv and dense."""
    document, _, question = passkey[1].content.rpartition("\n")
    file = tmp_path_factory.mktemp("upload") / "document.txt"
    file.write_text(document, encoding="utf-8")
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    watched = Watched(page)
    ready(page, server.url)
    page.set_input_files("#file", str(file))
    expect(page.locator("#document-count")).to_contain_text("tokens of 8,192")
    page.select_option("#policy", "snapkv")
    page.fill("#budget", "512")
    page.fill("#max-tokens", "20")
    page.fill("#question", question)
    page.click("#send")
    expect(page.locator(".answer[data-done]")).to_have_count(2, timeout=LONG)
    expect(page.locator("#text span").first).to_be_visible()
    yield watched
    page.close()


def ready(page: Page, url: str) -> None:
    page.goto(f"{url}/console")
    expect(page.locator("#server[data-ready]")).to_be_visible(timeout=SHORT)


def figures(page: Page) -> dict[str, list[str]]:
    """The table under the answers, by row."""
    rows = page.locator(".turn .figures tbody tr").all()
    return {row.locator("th").inner_text(): row.locator("td").all_inner_texts() for row in rows}


def usage_of(stream: tuple[dict[str, Any], Any]) -> dict[str, Any]:
    """The usage at a stream's end, as the server has sent it."""
    lines = [line[5:] for line in stream[1].text().splitlines() if line.startswith("data:") and '"usage"' in line]
    usages = [json.loads(line)["usage"] for line in lines]
    return dict(next(usage for usage in reversed(usages) if usage))


def test_both_answers_hold_the_key(asked: Watched, passkey: Any) -> None:
    texts = asked.page.locator(".answer .text").all_inner_texts()
    assert len(texts) == 2 and all(passkey[1].answer in text for text in texts)
    assert asked.page.locator(".answer h4").all_inner_texts() == ["snapkv 512", "dense"]


def mebibytes(count: int) -> str:
    """A half is rounded up, as JavaScript does."""
    return f"{math.floor(count / 2**20 + 0.5)} MiB"


def test_figures_are_what_the_server_says(asked: Watched) -> None:
    kept, dense = (usage_of(stream)["kv_cache"] for stream in asked.streams)
    rows = figures(asked.page)
    assert kept["prompt_tokens"] > 5900
    assert rows["Tokens of the prompt"] == [f"{kept['prompt_tokens']:,}"] * 2
    assert rows["Kept per layer and head"] == [f"{kept['kept_tokens']['mean']:.0f}", f"{dense['prompt_tokens']:,}"]
    assert rows["Memory held"] == [mebibytes(usage["bytes_held"]) for usage in (kept, dense)]
    assert rows["Memory freed"] == [mebibytes(kept["bytes_freed"]), "0 MiB"]
    assert all(float(cell.removesuffix(" s")) > 0 for cell in rows["Time to first token"])


def test_sides_differ_in_what_was_chosen_and_share_no_cache(asked: Watched) -> None:
    (chosen, _), (dense, _) = asked.streams
    assert chosen["kv_cache"] == {"policy": "snapkv", "budget": 512, "report": "positions"}
    assert dense["kv_cache"] == {"policy": "none"}
    assert chosen.pop("cache_salt") != dense.pop("cache_salt")
    del chosen["kv_cache"], dense["kv_cache"]
    assert chosen == dense


def test_the_heat_map_shows_what_the_server_reports(asked: Watched) -> None:
    told = usage_of(asked.streams[0])["kv_cache"]["kept_positions"]
    shape = "c => [c.width, c.height]"
    assert asked.page.eval_on_selector("#heat", shape) == [len(told["by_layer"][0]), len(told["by_layer"])]
    pixels = asked.page.eval_on_selector(
        "#heat", "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 0)"
    )
    counts = [count for row in told["by_layer"] for count in row]
    full = told["bin_tokens"] * told["kv_heads"]
    by_count: dict[int, set[int]] = {}
    for count, red in zip(counts, pixels, strict=True):
        by_count.setdefault(count, set()).add(red)
    whole = [by_count[count] for count in sorted(by_count) if count not in {row[-1] for row in told["by_layer"]}]
    assert all(len(colours) == 1 for colours in whole), "one number, one colour"
    assert by_count[0] == {0xED} and min(by_count[full]) == 0x0A
    reds = [next(iter(colours)) for colours in whole]
    assert reds == sorted(reds, reverse=True), "the more is kept, the darker"


def test_the_text_under_the_map_is_the_models_prompt(asked: Watched, passkey: Any) -> None:
    tokenizer, case = passkey
    told = usage_of(asked.streams[0])["kv_cache"]["kept_positions"]
    parts = asked.page.eval_on_selector_all("#text span", "all => all.map(part => part.textContent)")
    content = asked.streams[0][0]["messages"][0]["content"]
    text = render(tokenizer, content)
    assert "".join(parts) == text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    width = told["bin_tokens"]
    assert parts == [tokenizer.decode(ids[at : at + width]) for at in range(0, len(ids), width)]
    first, _ = needle_span(tokenizer, case)
    here = asked.page.locator(f'#text span[data-bin="{first // width}"]')
    share = float(here.evaluate("part => part.style.getPropertyValue('--share')"))
    kept = sum(row[first // width] for row in told["by_layer"]) / (len(told["by_layer"]) * width * told["kv_heads"])
    assert share == pytest.approx(kept**0.5) and share > 0


def test_sliders_move_through_layers_and_positions(asked: Watched) -> None:
    page, told = asked.page, usage_of(asked.streams[0])["kv_cache"]["kept_positions"]
    page.focus("#layer")
    asked.press("ArrowRight", "ArrowRight", "ArrowRight")  # all, 0, 1, 2
    page.focus("#position")
    asked.press("End", "ArrowLeft")
    at = len(told["by_layer"][0]) - 2
    share = told["by_layer"][2][at] / (told["bin_tokens"] * told["kv_heads"])
    first = at * told["bin_tokens"]
    words = f"layer 2, tokens {first:,} to {first + told['bin_tokens'] - 1:,}: {share * 100:.0f} % kept"
    assert asked.text("#cell b") == words
    spoken = page.get_attribute("#position", "aria-valuetext") or ""
    assert f"{share * 100:.0f} % kept" in spoken and page.get_attribute("#layer", "aria-valuetext") == "layer 2"
    assert page.locator("#text .here").get_attribute("data-bin") == str(at)
    page.locator("#strip").click(position={"x": 2, "y": 3})
    assert asked.text("#cell b").startswith("all layers, tokens 0 to")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 360])
def test_axe_finds_nothing_and_nothing_is_cut_off(asked: Watched, scheme: Any, width: int) -> None:
    asked.page.set_viewport_size({"width": width, "height": 900})
    asked.page.emulate_media(color_scheme=scheme)
    try:
        assert accessibility(asked.page) == ""
        assert asked.page.evaluate("document.documentElement.scrollWidth") <= width
    finally:
        asked.page.set_viewport_size({"width": 1400, "height": 900})
        asked.page.emulate_media(color_scheme="light")


def test_the_page_is_silent_and_stays_on_loopback(asked: Watched, server: Server) -> None:
    assert asked.errors == []
    assert len(asked.requests) > 12
    assert all(address.startswith(server.url + "/") for address in asked.requests)


def test_the_keyboard_is_enough(watched: Watched, server: Server) -> None:
    """A short document, a policy, the answers, a second question, from the first tabulator to the last."""
    page = watched.page
    ready(page, server.url)
    watched.press("Tab")
    assert watched.text(":focus") == "Skip to the answers"
    watched.tab_to("document")
    page.keyboard.type("The pass key is 48213. " + "The garden is green. " * 30)
    watched.tab_to("question")
    page.keyboard.type("What is the pass key?")
    watched.tab_to("policy")
    page.keyboard.type("stream")
    assert page.input_value("#policy") == "streamingllm"
    watched.tab_to("budget")
    watched.press("Control+a")
    page.keyboard.type("128")
    watched.tab_to("max-tokens")
    watched.press("Control+a")
    page.keyboard.type("6")
    watched.tab_to("send")
    watched.press("Enter")
    expect(page.locator(".answer[data-done]")).to_have_count(2, timeout=SHORT)
    expect(page.locator("#kept-summary")).to_contain_text("each head keeps")
    assert page.evaluate("document.activeElement.id") == "send"
    assert "dense answers after" in watched.text("#status")
    watched.tab_to("layer")
    watched.press("ArrowRight")
    assert watched.text("#cell b").startswith("layer 0")
    assert watched.errors == []


def test_a_second_question_carries_the_first(watched: Watched, server: Server) -> None:
    page = watched.page
    ready(page, server.url)
    page.fill("#document", "Blue boats wait in the harbour.")
    page.select_option("#dense", "together")
    page.fill("#max-tokens", "3")
    for number, question in enumerate(("Which boats?", "Where?"), 1):
        page.fill("#question", question)
        page.click("#send")
        expect(page.locator(".answer[data-done]")).to_have_count(2 * number, timeout=SHORT)
    for side in ("none", "snapkv"):
        first, second = (body["messages"] for body, _ in watched.streams if body["kv_cache"]["policy"] == side)
        assert [message["role"] for message in second] == ["user", "assistant", "user"]
        assert second[:1] == first and second[2]["content"] == "Where?"
    expect(page.locator("#kept-summary")).to_contain_text("Nothing was dropped")
    page.click("#new")
    expect(page.locator(".turn")).to_have_count(0)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("budget", "40", ">= 100 tokens"), ("max-tokens", "many", "a whole number"), ("question", "", "Ask something")],
)
def test_mistakes_are_told_next_to_the_field(
    watched: Watched, server: Server, field: str, value: str, words: str
) -> None:
    page = watched.page
    ready(page, server.url)
    page.fill("#question", "What?")
    page.fill(f"#{field}", value)
    page.click("#send")
    expect(page.locator(f"#{field}-error")).to_contain_text(words)
    assert page.get_attribute(f"#{field}", "aria-invalid") == "true"
    assert page.evaluate("document.activeElement.id") == field
    expect(page.locator(".turn")).to_have_count(0)


def test_an_argument_of_a_policy_goes_along_and_its_mistakes_come_back(watched: Watched, server: Server) -> None:
    page = watched.page
    ready(page, server.url)
    page.fill("#question", "What?")
    page.locator("fieldset[data-field=kv_cache] summary").click()
    page.fill("#kv_cache-kernel", "4")
    page.click("#send")
    expect(page.locator("#kv_cache-kernel-error")).to_contain_text("must be odd")
    page.select_option("#kv_cache-heads", "adakv")
    assert page.evaluate("document.activeElement.id") == "kv_cache-heads"
    page.fill("#kv_cache-floor", "2")
    page.fill("#kv_cache-kernel", "")
    page.click("#send")
    expect(page.locator("#kv_cache-floor-error")).to_contain_text("<= 1")
    assert watched.streams[-1][0]["kv_cache"]["floor"] == 2


def test_a_file_that_is_no_text_is_refused(watched: Watched, server: Server, tmp_path: Path) -> None:
    ready(watched.page, server.url)
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\xff\xfe")
    watched.page.set_input_files("#file", str(tmp_path / "picture.txt"))
    expect(watched.page.locator("#document-error")).to_contain_text("no text in UTF-8")


def test_a_server_that_is_gone_is_told_in_words(watched: Watched, server: Server) -> None:
    ready(watched.page, server.url)
    watched.page.route("**/v1/chat/completions", lambda route: route.abort())
    watched.page.fill("#question", "Are you there?")
    watched.page.click("#send")
    expect(watched.page.locator("#form-error")).to_contain_text("can't be reached")


def test_only_enabled_selectors_are_offered(watched: Watched, server: Server) -> None:
    ready(watched.page, server.url)
    assert watched.page.locator("#selector option").all_inner_texts() == ["dense", "recycled", "tidal", "quest"]


def test_without_chromium_tests_fail_and_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(pytest.fail.Exception, match=r"apt-get install chromium.*make test ARGS='-m \"not browser\"'"):
        chromium()


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """vLLM's application with `--api-key secret`, on a port of loopback; nothing is generated here."""
    args: Namespace = arguments.parse(["m", "--api-key", "secret"], Platform("cpu", None))
    made: list[Any] = []
    building = threading.Thread(target=lambda: made.append(application(args, monkeypatch)))  # it runs an event loop
    building.start()
    building.join()
    listening = uvicorn.Server(uvicorn.Config(made[0], host="127.0.0.1", port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=listening.run)
    thread.start()
    while not listening.started:
        thread.join(0.05)
        assert thread.is_alive()
    yield f"http://127.0.0.1:{listening.servers[0].sockets[0].getsockname()[1]}"
    listening.should_exit = True
    thread.join()


def test_the_page_asks_for_the_key_and_keeps_it_to_itself(watched: Watched, guarded: str) -> None:
    page = watched.page
    page.goto(f"{guarded}/console")
    expect(page.locator("#key-panel")).to_be_visible()
    expect(page.locator("#server")).to_have_text("The server asks for an API key.")
    assert page.evaluate("document.activeElement.id") == "key" and page.is_disabled("#send")
    assert accessibility(page) == ""
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-error")).to_have_text("The server doesn't take this API key.")
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    expect(page.locator("#server[data-ready]")).to_be_visible()
    assert page.is_hidden("#key-panel") and page.input_value("#key") == ""
    assert page.evaluate("sessionStorage.length + localStorage.length + document.cookie.length") == 0
    page.reload()
    expect(page.locator("#key-panel")).to_be_visible()
    page.fill("#key", "secret")
    page.check("#key-keep")
    page.click("#key-panel button")
    expect(page.locator("#server[data-ready]")).to_be_visible()
    page.reload()
    expect(page.locator("#server[data-ready]")).to_be_visible()
    assert page.evaluate("localStorage.length") == 0
    assert not any("secret" in address for address in watched.requests)


def test_tokens_become_text_again(watched: Watched, guarded: str, passkey: Any) -> None:
    """SentencePiece's pieces and bytes; byte-level tokens, of which several share a character; special tokens."""
    watched.page.goto(f"{guarded}/console")
    run = "async ([url, tokens, width]) => (await import(url)).textOfBins(tokens, width)"

    def text(tokens: list[str], width: int) -> list[str]:
        return list(watched.page.evaluate(run, [f"{guarded}/console/tokens.js", tokens, width]))

    assert text(["<s>", "▁Hello", "▁w", "orld", "<0xE2>", "<0x82>", "<0xAC>"], 5) == ["<s> Hello world", "€"]
    tokenizer = passkey[0]
    prompt = "<|im_start|>user\nGrüße an 東京, 😀!\n\n\tÅ<|im_end|>"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    for width in (1, 2, 5):
        assert "".join(text(tokens, width)) == prompt
    foreign = chr(0xFF5C)
    assert text([f"<{foreign}user{foreign}>", "Ġyes"], 1) == [f"<{foreign}user{foreign}>", " yes"]
