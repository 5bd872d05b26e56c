"""Passkey documents: length, depth, determinism, and a key that stands only where it should."""

from __future__ import annotations

import re
from typing import Any

import pytest

from benchmarks.quality.passkeys import (
    INTRO,
    Passkey,
    Tokenizer,
    count,
    depths,
    make_passkey,
    make_suite,
    needle_span,
    render,
)


@pytest.mark.parametrize("tokens", [300, 301, 500, 1000, 3000, 6000, 20000])
@pytest.mark.parametrize("depth", [0.0, 0.03, 0.5, 1.0])
def test_length_is_within_one_percent_and_never_over(tokenizer: Tokenizer, tokens: int, depth: float) -> None:
    for seed in range(5):
        case = make_passkey(tokenizer, tokens, depth, seed)
        prompt = tokenizer(render(tokenizer, case.content), add_special_tokens=False)["input_ids"]
        assert len(prompt) == case.tokens
        assert 0.99 * tokens <= case.tokens <= tokens


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.25, 0.5, 0.77, 1.0])
def test_key_stands_at_its_depth(tokenizer: Tokenizer, depth: float) -> None:
    case = make_passkey(tokenizer, 3000, depth, 7)
    before, after = case.document.removeprefix(INTRO).split(case.needle)
    left, right = count(tokenizer, before.strip()), count(tokenizer, after.strip())
    assert left / (left + right) == pytest.approx(depth, abs=0.01)
    if depth in (0.0, 1.0):
        assert (left, right)[int(depth)] == 0


def test_same_arguments_give_the_same_bytes_and_others_do_not(tokenizer: Tokenizer) -> None:
    case = make_passkey(tokenizer, 1000, 0.4, 3)
    assert make_passkey(tokenizer, 1000, 0.4, 3) == case
    for other in [(1000, 0.4, 4), (1000, 0.5, 3), (1100, 0.4, 3)]:
        assert make_passkey(tokenizer, *other).document != case.document


def test_key_is_only_in_its_sentence(tokenizer: Tokenizer) -> None:
    for case in make_suite(tokenizer, 2000, 8, 4, 0):
        assert re.fullmatch(r"[1-9]\d{4}", case.answer)
        assert case.document.count(case.needle) == 1
        assert case.answer in case.needle
        assert not re.search(r"\d", case.content.replace(case.needle, ""))
        assert "pass key" not in case.document.replace(case.needle, "").removeprefix(INTRO)


def test_filler_is_varied_and_not_shared_between_documents(tokenizer: Tokenizer) -> None:
    suite = make_suite(tokenizer, 3000, 8, 4, 0)
    sentences = [set(case.document.removeprefix(INTRO).replace("\n\n", " ").split(". ")) for case in suite]
    for case, own in zip(suite, sentences, strict=True):
        assert len(own) > 0.97 * case.document.count(". ")
        words = re.findall(r"[a-z]+", case.document.lower())
        assert len(set(words)) > 200
    for i, one in enumerate(sentences):
        for other in sentences[:i]:
            assert len(one & other) < 0.05 * len(one)


def test_suite_walks_through_the_depths(tokenizer: Tokenizer) -> None:
    suite = make_suite(tokenizer, 400, 6, 3, 1)
    assert [case.depth for case in suite] == [0.03, 0.5, 0.97] * 2
    assert len({case.document for case in suite}) == 6
    assert depths(1) == [0.5]
    assert {case.document for case in suite}.isdisjoint(c.document for c in make_suite(tokenizer, 400, 6, 3, 2))


def test_span_covers_the_key_sentence(tokenizer: Any) -> None:
    case = make_passkey(tokenizer, 1500, 0.6, 0)
    start, end = needle_span(tokenizer, case)
    ids = tokenizer(render(tokenizer, case.content), add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids[start:end]).strip() == case.needle


@pytest.mark.parametrize(("tokens", "depth"), [(50, 0.5), (1000, 1.5), (1000, -0.1)])
def test_impossible_documents_are_refused(tokenizer: Tokenizer, tokens: int, depth: float) -> None:
    with pytest.raises(ValueError):
        make_passkey(tokenizer, tokens, depth, 0)


def test_key_must_be_a_number_of_its_own() -> None:
    case = Passkey("", "", "48213", 0.5, 0, 0, "")
    assert case.found_in("It is 48213.") and case.found_in("48213")
    assert not case.found_in("148213") and not case.found_in("482130") and not case.found_in("4821")
