"""What each step reads, as the scheduler decides it: modes, states, room, and what clients are told."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from attention_plugins.decode.registry import make_selector, selectors
from attention_plugins.decode.rows import Mode
from attention_plugins.decode.schedule import Read, ReadSchedule

PAGE = 16
NAMES = ["recycled", "tidal", "lessismore", "quest", "loki", "local"]
KEEPING, PREPARING = {"recycled", "tidal", "quest", "local"}, {"recycled", "tidal", "quest", "loki", "local"}


def asking(name: str, **words: Any) -> Any:
    selector = make_selector({"selector": name, "tokens": 64, "min_context": 0, **words})
    assert selector
    return selector


class Schedule(ReadSchedule):
    """With requests of one selector, unless said otherwise."""

    def __init__(self, requests: Iterable[str] = "a", selector: str = "recycled", **sizes: int) -> None:
        super().__init__(**{"states": 8, "capacity": 10_000, "page_size": PAGE, **sizes})
        for name in requests:
            self.start(name, asking(selector))

    def step(self, contexts: dict[str, int]) -> dict[str, Read]:
        """One step; contexts by request, in order."""
        self.begin_step()
        found = {name: self.plan(name, context, context) for name, context in contexts.items()}
        return {name: read for name, read in found.items() if read}


def modes(schedule: Schedule, steps: int, context: int = 100) -> list[Mode]:
    return [schedule.step({"a": context + step})["a"].mode for step in range(steps)]


# Modes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("since", [None, 1, 7, 1 << 30])
@pytest.mark.parametrize(("tokens", "min_context"), [(64, 0), (64, 200), (300, 200)])
def test_short_contexts_are_read_whole(name: str, since: int | None, tokens: int, min_context: int) -> None:
    """Up to K, where all is chosen anyway, and up to what the request says."""
    selector, most = asking(name, tokens=tokens, min_context=min_context), max(tokens, min_context)
    assert {selector.mode(context, since) for context in (1, most - 1, most)} == {Mode.DENSE}
    assert selector.mode(most + 1, since) is not Mode.DENSE


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("since", [None, 1, 2, 50, 10_000])
def test_most_selectors_choose_at_every_step(name: str, since: int | None) -> None:
    assert asking(name).mode(65, since) is Mode.SELECT


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"stride": 1}, "ssssssssss"),
        ({"stride": 2}, "srsrsrsrsr"),
        ({"stride": 4}, "srrrsrrrsr"),
        ({"stride": 100}, "srrrrrrrrr"),
        ({"stride": 100, "similarity": 0.5, "check_every": 1}, "Sccccccccc"),
        ({"stride": 100, "similarity": 0.5, "check_every": 3}, "Srrcrrcrrc"),
        ({"stride": 5, "similarity": 0.5, "check_every": 3}, "SrrcrSrrcr"),
        ({"stride": 4, "similarity": 0.5, "check_every": 4}, "SrrrSrrrSr"),
        ({"stride": 100, "similarity": 0.0, "check_every": 1}, "srrrrrrrrr"),
    ],
)
def test_recycled_chooses_now_and_then(words: dict[str, Any], expected: str) -> None:
    """As many steps from one choice to the next as `stride` says, the first step counted; checks between them, against
    what the choice (S) left."""
    schedule = Schedule("")
    schedule.start("a", asking("recycled", **words))
    spelled = {Mode.SELECT: "s", Mode.SELECT | Mode.CHECK: "S", Mode.REUSE: "r", Mode.CHECK: "c"}
    assert "".join(spelled[mode] for mode in modes(schedule, 10)) == expected


def test_the_length_that_counts_is_what_a_head_holds() -> None:
    """Compacted requests are short, whatever their positions are; room is taken by positions."""
    schedule = Schedule()
    schedule.begin_step()
    assert schedule.plan("a", 5000, 64) is None
    read = schedule.plan("a", 5000, 65)
    assert read and (read.mode, read.context) == (Mode.SELECT, 5000)


def test_a_read_says_all_that_workers_need() -> None:
    schedule = Schedule("")
    schedule.start("r", asking("recycled", tokens=96, similarity=0.75))
    schedule.start("l", asking("local", tokens=128, share=0.25))
    schedule.start("q", asking("quest"))
    assert schedule.step({"q": 300, "l": 400, "r": 500}) == {
        "q": Read("q", "quest", Mode.SELECT, 300, 64, 0.5, 0, pinned=48, prepare=True),
        "l": Read("l", "local", Mode.SELECT, 400, 128, 0.25, 1, prepare=True),
        "r": Read("r", "recycled", Mode.SELECT | Mode.CHECK, 500, 96, 0.75, 2, 10, 48, prepare=True),
    }


def test_requests_without_a_selector_are_unknown() -> None:
    schedule = Schedule()
    assert schedule.step({"b": 5000}) == {}
    assert schedule.selector("b") is None and schedule.usage("b") == {} and schedule.totals == {}
    schedule.forget("b")
    schedule.finish("b")
    assert isinstance(schedule.selector("a"), selectors()["recycled"])


# What is forgotten


@pytest.mark.parametrize("forget", ["forget", "dense", "crowded"])
def test_what_was_selected_is_lost(forget: str) -> None:
    """By a compaction or preemption, and by any step that takes no note of its token."""
    schedule = Schedule(states=1)
    assert modes(schedule, 3) == [Mode.SELECT, Mode.REUSE, Mode.REUSE]
    if forget == "forget":
        schedule.forget("a")
    elif forget == "dense":
        assert schedule.step({"a": 64}) == {}
    else:
        schedule.start("q", asking("loki"))  # which takes the only row
        assert set(schedule.step({"q": 100, "a": 103})) == {"q"}
    assert modes(schedule, 2, 104) == [Mode.SELECT, Mode.REUSE]


@pytest.mark.parametrize("name", NAMES)
def test_caches_are_shown_once(name: str) -> None:
    """To readers that want it: before the first step that selects, and again whenever that was forgotten."""
    schedule = Schedule("a", name)
    prepares = [schedule.step({"a": 100 + step})["a"].prepare for step in range(3)]
    schedule.forget("a")
    prepares += [schedule.step({"a": 103 + step})["a"].prepare for step in range(2)]
    assert schedule.step({"a": 64}) == {}, "a step that is read whole"
    prepares += [schedule.step({"a": 106 + step})["a"].prepare for step in range(2)]
    wanted = name in PREPARING
    assert prepares == [wanted, False, False, wanted, False, wanted, False]


# Room


def test_states_run_out() -> None:
    """A state is kept until its request ends, preempted or not; requests that need one wait for it, others don't."""
    schedule = Schedule("abc", states=2, selector="local")
    schedule.start("q", asking("quest", pinned=0))
    first = schedule.step({"a": 100})
    assert first["a"].place == 0
    assert schedule.step({"b": 100})["b"].place == 1
    assert schedule.step({"c": 100, "q": 100}).keys() == {"q"}
    schedule.forget("a")
    assert schedule.step({"c": 101, "a": 101})["a"].place == 0
    schedule.finish("a")
    assert schedule.step({"c": 102, "b": 102}) == {
        "c": Read("c", "local", Mode.SELECT, 102, 64, 0.95, 0, prepare=True),
        "b": Read("b", "local", Mode.SELECT, 102, 64, 0.95, 1),
    }
    assert schedule.usage("c") == {"crowded": 2, "select": 1}


