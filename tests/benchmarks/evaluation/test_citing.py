"""Citation metrics, by hand; the judge says that a passage entails a claim if it holds all its words."""

from __future__ import annotations

import pytest

from benchmarks.evaluation.citing import by_entailment, cited, needle, sentences, stars, without_citations

DOCUMENTS = [
    {"title": "Bridge", "text": "the bridge was built in 1907"},
    {"title": "Mill", "text": "the mill is red"},
    "the river is long and the mill is red",
]


def entails(premise: str, claim: str) -> bool:
    return set(claim.lower().strip(".").split()) <= set(premise.lower().split())


def test_sentences_keep_their_citations() -> None:
    text = "The mill is red [2]. The river is long. [3][1] It was built in 1907 [1, 2]."
    assert sentences(text) == ["The mill is red [2].", "The river is long. [3][1]", "It was built in 1907 [1, 2]."]
    assert [cited(sentence) for sentence in sentences(text)] == [[1], [2, 0], [0, 1]]
    assert without_citations("The mill is red [2][3].") == "The mill is red."


@pytest.mark.parametrize(
    ("answer", "recall", "precision"),
    [
        ("The mill is red [2].", 1.0, 1.0),
        ("The mill is red.", 0.0, 0.0),
        ("The mill is red [1].", 0.0, 0.0),
        ("The mill is red [9].", 0.0, 0.0),
        ("The mill is red [2][1].", 1.0, 0.5),  # the bridge isn't needed
        ("The mill is red [2][3].", 1.0, 1.0),  # each is enough
        ("The mill is red and built in 1907 [1][3].", 1.0, 1.0),  # neither is enough alone
        ("The mill is red [2]. The river is green [3].", 0.5, 0.5),
    ],
)
def test_entailment(answer: str, recall: float, precision: float) -> None:
    found = by_entailment(answer, DOCUMENTS, entails)
    assert (found.recall, found.precision) == (recall, precision)
    both = recall + precision
    assert found.f1 == pytest.approx(2 * recall * precision / both if both else 0.0)


def test_the_needles_passage_has_to_be_cited() -> None:
    assert needle("In 1907 [1].", DOCUMENTS, "1907").f1 == 1.0
    half = needle("In 1907 [2][1].\nNot this line [3]", DOCUMENTS, "1907")
    assert (half.recall, half.precision) == (1.0, 0.5)
    assert needle("In 1907.", DOCUMENTS, "1907").f1 == 0.0


def test_stars_are_cited_in_json() -> None:
    documents = ["The little penguin counted 5 ★", "nothing", "The little penguin counted 8 ★"]
    found = stars('So: {"little_penguin": [5, 8], "passage_id": [1, 2]}', documents, ["5", "8"])
    assert (found.recall, found.precision) == (0.5, 0.5)
    assert stars("no JSON", documents, []).f1 == 0.0 == stars('{"passage_id": "x"}', documents, []).f1
