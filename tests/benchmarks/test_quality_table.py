"""The quality table: arithmetic by hand, documents with what they promise, rows that survive an interruption."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.quality import table
from benchmarks.quality.arithmetic import (
    budget_words,
    compared,
    divergence,
    likelihood_score,
    mean_and_worst,
    mean_divergence,
    tokens_after,
)
from benchmarks.quality.measure import KNOWN, NONE, UNKNOWN, Meter, Row, key_case, make_cases
from benchmarks.quality.needles import make_multikey
from benchmarks.quality.passkeys import NAMES, Tokenizer, make_passkey
from benchmarks.quality.summary import as_json, doubts, markdown, plot, summarise
from benchmarks.quality.texts import make_passage, reference_text
from kvcache.registry import policies


def logs(**shares: float) -> dict[int, float]:
    """Token ids are the letters' codes."""
    return {ord(letter): math.log(share) for letter, share in shares.items()}


@pytest.mark.parametrize(
    ("text", "words"),
    [("1/2", "50%"), ("1/8", "12.5%"), ("1/16", "6.25%"), ("25%", "25%"), ("1/3", "33.3333%"), ("512", 512)],
)
def test_budgets_are_said_as_requests_say_them(text: str, words: int | str) -> None:
    assert budget_words(text) == words


@pytest.mark.parametrize("text", ["3/2", "0%", "-1/4", "many", "1/0", ""])
def test_other_budgets_are_errors(text: str) -> None:
    with pytest.raises((ValueError, ZeroDivisionError)):
        budget_words(text)


def test_tokens_after_counts_those_that_begin_there() -> None:
    offsets = [(0, 3), (3, 5), (5, 8), (8, 9)]
    assert [tokens_after(offsets, end) for end in (0, 1, 3, 4, 8, 9)] == [4, 3, 3, 2, 1, 0]


def test_divergence_of_two_tokens_and_a_rest() -> None:
    dense, other = logs(a=0.5, b=0.3), logs(a=0.25, b=0.6)
    assert divergence(dense, other) == pytest.approx(
        0.5 * math.log(0.5 / 0.25) + 0.3 * math.log(0.3 / 0.6) + 0.2 * math.log(0.2 / 0.15)
    )
    assert divergence(dense, dense) == 0.0


def test_tokens_that_the_other_does_not_list_are_as_likely_as_they_may_be() -> None:
    """At most 0.1, the last but one of the list: the last may be a token of the text, of any rank."""
    dense, other = logs(a=0.5, b=0.3), logs(a=0.2, c=0.6, d=0.1, e=0.01)
    assert divergence(dense, other) == pytest.approx(
        0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.1) + 0.2 * math.log(0.2 / 0.7)
    )


def test_divergence_over_lists_is_below_that_over_everything() -> None:
    generator = torch.Generator().manual_seed(0)
    for sharpness in (2.0, 4.0, 8.0):
        p, q = (sharpness * torch.randn(2, 400, generator=generator, dtype=torch.float64)).log_softmax(-1)
        lists = [{int(t): float(row[t]) for t in row.topk(k).indices} for row, k in ((p, 20), (q, 100))]
        whole = float((p.exp() * (p - q)).sum())
        assert 0.3 * whole < divergence(lists[0], lists[1]) <= whole


def test_divergence_is_finite_where_the_lists_share_nothing_or_hold_everything() -> None:
    assert divergence(logs(a=0.9), logs(b=0.9)) == 0.0
    assert divergence(logs(a=1.0), logs(a=0.5, b=0.5)) == pytest.approx(math.log(2), abs=1e-4)
    assert 0 < divergence(logs(a=0.5, b=0.4), logs(a=0.6, b=0.4)) < 2
    assert 5 < divergence(logs(a=0.9, b=0.1), logs(c=0.99, d=1e-5, e=1e-6)) < 20


def test_answers_are_compared_up_to_where_they_part() -> None:
    assert compared([1, 2, 3, 4], [1, 2, 9, 4]) == 3
    assert compared([1, 2, 3], [9, 2, 3]) == 1
    assert compared([1, 2], [1, 2, 3]) == 2


def test_mean_divergence_is_over_the_positions_of_both() -> None:
    a, b = logs(a=0.5, b=0.5), logs(a=0.25, b=0.75)
    assert mean_divergence([a, a, a], [a, b]) == pytest.approx(divergence(a, b) / 2)
    with pytest.raises(ValueError, match="no position"):
        mean_divergence([], [a])


