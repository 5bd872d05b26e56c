"""`longreach explain`: what it says of known kept positions, and what it does with a command line. No engine."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from server import explain as module
from server.cli import main
from server.commands.explain import split
from server.errors import StartError
from server.explain import (
    Explanation,
    explain,
    kept_mask,
    middle,
    narrowed,
    read_prompt,
    rendered,
    strip,
    summary,
)
from server.explain_views import coloured, page, png, require_matplotlib, write

TEXT = "ab<cd&ef" * 5


def explanation(**changed: Any) -> Explanation:
    """2 layers of 2 KV heads, 40 tokens of one character: 2 sinks, a window of 6, a tail of 4 beside it."""
    kept = [[[0, 1, 10, 11], [0, 1, 10, 12]], [[0, 1, 30, 31], [0, 1, 34, 35]]]
    mask = kept_mask([[torch.tensor(head) for head in layer] for layer in kept], 40, 36)
    words = {"policy": "snapkv", "budget": "20%", "sinks": 2}
    known = {"text": TEXT, "spans": [(i, i + 1) for i in range(40)], "mask": mask, "words": words, "sinks": 2,
             "recent": 6, "seen": 40, "tail_from": 36, "answer": " yes & no"}  # fmt: skip
    return Explanation(**{**known, **changed})


def test_masks_hold_kept_positions_and_everything_from_the_tail_on() -> None:
    mask = explanation().mask
    assert mask.shape == (2, 2, 40)
    assert mask[0, 1].nonzero().flatten().tolist() == [0, 1, 10, 12, 36, 37, 38, 39]
    assert mask.sum() == 4 * 8


def test_the_middle_is_between_sinks_and_what_always_stays() -> None:
    assert middle(explanation()).nonzero().flatten().tolist() == list(range(2, 34))
    assert middle(explanation(recent=0)).nonzero().flatten().tolist() == list(range(2, 36))
    # A suffix of 10 tokens: the window lies before it, and its own page begins the part that stays.
    assert middle(explanation(seen=30, tail_from=28)).nonzero().flatten().tolist() == list(range(2, 24))


def test_rows_are_averaged_to_the_width() -> None:
    rows = torch.arange(12.0).view(2, 6)
    assert narrowed(rows, 3).tolist() == [[0.5, 2.5, 4.5], [6.5, 8.5, 10.5]]
    assert torch.equal(narrowed(rows, 6), rows)
    assert narrowed(torch.ones(3, 1001), 900).tolist() == torch.ones(3, 900).tolist()


def test_strips_show_the_least_share() -> None:
    assert strip(torch.tensor([0.0, 0.001, 0.125, 0.126, 0.5, 1.0])) == " ▁▁▂▄█"


def test_the_summary_counts() -> None:
    text = summary(explanation())
    assert "snapkv (budget 20%, sinks 2)" in text
    assert "40 tokens, of which 8 stay on average over 2 layers of 2 KV heads (20.0%)" in text
    assert "always: 2 sinks, 6 at the end" in text
    # Of 16 kept between, 2 are in the window; 4 of the 6 others at 10 ... 12, which is the second fifth of 2 ... 33.
    assert "chosen: 2 of the 32 between, by fifth: 0%, 67%, 0%, 0%, 33%" in text
    assert "kept by every layer and head 6, by none 27" in text
    assert text.splitlines()[7].split()[:4] == ["0", "8", "8", "8"]
    assert text.endswith("answer: 'yes & no'")


def test_the_page_is_whole_and_escapes_the_text() -> None:
    found = explanation()
    text = coloured(found)
    assert '<i style="--k:1.00" title="token 0: 4 of 4">a</i>' in text
    assert '<i class="none" title="token 2: 0 of 4">&lt;</i>' in text
    assert '<i style="--k:0.50" title="token 10: 2 of 4">' in text
    whole = page(found)
    assert "data:image/png;base64,iVBOR" in whole and "http" not in whole
    assert "yes &amp; no" in whole


def test_tokens_that_share_a_character_show_it_once() -> None:
    """Bytes of one character are tokens of their own, and special tokens may have no text."""
    spans = [(0, 0), (0, 1), (0, 1), (1, 3), *[(3, 4)] * 36]
    assert coloured(explanation(text="é<|x", spans=spans)).count("<i ") == 3


@pytest.mark.parametrize("layers", [1, 30, 80])
def test_pictures_are_small_at_any_size(layers: int) -> None:
    mask = torch.rand(layers, 3, 5000, generator=torch.Generator().manual_seed(0)) < 0.2
    picture = png(explanation(mask=mask))
    assert picture.startswith(b"\x89PNG") and len(picture) < 400_000


def test_output_is_a_picture_or_a_page_by_its_name(tmp_path: Path) -> None:
    for name, begin in (("a.png", b"\x89PNG"), ("a.html", b"<!doctype html>")):
        write(explanation(), tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begin)
    with pytest.raises(StartError, match="No such file"):
        write(explanation(), tmp_path / "nowhere" / "a.png")


def test_prompts_come_from_files_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompt"
    file.write_text("Ünter\n", encoding="utf-8")
    assert read_prompt(str(file)) == "Ünter\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert read_prompt("-") == "from a pipe"
    for content in (b" \n", b"\xff\xfe\xfa"):
        file.write_bytes(content)
        with pytest.raises(StartError, match=r"is empty|can't be read"):
            read_prompt(str(file))
    with pytest.raises(StartError, match="can't be read"):
        read_prompt(str(tmp_path / "nothing"))


def test_a_chat_template_is_used_where_there_is_one() -> None:
    class Tokenizer:
        chat_template = "..."

        def apply_chat_template(self, messages: Any, **_: Any) -> str:
            return f"<user>{messages[0]['content']}</user>"

    assert rendered(Tokenizer(), "x", plain=False) == "<user>x</user>"
    assert rendered(Tokenizer(), "x", plain=True) == "x"
    assert rendered(object(), "x", plain=False) == "x"


def test_other_flags_are_left_for_the_server_s_parser() -> None:
    args, flags = split(
        ["-", "--kv-policy", "snapkv", "--output", "a.png", "--model", "M", "--kv-budget=25%", "--plain"]
    )
    assert (args.prompt, args.output, args.plain) == ("-", Path("a.png"), True)
    assert flags == ["--kv-policy", "snapkv", "--model", "M", "--kv-budget=25%"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["explain", "--kv-policy", "snapkv", "p.txt"], "the first argument is the prompt"),
        (["explain"], "required: PROMPT_FILE"),
        (["explain", "-", "--output", "a.gif"], ".png or .html"),
        (["explain", "/nowhere/p.txt"], "can't be read"),
    ],
)
def test_mistakes_end_in_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StartError, match=r"longreach\[explain\]"):
        require_matplotlib()


class Started(Exception):
    """Raised in place of an engine's start, with what it would have been started with."""


