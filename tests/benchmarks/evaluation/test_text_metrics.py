"""LongBench's metrics, by hand."""

from __future__ import annotations

import pytest

from benchmarks.evaluation.text_metrics import (
    chinese_characters,
    classification,
    count,
    edit_similarity,
    english_words,
    f1,
    retrieval,
    rouge_l,
)


def test_words_are_compared_without_case_punctuation_and_articles() -> None:
    assert english_words("The cat, a  DOG and an-owl!") == ["cat", "dog", "and", "anowl"]
    assert chinese_characters("你好，World！ 。") == ["你", "好", "w", "o", "r", "l", "d"]  # noqa: RUF001


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("Paris", "paris", 1.0),
        ("It is the city of Paris", "Paris", 2 / 6),  # precision 1/5 (no article), recall 1
        ("red red blue", "red blue blue", 2 / 3),  # two of three words both ways
        ("nothing", "something", 0.0),
        ("", "x", 0.0),
    ],
)
def test_f1(answer: str, reference: str, score: float) -> None:
    assert f1(english_words(answer), english_words(reference)) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("a b c d", "a b c d", 1.0),
        ("a x b y", "a b", 2 * 0.5 * 1 / 1.5),  # subsequence a b: precision 2/4, recall 2/2
        ("b a", "a b", 0.5),  # one of two in order
        ("", "a", 0.0),
        ("c", "a b", 0.0),
    ],
)
def test_rouge_l(answer: str, reference: str, score: float) -> None:
    assert rouge_l(answer.split(), reference.split()) == pytest.approx(score)


def test_classes_named_beside_the_right_one_cost() -> None:
    classes = ["Date", "Definition", "Definition of something", "City"]
    assert classification("Type: Date", "Date", classes) == 1.0
    assert classification("Date or City", "Date", classes) == 0.5
    assert classification("City", "Date", classes) == 0.0
    # "Definition" is a part of the right class's own name.
    assert classification("Definition of something", "Definition of something", classes) == 1.0


def test_counts_and_paragraphs() -> None:
    assert count("There are 7 of 12, so 7", "7") == pytest.approx(2 / 3)
    assert count("none", "7") == 0.0
    assert retrieval("Paragraph 12", "Paragraph 12") == 1.0 and retrieval("段落3", "段落5") == 0.0
    assert retrieval("Paragraph 1 or 12", "Paragraph 12") == 0.5


def test_code_is_compared_by_its_first_line() -> None:
    assert edit_similarity("\n# a comment\n```\nreturn x\nmore", "return x") == 1.0
    assert edit_similarity("abcd", "abxd") == 0.75
    assert edit_similarity("# only a comment", "x = 1") == 0.0
