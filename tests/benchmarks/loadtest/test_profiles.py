"""Prompts are exact in tokens, the same for one seed, and share what their profile says."""

from __future__ import annotations

import math

import pytest

from benchmarks.loadtest.arrivals import starts
from benchmarks.loadtest.profiles import PROFILES, ProfileError, listing, parse
from benchmarks.loadtest.prompts import HIGH, LOW, Piece, Turn, Writer

SMALL = {
    "prompts": ("prompts,prompt=100,output=7", [100] * 5),
    "document": ("document,document=200,question=10,questions=3,output=7", [210] * 5),
    "prefix": ("prefix,prefix=150,prompt=30,output=7", [180] * 5),
    "agent": ("agent,start=50,step=40,longest_prompt=130,output=7", [50, 90, 130, 50, 90]),
    "mixed": ("mixed,short=20,long=300,share=0.5,output=7", None),
    "generation": ("generation,prompt=20,output=900", [20] * 5),
}


def prompts(text: str, requests: int = 5, seed: int = 0) -> list[list[int]]:
    made = parse(text).conversations(requests, seed)
    return [Writer(seed).ids(turn) for conversation in made for turn in conversation.turns]


def test_every_profile_is_here() -> None:
    assert set(SMALL) == set(PROFILES)


@pytest.mark.parametrize("name", SMALL)
def test_prompts_have_exactly_the_tokens_that_were_asked_for(name: str) -> None:
    text, lengths = SMALL[name]
    found = [len(prompt) for prompt in prompts(text)]
    if lengths is None:
        assert set(found) == {20, 300}
    else:
        assert found == lengths
    profile = parse(text)
    assert profile.longest == max(found) + profile.output
    assert all(LOW <= token < HIGH for prompt in prompts(text) for token in prompt)


@pytest.mark.parametrize("name", SMALL)
def test_a_seed_makes_the_same_prompts_and_another_one_others(name: str) -> None:
    text, _ = SMALL[name]
    assert prompts(text) == prompts(text)
    assert all(a != b for a, b in zip(prompts(text), prompts(text, seed=1), strict=False))
    assert prompts(text, requests=3) == prompts(text)[:3]  # fewer requests are the first ones


def test_numbers_are_the_same_on_every_machine() -> None:
    ids = Writer(seed=3).ids(Turn((Piece("a", 3), Piece("b", 2)), 1))
    assert ids == [14531, 5118, 22447, 24758, 14137]


def test_a_document_is_shared_by_its_questions_and_by_no_others() -> None:
    found = prompts("document,document=200,question=10,questions=3", 4)
    assert found[0][:200] == found[1][:200] == found[2][:200] != found[3][:200]
    assert len({tuple(prompt[200:]) for prompt in found}) == 4


def test_a_prefix_is_shared_by_all_and_the_rest_by_none() -> None:
    found = prompts("prefix,prefix=150,prompt=30")
    assert len({tuple(prompt[:150]) for prompt in found}) == 1
    assert len({tuple(prompt[150:]) for prompt in found}) == 5


def test_an_agents_prompt_begins_with_the_one_before_it() -> None:
    first, second, third, other, _ = prompts("agent,start=50,step=40,longest_prompt=130")
    assert second[:50] == first and third[:90] == second and other != first


def test_unknown_profiles_and_arguments_say_what_there_is() -> None:
    with pytest.raises(ProfileError, match=r"no such profile, there are prompts, document"):
        parse("nonsense")
    with pytest.raises(ProfileError, match=r"arguments are output, prompt"):
        parse("prompts,length=3")
    with pytest.raises(ProfileError, match=r"prompt=-3: .*greater than 0"):
        parse("prompts,prompt=-3")


def test_titles_are_what_the_command_line_takes() -> None:
    for name in PROFILES:
        profile = parse(name)
        assert parse(profile.title) == profile
        assert name in listing() and profile.words


def test_arrivals_are_one_row_of_gaps_stretched_to_the_rate() -> None:
    slow, fast = starts(50, 0.5, seed=4), starts(50, 2.0, seed=4)
    assert slow[-1] == pytest.approx(100) and fast[-1] == pytest.approx(25)
    assert slow == pytest.approx([4 * time for time in fast])
    assert slow == sorted(slow) and len(set(slow)) == 50
    assert starts(50, 0.5, seed=5) != slow
    assert starts(3, math.inf, seed=4) == [0.0] * 3
