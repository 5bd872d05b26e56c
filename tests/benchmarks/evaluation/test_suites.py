"""The suites beside RULER: what they send and how they rate, with small folders in published formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evaluation import citing
from benchmarks.evaluation.haystack import Haystack
from benchmarks.evaluation.suite import Reply, Sample, Suite
from benchmarks.evaluation.suites.citations import Citations
from benchmarks.evaluation.suites.longbench import TASKS, LongBench
from benchmarks.evaluation.suites.longbench2 import LongBench2, choice
from benchmarks.evaluation.suites.multiturn import MultiTurn
from benchmarks.evaluation.suites.needle import Needle, PasskeySuite
from benchmarks.evaluation.suites.published import cut_middle
from benchmarks.evaluation.tokens import Prompt, Prompter


def samples(suite: Suite, prompter: Prompter, haystack: Haystack) -> list[Sample]:
    return [suite.make(prompter, haystack, place, "") for place in suite.places([0])]


def text_of(prompter: Prompter, ids: list[int]) -> str:
    return str(prompter.tokenizer.decode(ids))


def reply(text: str, finish: str = "stop") -> Reply:
    return Reply(text, finish, {}, 0.1)


def test_needles_lie_where_they_should(prompter: Prompter, haystack: Haystack) -> None:
    for suite in (Needle(lengths=[1500], depths=3, samples=2), PasskeySuite(lengths=[1500], depths=3, samples=2)):
        found = samples(suite, prompter, haystack)
        assert [sample.info["depth"] for sample in found] == [0.03, 0.5, 0.97] * 2
        for sample in found:
            assert 0.985 * 1500 <= len(sample.prompt.ids) + sample.max_tokens <= 1500
            text = text_of(prompter, sample.prompt.ids[: -sample.prompt.hidden])
            assert abs(text.index(sample.answers[0]) / len(text) - sample.info["depth"]) < 0.12
            assert suite.rate(sample, reply(f"{sample.answers[0]}."), None).score == 1.0
            assert suite.rate(sample, reply("1234"), None).score == 0.0


def test_turns_share_their_document_to_the_token(prompter: Prompter, haystack: Haystack) -> None:
    found = samples(MultiTurn(lengths=[1500], samples=2, turns=3), prompter, haystack)
    documents = [tuple(sample.prompt.ids[: -sample.prompt.hidden]) for sample in found]
    assert documents[0] == documents[1] == documents[2] != documents[3] == documents[5]
    assert len({sample.answers for sample in found}) == 6 == len({tuple(sample.prompt.ids) for sample in found})
    assert [sample.info["turn"] for sample in found] == [1, 2, 3, 1, 2, 3]
    for sample in found:
        assert sample.answers[0] in text_of(prompter, list(documents[found.index(sample)]))
        assert 0.97 * 1500 <= len(sample.prompt.ids) + sample.max_tokens <= 1500


@pytest.fixture
def longbench(tmp_path: Path) -> Path:
    def entry(**rest: Any) -> str:
        common = {"length": 9, "dataset": "x", "language": "en", "all_classes": None, "_id": "1"}
        return json.dumps({**common, **rest}, ensure_ascii=False)

    (tmp_path / "hotpotqa.jsonl").write_text(
        entry(input="Who built it?", context="The bridge was built by Ada.", answers=["Ada", "Ada King"]) + "\n"
        + entry(input="When?", context="word " * 900, answers=["1907"]) + "\n"
    )  # fmt: skip
    (tmp_path / "trec.jsonl").write_text(
        entry(input="Question: When?\nType:", context="Examples.", answers=["Date"], all_classes=["Date", "City"])
    )
    return tmp_path


def test_longbench(prompter: Prompter, haystack: Haystack, longbench: Path) -> None:
    suite = LongBench(folder=longbench)
    assert suite.tasks_here() == ["hotpotqa", "trec"] and set(TASKS) > {"lcc", "gov_report", "dureader"}
    one, long, few = samples(suite, prompter, haystack)
    text = text_of(prompter, one.prompt.ids)
    assert text.startswith("<|im_start|>system") and "built by Ada." in text and "Who built it?" in text
    assert (one.max_tokens, few.max_tokens) == (32, 64)
    assert "Who built it?" not in text_of(prompter, one.prompt.ids[: -one.prompt.hidden])
    assert suite.rate(one, reply("Ada King"), None).score == 1.0
    assert suite.rate(one, reply("It was Ada"), None).score == pytest.approx(0.5)
    assert text_of(prompter, few.prompt.ids) == "Examples.\nQuestion: When?\nType:"  # no chat template
    assert suite.rate(few, reply("\nDate\nQuestion: Where? City"), None).score == 1.0
    cut = suite.cut(long.prompt, 501)
    assert cut is not None and cut.ids == long.prompt.ids[:250] + long.prompt.ids[-251:]


def test_longbenchs_own_prompts_are_used(prompter: Prompter, haystack: Haystack, longbench: Path) -> None:
    prompts = {"hotpotqa": "Passages:\n{context}\n\nNow: {input}\nSo:"}
    (longbench / "dataset2prompt.json").write_text(json.dumps(prompts))
    sample = samples(LongBench(folder=longbench, tasks=["hotpotqa"]), prompter, haystack)[0]
    expected = "Passages:\nThe bridge was built by Ada.\n\nNow: Who built it?\nSo:"
    assert expected in text_of(prompter, sample.prompt.ids)


def test_published_folders_are_checked(tmp_path: Path, prompter: Prompter, haystack: Haystack) -> None:
    with pytest.raises(ValueError, match="longbench: "):
        LongBench(folder=tmp_path).tasks_here()
    with pytest.raises(ValueError, match=r"no data\.json"):
        LongBench2(folder=tmp_path).tasks_here()
    with pytest.raises(ValueError, match="nothing to rate"):
        Citations(folder=tmp_path).tasks_here()
    (tmp_path / "qasper.jsonl").write_text('{"input": "x"}')
    with pytest.raises(ValueError, match="qasper, entry 0: not in LongBench's format"):
        samples(LongBench(folder=tmp_path), prompter, haystack)


def test_longbench_2(prompter: Prompter, haystack: Haystack, tmp_path: Path) -> None:
    entry = {
        "_id": "1", "domain": "Law", "sub_domain": "x", "difficulty": "hard", "length": "short",
        "question": "Which one?", "choice_A": "red", "choice_B": "blue", "choice_C": "green", "choice_D": "grey",
        "answer": "C", "context": "The mill is green.",
    }  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps([entry, {**entry, "length": "long", "answer": "A"}]))
    suite = LongBench2(folder=tmp_path)
    assert suite.tasks_here() == ["short", "long"]
    sample = samples(suite, prompter, haystack)[0]
    assert all(f"({letter}) " in text_of(prompter, sample.prompt.ids) for letter in "ABCD")
    assert suite.rate(sample, reply("The correct answer is (C)."), None).score == 1.0
    assert suite.rate(sample, reply("The correct answer is A"), None).score == 0.0
    assert not suite.complete(sample, reply("Let me think about it", "length"))
    assert (choice("C"), choice("(B) blue"), choice("**The correct answer is: **(D)"), choice("Cats")) == (
        "C", "B", "D", None,
    )  # fmt: skip


def test_citations(prompter: Prompter, haystack: Haystack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [{"title": "Mill", "text": "Mill\nthe mill is red"}, {"title": "Bridge", "text": "built in 1907"}]
    entry = {"id": "1", "question": "When was it built?", "answer": "1907", "docs": documents, "length": 20}
    for task in ("niah", "hotpotqa"):
        (tmp_path / f"{task}.json").write_text(json.dumps([entry]))
    assert Citations(folder=tmp_path).tasks_here() == ["niah"]  # the other one needs a judge
    with pytest.raises(ValueError, match="hotpotqa can't be rated without `judge`"):
        Citations(folder=tmp_path, tasks=["hotpotqa"]).tasks_here()
    monkeypatch.setattr(citing, "load_judge", lambda folder: lambda premise, claim: "1907" in premise)
    suite = Citations(folder=tmp_path, judge=tmp_path)
    assert suite.tasks_here() == ["hotpotqa", "niah"]
    for sample in samples(suite, prompter, haystack):
        assert "Passage [2]: Bridge\nbuilt in 1907" in text_of(prompter, sample.prompt.ids)
        scored = suite.rate(sample, reply("It was built in 1907 [2]."), None)
        assert scored.score == 1.0 and scored.measures["answer_f1"] == pytest.approx(2 / 6)
        assert suite.rate(sample, reply("It was built in 1907 [1]."), None).score == 0.0


def test_the_middle_is_cut_and_the_question_stays() -> None:
    assert cut_middle(Prompt(list(range(10)), 3), 5) == Prompt([0, 1, 7, 8, 9], 3)
    assert cut_middle(Prompt(list(range(10)), 9), 4) == Prompt([0, 1, 8, 9], 2)
