"""Reports from stored results: figures, who keeps up, and when it pays."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.loadtest import report
from benchmarks.loadtest.plots import _times, full_load
from benchmarks.loadtest.records import DONE, UNFINISHED, Goals, Record
from benchmarks.loadtest.report import write_report
from benchmarks.loadtest.store import Cell, Conflict, Key, Store, load
from benchmarks.loadtest.summary import TOO_FEW, comparisons, first_tokens, summarize
from benchmarks.loadtest.tables import at_least, crossover_table, keeping_up, main_table, sentences
from benchmarks.loadtest.watch import COUNTERS, sums

PROFILE = "prompts,output=10,prompt=100"
IDENTITY = {"seed": 0, "tokens": [1000, 30000], "ttft_goal": 1.0, "tpot_goal": 0.1}


def cell(
    system: str, rate: float, good: int, unfinished: int = 0, pool: int | None = None, seconds: float = 10
) -> Cell:
    """20 requests: good ones, then slow ones, then some that still wait for their first token."""
    requests = []
    for number in range(20):
        request = Record(number, 0, 100, 10, arrival=number / 10, sent=number / 10, status=DONE, ttft=0.5, tpot=0.05)
        if number >= good:
            request.ttft = 3.0
        if number >= 20 - unfinished:
            request.status, request.ttft, request.tpot = UNFINISHED, None, None
        requests.append(request)
    watched = {"seconds": [0.0, 1.0], "running": [1, 5], "waiting": [0, 2], "cache": [0.1, 0.9],
               "grown": {"preemptions": 3.0, "tokens_seen": 1000.0, "tokens_kept": 250.0},
               "pool_tokens": 6400 if pool is None else pool // 10}  # fmt: skip
    metrics = {"percentiles_tpot_ms": {"p50": 50.0, "p90": 50.0, "p99": 50.0}, "output_throughput": 20.0}
    compresses = system != "stock"
    fields = {"kv_cache": {"policy": "snapkv"}} if compresses else {}
    server = {"version": "1", "model": "m <b>", "command": None}
    return Cell(
        Key(PROFILE, system, rate, 20, pool), fields, compresses, server, {}, seconds, metrics, watched, 7, requests
    )


def stored(folder: Path, *cells: Cell) -> Path:
    store = Store(folder, IDENTITY)
    store.note("longreach loadtest run --x '<i>'", date="2026-01-01", commit="abc", vllm="0", not_begun=[])
    for one in cells:
        store.add(one)
    return folder


def example(folder: Path) -> Path:
    return stored(
        folder, cell("stock", 0.5, 20), cell("stock", 1.0, 5, unfinished=3), cell("snapkv", 0.5, 20),
        cell("snapkv", 1.0, 19), cell("snapkv", 2.0, 6), cell("stock", math.inf, 0, seconds=20.0),
        cell("snapkv", math.inf, 0, seconds=8.0),
    )  # fmt: skip


def test_results_come_back_as_they_were_stored(tmp_path: Path) -> None:
    folder = example(tmp_path)
    found = load([folder])
    assert [(one.key.system, one.key.rate) for one in found.cells] == [
        ("stock", 0.5), ("stock", 1.0), ("stock", math.inf), ("snapkv", 0.5), ("snapkv", 1.0), ("snapkv", 2.0),
        ("snapkv", math.inf),
    ]  # fmt: skip
    assert found.cells[1].requests == cell("stock", 1.0, 5, unfinished=3).requests
    found.write(folder / "results.json")
    merged = load([folder / "results.json"])
    assert merged.cells == found.cells and merged.about == found.about
    with pytest.raises(ValueError, match="holds no results"):
        load([tmp_path / "cells"])


def test_a_folder_takes_only_what_compares(tmp_path: Path) -> None:
    store = Store(example(tmp_path), IDENTITY)
    assert store.has(Key(PROFILE, "stock", math.inf, 20)) and not store.has(Key(PROFILE, "stock", 2.0, 20))
    assert not store.has(Key(PROFILE, "stock", 0.5, 20, pool=64000))
    with pytest.raises(Conflict, match=r"seed 1 don't compare with those with 0 in .*take another --out"):
        Store(tmp_path, {**IDENTITY, "seed": 1})


def test_loads_that_ended_before_all_was_known_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "available", lambda: False)
    # Goals of 1 s and 9 x 0.1 s: what arrived less than 1.9 s before the end could still have been good.
    told = write_report([stored(tmp_path, cell("stock", 1.0, 5, unfinished=4, seconds=3.65))])
    assert "ended early, for want of time: 2 of the unfinished could still have been good" in told
    assert "ended early" not in write_report([stored(tmp_path / "b", cell("stock", 1.0, 5, unfinished=4, seconds=9))])


def test_profiles_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    texts = [f"prompts,output=10,prompt={prompt}" for prompt in (200, 1600, 32768)]
    cells = [cell("stock", 1.0, 20) for _ in texts]
    for one, text in zip(cells, texts, strict=True):
        one.key = replace(one.key, profile=text)
    assert [one.key.profile for one in load([stored(tmp_path, *reversed(cells))]).cells] == texts


def test_runs_of_several_folders_are_one_report(tmp_path: Path) -> None:
    first = stored(tmp_path / "a", cell("stock", 1.0, 5), cell("stock", 0.5, 20))
    second = stored(tmp_path / "b", cell("snapkv", 1.0, 20), cell("stock", 1.0, 7))
    results = load([first, second])
    assert [(one.key.system, one.key.rate) for one in results.cells] == [
        ("stock", 0.5), ("stock", 1.0), ("snapkv", 1.0),
    ]  # fmt: skip
    assert len(results.about["commands"]) == 2
    summary = summarize(results)
    assert [(one.base.good, one.other.good) for one in comparisons(summary, summary.groups[0])] == [(5, 20)]
    other = Store(tmp_path / "c", {**IDENTITY, "ttft_goal": 2.0})
    other.note("longreach loadtest run")
    other.add(cell("snapkv", 0.5, 20))
    with pytest.raises(Conflict, match=r"ttft_goal 2\.0 don't compare with those with 1\.0"):
        load([first, tmp_path / "c"])


def test_loads_of_different_numbers_of_requests_are_not_compared(tmp_path: Path) -> None:
    other = cell("snapkv", 1.0, 20)
    other.key = Key(PROFILE, "snapkv", 1.0, 21)
    summary = summarize(load([stored(tmp_path, cell("stock", 1.0, 5), other)]))
    assert comparisons(summary, summary.groups[0]) == []


def test_what_waits_for_its_first_token_counts(tmp_path: Path) -> None:
    one = cell("stock", 1.0, 5, unfinished=12)
    median = first_tokens(one, 50)
    assert median is not None and median.more and median.seconds == pytest.approx(10 - 1.75)
    assert at_least(median) == "over 8.25"
    early = first_tokens(one, 10)
    assert early is not None and not early.more and at_least(early) == "0.50"


def test_figures_and_who_keeps_up(tmp_path: Path) -> None:
    summary = summarize(load([example(tmp_path)]))
    assert summary.goals == Goals(1.0, 0.1) and summary.baseline == "stock"
    (group,) = summary.groups
    lines = main_table(group).split("\n")
    assert lines[4].startswith(
        "| 1 | stock | 5 of 20 | 0.500 | 1.700 | 3.00 | over 8.11 | 50.0 | 50.0 | 5 | 90 % | 3 |"
    )
    assert (group.keeps_up("stock"), group.keeps_up("snapkv")) == (0.5, 1.0)
    assert keeping_up(summary).split("\n")[2] == "| prompts of 100 tokens, answers of 10 | 6,400 | 0.5 | 1 |"


def test_the_crossover_is_where_goodput_differs_by_more_than_chance(tmp_path: Path) -> None:
    summary = summarize(load([example(tmp_path)]))
    found = comparisons(summary, summary.groups[0])
    assert [(one.other.rate, one.verdict) for one in found] == [
        (0.5, "no difference"), (1.0, "pays"), (math.inf, "pays"),
    ]  # fmt: skip
    assert found[1].ratio == pytest.approx(19 / 5) and found[2].ratio == pytest.approx(2.5)
    assert sentences(summary) == [
        "snapkv against stock, prompts of 100 tokens, answers of 10; pool of 6,400 tokens: pays at 1 requests/s and "
        "full load; no difference to goodput at 0.5 requests/s."
    ]
    assert "| all at once | snapkv | 1.000 | 2.500 | 2.50 | pays |" in crossover_table(summary)


@pytest.mark.parametrize(
    ("rate", "stock", "other", "unfinished", "verdict"),
    [
        (1.0, 19, 5, 0, "costs"), (1.0, 4, 6, 0, TOO_FEW), (1.0, 0, 9, 0, "pays"),
        (1.0, 0, 0, 0, "neither has a good request"), (math.inf, 0, 0, 1, "cut short"),
        (math.inf, 0, 0, 0, "no difference"),
    ],
)  # fmt: skip
def test_verdicts(tmp_path: Path, rate: float, stock: int, other: int, unfinished: int, verdict: str) -> None:
    folder = stored(tmp_path, cell("stock", rate, stock, unfinished), cell("snapkv", rate, other))
    summary = summarize(load([folder]))
    [found] = comparisons(summary, summary.groups[0])
    assert found.verdict == verdict
    assert _times(found).startswith("(") == (verdict == TOO_FEW), "the picture's brackets"


def test_pools_are_compared_each_with_itself(tmp_path: Path) -> None:
    sizes = (64_000, 128_000)
    cells = [cell(name, 1.0, 20 if name == "snapkv" else size // 8000, pool=size)
             for size in sizes for name in ("stock", "snapkv")]  # fmt: skip
    summary = summarize(load([stored(tmp_path, *cells)]))
    told = [[(one.base.pool, one.verdict) for one in comparisons(summary, group)] for group in summary.groups]
    assert told == [[(6400, "pays")], [(12800, "pays")]]
    assert summary.groups[0].title.endswith("pool of 6,400 tokens")


def test_a_page_has_everything_and_needs_nothing_else(tmp_path: Path) -> None:
    folder = example(tmp_path)
    told = write_report([folder])
    page = (folder / "report.html").read_text()
    assert "pays at 1 requests/s" in told and str(folder / "report.html") in told
    assert page.count("data:image/png;base64,") == 3  # crossover, by rate, over time
    assert "stock, 1 a second, prompts of 100 tokens, answers of 10: 3 unfinished of 20" in page
    assert "&lt;i&gt;" in page and "m &lt;b&gt;" in page and "<i>" not in page
    assert 'src="http' not in page and 'href="http' not in page
    assert (folder / "crossover.png").read_bytes().startswith(b"\x89PNG")


def test_the_one_json_file_alone_gives_the_same_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "available", lambda: False)  # drawing takes seconds
    folder, alone = example(tmp_path), tmp_path / "alone"
    write_report([folder])
    page = (folder / "report.html").read_text()
    assert "There are no pictures" in page and "<img" not in page
    alone.mkdir()
    (alone / "results.json").write_text((folder / "results.json").read_text())
    write_report([alone / "results.json"])
    assert (alone / "report.html").read_text() == page


def test_full_loads_are_drawn_by_prompt_and_answer(tmp_path: Path) -> None:
    shapes = [(prompt, output) for prompt in (100, 400) for output in (10, 20)]
    cells = [cell(system, math.inf, 0, seconds=10 if system == "stock" else 10 * 100 / prompt)
             for prompt, output in shapes for system in ("stock", "snapkv")]  # fmt: skip
    for number, one in enumerate(cells):
        prompt, output = shapes[number // 2]
        one.key = replace(one.key, profile=f"prompts,output={output},prompt={prompt}")
    figure = full_load(summarize(load([stored(tmp_path, *cells)])))
    assert figure is not None
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["100", "400"]
    texts = {text.get_position(): text.get_text().partition("\n")[0] for text in axes.texts}
    assert texts == {(0, 0): "1×", (0, 1): "1×", (1, 0): "4×", (1, 1): "4×"}
    assert full_load(summarize(load([example(tmp_path / "one")]))) is None


def test_another_baseline_is_told_by_name(tmp_path: Path) -> None:
    results = load([example(tmp_path)])
    assert summarize(results, "snapkv").baseline == "snapkv"
    with pytest.raises(ValueError, match="there is stock, snapkv"):
        summarize(results, "nobody")


def test_one_system_alone_has_a_page_without_a_crossover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "available", lambda: False)
    folder = stored(tmp_path, cell("stock", 1.0, 20))
    write_report([folder])
    assert "Crossover" not in (folder / "report.html").read_text()


def test_metrics_are_summed_over_engines_and_labels() -> None:
    page = "\n".join([
        'vllm:num_requests_running{engine="0"} 3', 'vllm:num_requests_running{engine="1"} 4',
        'vllm:kv_cache_usage_perc{engine="0"} 0.25', 'vllm:num_preemptions_total{engine="0"} 2',
        'longreach_kv_compactions_total{policy="a"} 5', 'longreach_kv_compactions_total{policy="b"} 6',
        'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1', 'other_total 9',
    ])  # fmt: skip
    assert sums(page + "\n") == {
        "running": 7, "cache": 0.25, "preemptions": 2, "compactions": 11, "pool_tokens": 1600,
    }  # fmt: skip
    assert "compactions" in COUNTERS