def test_scores() -> None:
    assert likelihood_score(math.log(8), math.log(10)) == pytest.approx(0.8)
    assert likelihood_score(math.log(8), math.log(7)) == 1.0
    mean, *worst = mean_and_worst({"a": 0.5, "b": 0.25, "c": 0.25})
    assert mean == pytest.approx(1 / 3)
    assert worst == ["b", 0.25]
    with pytest.raises(ValueError, match="no scores"):
        mean_and_worst({})


def test_passages_have_the_asked_length_and_are_real_text(tokenizer: Tokenizer) -> None:
    passage, again, other = (make_passage(tokenizer, 700, 96, seed) for seed in (1, 1, 2))
    assert passage == again != other
    assert (len(passage.document), len(passage.continuation)) == (604, 96)
    text = tokenizer.decode(passage.document + passage.continuation)
    assert text[:500] in reference_text()
    with pytest.raises(ValueError, match="too short"):
        make_passage(tokenizer, 1_000_000, 96, 0)


@pytest.mark.parametrize("keys", [1, 4])
def test_multikey_documents_hold_all_keys_and_ask_for_one(tokenizer: Tokenizer, keys: int) -> None:
    for seed in range(3):
        case = make_multikey(tokenizer, 900, keys, seed)
        assert case == make_multikey(tokenizer, 900, keys, seed)
        assert 860 <= case.tokens <= 900
        assert case.document.count("The pass key for") == keys
        assert case.needle in case.document
        assert case.question.split(" for ")[1].split("?")[0] in case.needle
        assert sum(f"for {name} is" in case.document for name in NAMES) == keys


def test_what_is_hidden_is_the_question_and_the_template_behind_it(tokenizer: Tokenizer) -> None:
    key = make_passkey(tokenizer, 500, 0.5, 3)
    case = key_case(tokenizer, "passkey", key)
    decode: Any = tokenizer.decode
    seen, hidden = decode(case.prompt[: -case.hidden]), decode(case.prompt[-case.hidden :])
    assert len(case.prompt) == key.tokens
    assert seen.rstrip().endswith(key.document[-40:])
    assert hidden.lstrip().startswith(key.question)
    assert hidden.rstrip().endswith("assistant")


def test_each_document_has_three_cases(tokenizer: Tokenizer) -> None:
    cases = list(make_cases(tokenizer, 600, 1, 4, 0, keys=3))
    assert cases[1].key and cases[1].key.document.count("The pass key for") == 3
    assert [case.task for case in cases] == ["passkey", "multi-key", "continuation"]
    assert [case.settings for case in cases] == [(KNOWN, UNKNOWN), (KNOWN, UNKNOWN), (UNKNOWN,)]
    assert all(560 <= len(case.prompt) <= 600 for case in cases)


def row(task: str, setting: str, document: int, **found: Any) -> Row:
    known = {"policy": "snapkv", "budget": "25%", "tokens": 600, "kept": 0.25, "found": None, "kl": 0.0}
    return Row(task, setting, document=document, **{**known, **found})


def rows() -> list[Row]:
    return [
        row("passkey", KNOWN, 0, found=True),
        row("passkey", KNOWN, 1, found=False, kl=0.4),
        row("multi-key", KNOWN, 0, found=True, kl=0.2),
        row("passkey", UNKNOWN, 0, found=False),
        row("multi-key", UNKNOWN, 0, found=True),
        row("continuation", UNKNOWN, 0, nll=math.log(10), dense_nll=math.log(8)),
        row("continuation", UNKNOWN, 1, nll=math.log(10), dense_nll=math.log(8), kept=0.75),
    ]


def test_rows_become_cells() -> None:
    known, unknown = summarise(rows())
    assert (known.mean, known.worst_task, known.worst) == (0.75, "passkey", 0.5)
    assert known.kl == pytest.approx((0.2 + 0.2) / 2)
    assert unknown.mean == pytest.approx((0 + 1 + 0.8) / 3)
    assert (unknown.worst_task, unknown.worst) == ("passkey", 0.0)
    assert unknown.kept == pytest.approx(0.375)
    assert unknown.tasks["continuation"].perplexity == pytest.approx(10)
    assert json.loads(json.dumps(as_json([known])))[0]["tasks"]["passkey"]["documents"] == 2