def test_requests_that_never_selected_hold_no_state() -> None:
    schedule = Schedule("abc", states=1)
    assert schedule.step({"a": 30, "b": 64}) == {}
    schedule.finish("a")
    assert schedule.step({"b": 64, "c": 65})["c"].place == 0
    schedule.finish("b")
    assert schedule.step({"c": 66})["c"].place == 0
    schedule.finish("c")
    schedule.finish("c")
    assert schedule._free == [0], "given back once"


@pytest.mark.parametrize("name", NAMES)
def test_states_are_for_selectors_that_keep_some(name: str) -> None:
    places = [read.place for read in Schedule("abc", name).step(dict.fromkeys("abc", 100)).values()]
    assert places == ([0, 1, 2] if name in KEEPING else [-1, -1, -1])


@pytest.mark.parametrize("words", [{"pinned": 0}, {"window": 0}])
@pytest.mark.parametrize("name", ["tidal", "quest"])
def test_who_pins_nothing_needs_no_state(name: str, words: dict[str, Any]) -> None:
    schedule = Schedule("")
    schedule.start("a", asking(name, **words))
    schedule.start("b", asking(name))
    assert [read.place for read in schedule.step({"a": 100, "b": 100}).values()] == [-1, 0]


def test_rows_run_out() -> None:
    """In each step anew; rows that are read whole take none."""
    schedule = Schedule("abcd", "loki", states=2)
    schedule.start("short", asking("quest"))
    assert schedule.step({"short": 40, **dict.fromkeys("abcd", 100)}).keys() == {"a", "b"}
    assert schedule.step(dict.fromkeys("dcba", 101)).keys() == {"d", "c"}
    assert [schedule.usage(name) for name in "abcd"] == [{"select": 1, "crowded": 1}] * 2 + [
        {"crowded": 1, "select": 1}
    ] * 2


