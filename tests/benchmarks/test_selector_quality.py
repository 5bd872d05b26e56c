"""What selectors lose, without an engine: prompts, arithmetic by hand, rows that survive interruptions, the report."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.quality import selector_sections as sections
from benchmarks.quality.passkeys import Tokenizer
from benchmarks.quality.selector_cases import (
    COUNT,
    LATE,
    LIST,
    MULTI_KEY,
    PASSKEY,
    KeyPrompt,
    key_prompts,
    open_prompts,
)
from benchmarks.quality.selector_engine import PLAIN, Array, Cell, See, make_cells, whole_distribution
from benchmarks.quality.selectors import BUDGETS, POLICIES, SELECTORS, Results, arguments, main
from benchmarks.quality.selectors_report import images, markdown, together

QUEST, TIDAL = make_cells(["quest", "tidal"], [], [512])


class FakeDriver:
    """Answers as told: `tokens` and, if asked, distributions by cell and prompt."""

    density: float | None = None

    def __init__(self, told: dict[str, list[list[int]]], logprobs: dict[str, list[Array]] | None = None) -> None:
        self.told, self.logprobs = told, logprobs or {}
        self.engine = SimpleNamespace(tokenizer=None, max_model_len=8192)
        self.batches: list[list[str]] = []

    def run(
        self, prompts: Sequence[list[int]], cells: Sequence[Cell], see: See, **params: Any
    ) -> tuple[list[list[int]], Counter[str]]:
        self.batches.append([cell.label for cell in cells])
        for index, (prompt, cell) in enumerate(zip(prompts, cells, strict=True)):
            for step, token in enumerate(self.told[cell.label][prompt[0]]):
                found = self.logprobs[cell.label][prompt[0]] if self.logprobs else None
                if not see(index, step, token, found):
                    break
        return [self.told[cell.label][prompt[0]] for prompt, cell in zip(prompts, cells, strict=True)], Counter()


def test_selectors_with_other_arguments_share_a_batch_and_patterns_do_not() -> None:
    quests = make_cells(["quest", "quest,min_context=1"], [], [512])
    strides = [Cell("pattern", label, 0, {}) for label in ("xattention", "xattention, stride 16")]
    assert sections.together([*quests, *strides]) == [quests, strides[:1], strides[1:]]


def logs(*shares: float) -> Array:
    return np.log(np.array(shares, dtype=np.float32))


def test_cells_are_requests_of_every_selector_and_policy_at_every_k() -> None:
    cells = make_cells(["recycled,stride=10", "quest"], ["h2o"], [256, 512])
    assert [(cell.kind, cell.name, cell.tokens) for cell in cells] == [
        ("selector", "recycled", 256), ("selector", "recycled", 512), ("selector", "quest", 256),
        ("selector", "quest", 512), ("policy", "h2o", 256), ("policy", "h2o", 512),
    ]  # fmt: skip
    words = {"selector": "recycled", "tokens": 256, "min_context": 0, "stride": 10}
    assert cells[0].extra_args == {"decode_attention": words}
    assert cells[4].extra_args == {"kv_cache": {"policy": "h2o", "budget": 256}}
    assert PLAIN.extra_args == {}


@pytest.mark.parametrize("label", ["nope", "quest:512", "quest,stride=3", "recycled,stride=0"])
def test_wrong_selectors_are_errors_before_an_engine_starts(label: str) -> None:
    with pytest.raises(ValueError):
        make_cells([label], [], [512])


def test_what_is_measured_by_default_can_be_made() -> None:
    for budgets in BUDGETS.values():
        assert len(make_cells(SELECTORS, POLICIES, budgets)) == 10 * len(budgets)


def test_loki_without_a_calibration_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embedded", "--output", str(tmp_path / "rows.json"), "--selectors", "loki"]) == 2
    assert "--calibration" in capsys.readouterr().err


def test_prompts_ask_for_keys_that_are_in_them(tokenizer: Tokenizer) -> None:
    prompts = key_prompts(tokenizer, 1000, 2, 3, seed=0)
    assert [prompt.task for prompt in prompts] == [PASSKEY] * 2 + [MULTI_KEY] * 2 + [LATE] * 2 + [LIST] * 2
    decode: Any = tokenizer.decode
    for prompt in prompts:
        text = decode(prompt.prompt)
        assert len(prompt.prompt) <= 1000
        assert all(key in text for key in prompt.keys)
        assert len(prompt.keys) == (3 if prompt.task == LIST else 1)
        assert (COUNT in text) == (prompt.task == LATE)
    assert [bool(prompt.far) for prompt in prompts[:2]] == [True, False]  # first and last depth
    passkey, late = prompts[0], prompts[4]
    same = next(i for i, (a, b) in enumerate(zip(passkey.prompt, late.prompt, strict=False)) if a != b)
    assert same > 0.9 * len(passkey.prompt) and passkey.keys == late.keys


def test_a_key_is_found_as_a_number_of_its_own() -> None:
    prompt = KeyPrompt(LIST, [], ("12345", "67890"))
    assert prompt.found("1 2 3 and 12345.") == {"12345"}
    assert prompt.found("112345, 678901") == frozenset()
    assert prompt.found("67890 12345 67890") == {"12345", "67890"}


def test_open_prompts_are_as_long_as_said_and_half_of_them_ask(tokenizer: Tokenizer) -> None:
    prompts = open_prompts(tokenizer, 600, 4, seed=0)
    assert [len(prompt) for prompt in prompts[1::2]] == [600, 600]
    assert all(500 < len(prompt) <= 600 for prompt in prompts[::2])
    asks = ["Explain in your own words" in tokenizer.decode(prompt) for prompt in prompts]
    assert asks == [True, False, True, False]


def test_a_whole_distribution_is_in_the_order_of_token_ids() -> None:
    found = whole_distribution(np.array([2, 1, 2, 0]), logs(0.3, 0.5, 0.3, 0.2))
    assert np.exp(found) == pytest.approx([0.2, 0.5, 0.3])
    with pytest.raises(ValueError, match="not every token"):
        whole_distribution(np.array([3, 1, 3]), logs(0.3, 0.5, 0.3))


def test_divergence_by_hand() -> None:
    expected = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    assert sections.divergence(logs(0.5, 0.25, 0.25), logs(0.25, 0.5, 0.25)) == pytest.approx(expected)
    assert sections.divergence(logs(0.5, 0.5), logs(0.5, 0.5)) == 0.0


def test_keys_that_dense_misses_do_not_count() -> None:
    far = frozenset({"22222", "33333"})
    prompts = [KeyPrompt(PASSKEY, [], ("11111",)), KeyPrompt(LIST, [], ("22222", "33333", "44444"), far)]
    dense = [frozenset({"11111"}), frozenset({"22222", "44444"})]
    rows = sections.key_rows(prompts, dense, [frozenset(), frozenset({"22222", "33333"})])
    assert rows == [
        {
            "task": PASSKEY,
            "keys": 1,
            "dense": 1,
            "found": 0,
            "found_all": 0,
            "far_keys": 0,
            "far_dense": 0,
            "far_found": 0,
        },
        {
            "task": LIST,
            "keys": 3,
            "dense": 2,
            "found": 1,
            "found_all": 2,
            "far_keys": 2,
            "far_dense": 1,
            "far_found": 1,
        },
    ]


def test_only_the_tasks_that_are_asked_for_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [KeyPrompt(task, [index], ("7",)) for index, task in enumerate((PASSKEY, MULTI_KEY, LATE))]
    monkeypatch.setattr(sections, "key_prompts", lambda *_: prompts)
    driver: Any = FakeDriver({"dense": [[7]] * 3, "quest": [[7], [8], [7]]})
    driver.engine.tokenizer = SimpleNamespace(decode=lambda tokens, **_: " ".join(map(str, tokens)))
    rows: list[dict[str, Any]] = []
    args = arguments().parse_args(["embedded", "--output", "x", "--tasks", MULTI_KEY, LATE])
    sections.needles(driver, [QUEST], args, rows.extend)
    assert [(row["task"], row["dense"], row["found"]) for row in rows] == [(MULTI_KEY, 1, 0), (LATE, 1, 1)]


def test_divergence_is_taken_behind_the_first_token_and_up_to_where_answers_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sections, "open_prompts", lambda *_: [[0], [1]])
    dense, names = [[5, 6, 7, 8], [5, 6]], ("dense", "dense again", "quest", "tidal")
    driver: Any = FakeDriver(
        {"dense": dense, "dense again": dense, "quest": [[5, 6, 9, 8], [5, 6]], "tidal": dense},
        {name: [logs(0.25, 0.75) if name == "quest" else logs(0.5, 0.5)] * 2 for name in names},
    )
    rows: list[dict[str, Any]] = []
    args = Namespace(tokens=1, kl_prompts=2, kl_tokens=4, seed=0)
    sections.kl(driver, [sections.AGAIN, QUEST, TIDAL], args, rows.extend)
    value = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    again, quest, tidal = rows
    assert (again["prompts"], again["compared"], again["mean"]) == (12, 24, 0)
    assert driver.batches[1:] == [["dense again"] * 12, ["quest"] * 2, ["tidal"] * 2]
    assert (quest["compared"], quest["parted"], quest["same_choice"]) == (3, 1, pytest.approx(2 / 3, abs=1e-4))
    assert quest["mean"] == quest["median"] == pytest.approx(value, rel=1e-3)
    assert (tidal["compared"], tidal["parted"], tidal["mean"], tidal["same_choice"]) == (4, 0, 0, 1)


def test_agreement_is_the_number_of_tokens_before_the_first_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "open_prompts", lambda *_: [[i] for i in range(6)])
    dense = [[1, 2, 3, 4] for _ in range(6)]
    quest = [[1, 2, 9, 4], [1, 2, 3, 4]]
    driver: Any = FakeDriver({"dense": dense, "dense beside others": dense, "quest": quest})
    rows: list[dict[str, Any]] = []
    args = Namespace(agreement_prompt=1, agreement_prompts=2, output_tokens=4, seed=0)
    sections.agreement(driver, [sections.BESIDE, QUEST], args, rows.extend)
    assert [(row["label"], row["first"], row["never"]) for row in rows] == [
        ("dense beside others", [4, 4], 1.0),
        ("quest", [2, 4], 0.5),
    ]
    assert (rows[1]["min"], rows[1]["median"], rows[1]["max"]) == (2, 3, 4)
    assert driver.batches[1:] == [["dense beside others"] * 2 + ["dense"] * 4, ["quest"] * 2]


def test_rows_are_kept_and_not_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, settings = tmp_path / "rows.json", {"tokens": 7000}
    row = {"section": "kl", "kind": "selector", "label": "quest", "tokens": 512, "mean": 0.5}
    Results(path, settings, "one").add([row])
    assert json.loads(capsys.readouterr().out) == row
    again = Results(path, settings, "two")
    assert again.rows == [row] and again.commits == ["one", "two"]
    assert again.has("kl", "selector", "quest", 512) and not again.has("kl", "selector", "quest", 256)
    again.add([{**row, "mean": 0.7}, {**row, "tokens": 256}])
    assert [(kept["tokens"], kept["mean"]) for kept in json.loads(path.read_text())["rows"]] == [(512, 0.5), (256, 0.5)]
    with pytest.raises(ValueError, match="other settings"):
        Results(path, {"tokens": 6000}, "one")


def report_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for cell, found in ((PLAIN, 30), (QUEST, 29)):
        keys = {"keys": 32, "dense": 30, "found": found, "far_keys": 24, "far_dense": 23, "far_found": found - 8}
        rows.append({**sections.named("needles", cell), "task": PASSKEY, **keys})
    for cell, value in ((sections.AGAIN, 1e-5), (QUEST, 0.01), (TIDAL, 0.02)):
        rows.append({**sections.named("kl", cell), **sections.kl_summary([[value, value], [value]], [False, True])})
    for cell, first in ((sections.BESIDE, [100, 100]), (QUEST, [10, 100])):
        rows.append({**sections.named("agreement", cell), **sections.spread(first, 100)})
    return rows


def test_of_rows_that_several_runs_have_the_last_counts() -> None:
    def row(label: str, tokens: int, mean: float, kind: str = "selector") -> dict[str, Any]:
        return {"section": "kl", "kind": kind, "label": label, "tokens": tokens, "mean": mean}

    older = {
        "settings": {"seed": 0},
        "rows": [row("dense again", 0, 1, "dense"), row("quest", 64, 2), row("loki", 64, 3)],
    }
    newer = {"settings": {"seed": 1}, "rows": [row("quest", 64, 4), row("quest", 128, 5), row("tidal", 64, 6)]}
    found = together([older, newer])
    assert found["settings"] == {"seed": 1}
    assert [each["mean"] for each in found["rows"]] == [1, 4, 3, 5, 6]
    assert [each["mean"] for each in together([older, newer], ["loki", "tidal"])["rows"]] == [1, 3, 6]


def test_the_report_says_what_was_found(tmp_path: Path) -> None:
    text = markdown(report_rows())
    assert "| dense | all | 30/32, 22/24 |" in text
    assert "| quest | 512 | 29/30, 21/23 |" in text
    assert "| tidal | 0.02, 0.02 (3) |" in text
    assert "| quest | 512 | 10 | 32 | 55 | 78 | 100 | 50% |" in text
    settings = {
        "model": "m", "device": "d", "kl_prompts": 2, "tokens": 7000, "agreement_prompts": 2,
        "agreement_prompt": 4000, "output_tokens": 100,
    }  # fmt: skip
    drawn = images(tmp_path, {"rows": report_rows(), "settings": settings})
    assert [path.name for path in drawn] == ["selectors-kl.png", "selectors-agreement.png"]
    assert all(path.stat().st_size > 5_000 for path in drawn)
    assert images(tmp_path, {"rows": report_rows()[:2], "settings": settings}) == []