@pytest.fixture
def prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prompt's file, where no model is unpacked and no engine starts."""
    monkeypatch.setattr("server.arguments.ensure_embedded_model", lambda: tmp_path)
    monkeypatch.setattr("vllm.utils.argparse_utils.FlexibleArgumentParser._search_keyword", None)

    class Engine:
        tokenizer = None

    def run(engine: Any, text: str, words: dict[str, Any], *, special: bool) -> Explanation:
        raise Started(words, text, special)

    monkeypatch.setattr("server.inprocess.start_engine", lambda *args, **kwargs: Engine())
    monkeypatch.setattr(module, "run", run)
    file = tmp_path / "prompt.txt"
    file.write_text("What is kept?")
    return str(file)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], {"policy": "snapkv", "budget": "25%"}),
        (["--kv-policy", "adakv", "--kv-budget", "300", "--kv-floor", "0.5"], {"policy": "adakv", "floor": 0.5}),
        (["--kv-policy", "snapkv", "--kv-suffix", "12"], {"policy": "snapkv", "budget": 1024, "suffix": 12}),
    ],
)
def test_flags_are_those_of_serve(prompt: str, flags: list[str], words: dict[str, Any]) -> None:
    with pytest.raises(Started) as started:
        explain(*split([prompt, *flags]))
    got, text, special = started.value.args
    assert got.items() >= words.items()
    assert (text, special) == ("What is kept?", True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv-policy", "nope"], "unknown policy"),
        (["--kv-policy", "snapkv", "--kv-budget", "40"], "too small"),
        (["--kv-budget", "512"], "without a policy"),
        (["--tensor-parallel-size", "2"], "one worker"),
        (["--decode-attention", "tidal"], "--decode-attention: explain shows what a policy keeps"),
        (["--decode-selectors", "tide"], "--decode-selectors: tide: there are"),
    ],
)
def test_wrong_flags_are_told_before_anything_starts(prompt: str, flags: list[str], message: str) -> None:
    with pytest.raises(StartError, match=message):
        explain(*split([prompt, *flags]))