@pytest.mark.parametrize(
    ("capacity", "contexts", "expected"),
    [
        (96, [96], "a"),
        (96, [97], ""),  # its last page has one token
        (192, [81, 96], "ab"),
        (192, [97, 80], "ab"),
        (192, [97, 81], "a"),
        (208, [97, 81], "ab"),
        (176, [100, 100, 70], "a"),
        (192, [100, 100, 70], "ac"),  # who comes later may be smaller
        (224, [70, 200, 70, 70], "ac"),
    ],
)
def test_capacity_is_in_whole_pages(capacity: int, contexts: list[int], expected: str) -> None:
    schedule = Schedule("abcd", "tidal", capacity=capacity)
    given = dict(zip("abcd", contexts, strict=False))
    for _ in range(2):
        assert "".join(schedule.step(given)) == expected


def test_a_row_without_room_takes_no_state() -> None:
    schedule = Schedule("ab", capacity=96)
    assert schedule.step({"a": 97}) == {}
    assert schedule.step({"b": 96})["b"].place == 0


# What is told


def test_usage_and_totals() -> None:
    """Usage goes with its request; totals only grow, and are by selector."""
    schedule = Schedule("ab", states=1)
    schedule.start("q", asking("quest"))
    for step in range(3):
        schedule.step({"a": 62 + step})
    for step in range(4):
        schedule.step({"a": 65 + step, "b": 70, "q": 10})
    assert schedule.usage("a") == {"dense": 3, "select": 1, "reuse": 3}
    assert schedule.usage("b") == {"crowded": 4} and schedule.usage("q") == {"dense": 4}
    expected = {"recycled": {"dense": 3, "select": 1, "reuse": 3, "crowded": 4}, "quest": {"dense": 4}}
    assert schedule.totals == expected
    for name in "abq":
        schedule.finish(name)
        assert schedule.usage(name) == {}
    assert schedule.totals == expected
    schedule.start("b", asking("recycled", similarity=0.5, check_every=1))
    schedule.step({"b": 90})
    schedule.step({"b": 91})
    assert schedule.usage("b") == {"select": 1, "check": 1}
    assert schedule.totals["recycled"] == {"dense": 3, "select": 2, "reuse": 3, "crowded": 4, "check": 1}


def test_every_selector_is_here() -> None:
    assert set(NAMES) == set(selectors())