def test_the_table_has_the_worst_task_beside_the_mean(tmp_path: Path) -> None:
    head, _, line = markdown(summarise(rows())).splitlines()
    assert head.count("|") == line.count("|")
    assert "| 0.75 | 0.50 passkey |" in line
    assert "| 10.0 | 0.60 | 0.00 passkey |" in line
    plot(tmp_path / "plot.png", summarise(rows()), "title")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_tasks_that_the_model_cannot_do_are_named() -> None:
    dense = [row("passkey", KNOWN, i, policy="none", found=True) for i in range(4)]
    dense += [row("multi-key", KNOWN, i, policy="none", found=i < 2) for i in range(4)]
    (line,) = doubts(summarise([*dense, *rows()]))
    assert line.startswith("multi-key: without compression the model finds only 50%")


def test_every_policy_at_every_budget_is_a_cell() -> None:
    cells = table.make_cells(None, ["1/2", "1/16"], 16)
    assert {cell.policy for cell in cells} <= set(policies())
    assert [cell.budget for cell in cells[:2]] == ["50%", "6.25%"]
    (cell,) = table.make_cells(["snapkv,window=16"], ["512"], 16)
    assert cell.words == {"policy": "snapkv", "budget": 512, "window": 16}


@pytest.mark.parametrize("label", ["nope", "snapkv:512", "none", "snapkv,windows=3"])
def test_wrong_policies_are_errors(label: str) -> None:
    with pytest.raises(ValueError):
        table.make_cells([label], ["1/2"], 16)


def test_a_run_that_was_broken_off_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "part"
    first = table.Progress(file, {"seed": 0})
    first.add(rows()[:3])
    second = table.Progress(file, {"seed": 0})
    assert second.rows == rows()[:3]
    assert second.has(600, 1) and not second.has(600, 2)
    with pytest.raises(ValueError, match="other arguments"):
        table.Progress(file, {"seed": 1})
    second.finish()
    assert not file.exists()


def test_prompts_longer_than_the_model_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Engine:
        max_model_len = 8192

    monkeypatch.setattr(table, "start", lambda model, flags: Engine())
    assert table.main(["embedded", "--tokens", "600,8190"]) == 2
    assert "8190 tokens and an answer don't fit the model's 8192" in capsys.readouterr().err


class Engine:
    """Answers at once: the key to whoever has no policy or hides nothing, and `no` to the others."""

    page_size = 16

    def __init__(self, tokenizer: Any, keys: dict[tuple[int, ...], str]) -> None:
        self.tokenizer, self.keys = tokenizer, keys
        self.runs: list[list[Any]] = []

    def run(self, jobs: Sequence[Any], done: Callable[[Any], None] = lambda job: None) -> None:
        self.runs.append(list(jobs))
        for job in jobs:
            key = self.keys.get(tuple(job.prompt), "")
            found = job.words["policy"] == NONE or not job.words["suffix"]
            ids = self.tokenizer(key if found else " no", add_special_tokens=False)["input_ids"]
            entries = [{token: SimpleNamespace(logprob=-0.5)} for token in ids]
            usage = {"kept_tokens": {"mean": len(job.prompt) / (1 if job.words["policy"] == NONE else 2)}}
            prompt = [{token: SimpleNamespace(logprob=-1.0 if found else -2.0)} for token in job.prompt]
            job.output = SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=ids, logprobs=entries)],
                prompt_logprobs=prompt,
                kv_transfer_params={"kv_cache": {"usage": usage}},
            )
            done(job)


def test_cases_run_at_once_and_become_the_rows_that_they_are_alone(tokenizer: Tokenizer) -> None:
    """The dense runs come first, and fill the prefix cache for all others."""
    cases = list(make_cases(tokenizer, 600, 0, 2, 0, keys=2))
    keys = {tuple(case.prompt): case.key.answer for case in cases if case.key}
    cells = table.make_cells(["snapkv", "random"], ["1/2", "1/4"], 16)
    together, alone, counted = Engine(tokenizer, keys), Engine(tokenizer, keys), []
    rows = Meter(together, cells).measure(cases, 600, 0, lambda: counted.append(1))  # type: ignore[arg-type]
    assert rows == [row for case in cases for row in Meter(alone, cells).measure([case], 600, 0, lambda: None)]  # type: ignore[arg-type]
    assert len(counted) == 3 + 5 * len(cells) and len(rows) == 5 * (1 + len(cells))
    assert [len(run) for run in together.runs] == [1, 3, 5 * len(cells)]
    assert {job.words["policy"] for run in together.runs[:2] for job in run} == {NONE}
    found = {(row.task, row.setting): row.found for row in rows if row.policy == "snapkv"}
    assert found["passkey", KNOWN] and found["multi-key", KNOWN] and found["passkey", UNKNOWN] is False
    assert [row.nll for row in rows if row.task == "continuation"] == [1.0] + [2.0] * len(cells)
