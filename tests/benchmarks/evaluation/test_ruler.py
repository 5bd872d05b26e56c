"""RULER's tasks: structure, lengths and metrics."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evaluation.haystack import NOISE, Haystack
from benchmarks.evaluation.metrics import string_match_all, string_match_part
from benchmarks.evaluation.ruler.counting import DOTS, coded_counts
from benchmarks.evaluation.suite import Place, Reply, Sample
from benchmarks.evaluation.suites.ruler import ANSWER_TOKENS, TASKS, Ruler
from benchmarks.evaluation.tokens import Prompter

UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


def make(prompter: Prompter, haystack: Haystack, task: str, length: int, index: int = 0, **settings: Any) -> Sample:
    suite = Ruler.model_validate({"lengths": [length], "samples": 1, **settings})
    return suite.make(prompter, haystack, Place("ruler", task, length, 0, index), "")


def text_of(prompter: Prompter, sample: Sample) -> str:
    tokenizer = prompter.tokenizer
    return str(tokenizer.decode(sample.prompt.ids))


def test_there_are_thirteen_tasks() -> None:
    assert len(TASKS) == len(set(TASKS)) == 13 and set(ANSWER_TOKENS) == set(TASKS)


@pytest.mark.parametrize("length", [1024, 2048, 4096])
@pytest.mark.parametrize("task", TASKS)
def test_lengths_are_exact_and_answers_are_in_the_document(
    prompter: Prompter, haystack: Haystack, task: str, length: int
) -> None:
    sample = make(prompter, haystack, task, length)
    total = len(sample.prompt.ids) + sample.max_tokens
    assert 0.99 * length <= total <= length
    tokenizer = prompter.tokenizer
    document = str(tokenizer.decode(sample.prompt.ids[: -sample.prompt.hidden]))
    question = str(tokenizer.decode(sample.prompt.ids[-sample.prompt.hidden :]))
    assert all(answer in document for answer in sample.answers)
    assert 10 < sample.prompt.hidden < 150 and ("?" in question) and document.startswith("<|im_start|>system")


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_a_function_of_their_place(prompter: Prompter, haystack: Haystack, task: str) -> None:
    first, again, other = (make(prompter, haystack, task, 1024, index) for index in (0, 0, 1))
    assert first == again and first.prompt.ids != other.prompt.ids and first.answers != other.answers


@pytest.mark.parametrize(
    ("task", "kind", "needles", "answers"),
    [
        ("niah_single_1", "number", 1, 1), ("niah_single_2", "number", 1, 1), ("niah_single_3", "uuid", 1, 1),
        ("niah_multikey_1", "number", 4, 1), ("niah_multivalue", "number", 4, 4), ("niah_multiquery", "number", 4, 4),
    ],
)  # fmt: skip
def test_needles(prompter: Prompter, haystack: Haystack, task: str, kind: str, needles: int, answers: int) -> None:
    sample = make(prompter, haystack, task, 2048)
    text = text_of(prompter, sample)
    value = r"\d{7}" if kind == "number" else UUID
    told = re.findall(rf"A secret {kind} of ([a-z]+-[a-z]+) is: ({value})\.", text)
    assert len(told) == needles and len(sample.answers) == answers == len(set(sample.answers))
    values = {v for _, v in told}
    assert set(sample.answers) <= values and len(values) == needles
    keys = {key for key, _ in told}
    assert len(keys) == (1 if task == "niah_multivalue" else needles)
    question = text[text.rindex("\n\nWhat") :]
    asked = {key for key, v in told if v in sample.answers}
    assert {key for key in keys if key in question} == asked
    assert (NOISE[0] in text) == (task == "niah_single_1")
    assert text.rstrip().endswith(":") and "<|im_start|>assistant\n" in question


@pytest.mark.parametrize(("task", "key"), [("niah_multikey_2", r"[a-z]+-[a-z]+"), ("niah_multikey_3", UUID)])
def test_haystacks_of_needles_name_each_key_once(prompter: Prompter, haystack: Haystack, task: str, key: str) -> None:
    sample = make(prompter, haystack, task, 2048)
    told = re.findall(rf"A secret \w+ of ({key}) is: (\S+)\.", text_of(prompter, sample))
    assert len(told) > 15 and len({k for k, _ in told}) == len(told) == len({v for _, v in told})
    assert dict((v, k) for k, v in told)[sample.answers[0]] in text_of(prompter, sample)[-250:]


def test_depths_of_single_needles_spread(prompter: Prompter, haystack: Haystack) -> None:
    depths = [float(make(prompter, haystack, "niah_single_2", 1024, index).info["depth"]) for index in range(12)]
    assert min(depths) < 0.25 and max(depths) > 0.75 and len(set(depths)) > 8
    sample = make(prompter, haystack, "niah_single_2", 2048)
    text = text_of(prompter, sample)
    start = text.index("asked for some of them.")
    place = (text.index(sample.answers[0]) - start) / (text.rindex("\n\nWhat") - start)
    assert abs(place - float(sample.info["depth"])) < 0.08


def test_variables_are_traced_in_order(prompter: Prompter, haystack: Haystack) -> None:
    sample = make(prompter, haystack, "vt", 2048)
    text = text_of(prompter, sample)
    assert len(sample.answers) == 5
    _, example, document = text.split("The text below")
    for part in (example, document):
        told = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w{5})\.", part)
        assert len(told) == 5 and told[0][1].isdigit()
        assert [held for _, held in told[1:]] == [name for name, _ in told[:-1]]
    assert tuple(name for name, _ in told) == sample.answers and told[0][1] in text[-120:]
    assert all(name in example for name in ("Which variables", "in the order of their assignment: "))


@pytest.mark.parametrize(("length", "often", "seldom"), [(2048, 6, 1), (4096, 30, 3)])
def test_common_words(prompter: Prompter, haystack: Haystack, length: int, often: int, seldom: int) -> None:
    sample = make(prompter, haystack, "cwe", length)
    document = text_of(prompter, sample).split("Below is a numbered list")[2]
    entries = re.findall(r"(\d+)\. ([a-z]+)", document)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    counts = Counter(word for _, word in entries)
    assert len(sample.answers) == 10 and {counts[word] for word in sample.answers} == {often}
    rest = Counter(count for word, count in counts.items() if word not in sample.answers)
    assert set(rest) <= {seldom, 1} and rest[seldom] > 20


def test_frequent_words(prompter: Prompter, haystack: Haystack) -> None:
    sample = make(prompter, haystack, "fwe", 2048)
    document = text_of(prompter, sample).split("Dots are no words.")[1].split("Which three")[0]
    counts = Counter(document.split())
    (dots, _), *rest = counts.most_common()
    assert dots == DOTS and all(re.fullmatch("[a-z]{6}", word) for word, _ in rest)
    assert tuple(word for word, _ in rest[:3]) == sample.answers
    assert rest[0][1] > rest[1][1] > rest[2][1] > rest[3][1]


def test_shares_of_coded_words_follow_the_zeta_distribution() -> None:
    # 1000 / 1.6449 = 607.9; a quarter, a ninth and a sixteenth of it.
    assert coded_counts(1000)[:4] == [608, 152, 68, 38]


def squad(folder: Path) -> Path:
    paragraphs = [
        {"context": f"Passage {i} says that the lake has {i} islands.", "qas": [
            {"question": f"How many islands in passage {i}?", "answers": [{"text": str(i), "answer_start": 0}]},
            {"question": "Nobody knows?", "answers": [], "is_impossible": True},
        ]} for i in range(1000, 1300)
    ]  # fmt: skip
    path = folder / "squad.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "Lakes", "paragraphs": paragraphs}]}))
    return path


def hotpot(folder: Path) -> Path:
    entries = [
        {"question": f"Where is the owner of house {i} from?", "answer": f"Town{i}",
         "supporting_facts": [[f"House {i}", 0], [f"Owner {i}", 1]],
         "context": [[f"House {i}", [f"House {i} is owned by Owner {i}."]],
                     [f"Owner {i}", ["A person.", f" Owner {i} is from Town{i}."]],
                     [f"Garden {i}", ["Some flowers grow there."]]]}
        for i in range(100)
    ]  # fmt: skip
    path = folder / "hotpot.json"
    path.write_text(json.dumps(entries))
    return path


def test_questions_from_published_files(prompter: Prompter, haystack: Haystack, tmp_path: Path) -> None:
    files: dict[str, Any] = {"squad": squad(tmp_path), "hotpotqa": hotpot(tmp_path)}
    one = make(prompter, haystack, "qa_1", 1024, **files)
    text = text_of(prompter, one)
    assert f"Passage {one.answers[0]} says" in text and f"How many islands in passage {one.answers[0]}?" in text[-200:]
    assert len(re.findall(r"Document \d+:\n", text)) > 20
    two = make(prompter, haystack, "qa_2", 1024, **files)
    number = two.answers[0].removeprefix("Town")
    text = text_of(prompter, two)
    assert f"House {number} is owned by" in text and f"Owner {number} is from Town{number}." in text
    with pytest.raises(ValueError, match="too few paragraphs"):
        make(prompter, haystack, "qa_2", 16384, **files)
    with pytest.raises(ValueError, match="isn't in SQuAD's format"):
        make(prompter, haystack, "qa_1", 1024, squad=files["hotpotqa"])


def test_the_made_up_world_answers_its_questions(prompter: Prompter, haystack: Haystack) -> None:
    sample = make(prompter, haystack, "qa_2", 2048)
    text = text_of(prompter, sample)
    asked = re.search(r"the founder of the (.+) born\?", text)
    assert asked is not None
    founder = re.search(rf"The {asked[1]} was founded in \d+ by ([\w ]+)\.", text)
    assert founder is not None
    assert re.search(rf"{founder[1]} was [\w ]+ who was born in {sample.answers[0]} in", text)


@pytest.mark.parametrize(
    ("answer", "references", "every", "some"),
    [
        ("It is 1234567.", ["1234567"], 1.0, 1.0),
        ("1234567, 7654321", ["1234567", "7654321", "1111111", "2222222"], 0.5, 1.0),
        ("the BLUE house", ["blue"], 1.0, 1.0),
        ("nothing", ["blue", "red"], 0.0, 0.0),
        ("", ["x"], 0.0, 0.0),
        ("New\x00York", ["new\nyork"], 1.0, 1.0),
    ],
)
def test_scores_by_hand(answer: str, references: list[str], every: float, some: float) -> None:
    assert string_match_all(answer, references) == every
    assert string_match_part(answer, references) == some


def test_questions_count_any_answer_and_lists_count_shares(prompter: Prompter, haystack: Haystack) -> None:
    suite = Ruler(lengths=[1024])
    for task, score in (("qa_1", 1.0), ("niah_multivalue", 0.25), ("vt", 0.25), ("cwe", 0.25), ("fwe", 0.25)):
        sample = make(prompter, haystack, "niah_multivalue", 1024)
        sample = Sample(Place("ruler", task, 1024, 0, 0), sample.prompt, 9, sample.answers)
        assert suite.rate(sample, Reply(f"so {sample.answers[2]}", "stop", {}, 0.1), None).score == score


def test_too_short_a_length_is_said(prompter: Prompter, haystack: Haystack) -> None:
    with pytest.raises(ValueError, match="tokens are too few"):
        make(prompter, haystack, "vt", 128)
