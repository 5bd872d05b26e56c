"""From rows to what is said about them: the rule on weak tasks, worst tasks, recommendations, pages."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evaluation import plots, tables
from benchmarks.evaluation.docs import write_docs
from benchmarks.evaluation.report import as_html, as_markdown
from benchmarks.evaluation.standing import compared, recommend, standing, standings
from benchmarks.evaluation.store import Row
from benchmarks.evaluation.summary import Summary, of_files, summarise
from benchmarks.evaluation.sweep import check

VARIANTS = check({
    "suites": {"ruler": {"lengths": [2048]}}, "policies": ["snapkv", "tova"], "budgets": ["50%", "25%"],
    "questions": ["known", "unknown"], "selectors": [{"selector": "quest", "tokens": 512}], "patterns": ["streaming"],
}).dense_and_others({})  # fmt: skip
SCORES = {
    "dense": (1.0, 0.8, 0.2), "snapkv 50%": (1.0, 0.8, 0.1), "snapkv 25%": (1.0, 0.74, 0.9),
    "tova 50%": (1.0, 0.6, 0.9), "tova 25%": (0.2, 0.1, 0.0), "snapkv 50%, question unknown": (0.5, 0.3, 0.0),
    "quest 512": (0.96, 0.78, 0.2), "streaming": (1.0, 0.8, 0.2),
}  # fmt: skip
"""Means of niah_single_1, vt and cwe; the dense model can't do cwe."""
TASKS = ("niah_single_1", "vt", "cwe")


def rows(variant: str, length: int = 2048, **rest: Any) -> list[Row]:
    kept = {"50%": 0.5, "25%": 0.25}.get((re.search(r"\d+%", variant) or [""])[0], 1.0)
    found = []
    for task, score in zip(TASKS, SCORES[variant], strict=True):
        values: dict[str, Any] = {"kept": kept, "bytes_held": int(kept * 1e8)} | rest
        for index in (0, 1):
            status: dict[str, Any] = {"status": "ok", "score": score}
            found.append(Row("ruler", task, length, 0, index, variant, **status, **values))
    return found


def speed(variant: str, ttft: float) -> Row:
    return Row("speed", "speed", 2048, 0, 0, variant, "ok", measures={"ttft": ttft, "tpot": 0.01})


def run_of(*extra: Row, without: tuple[str, ...] = ()) -> Summary:
    about = {
        "model": "tiny", "date": "2026-11-22T10:00:00+00:00", "commit": "a" * 40, "server": "1", "seconds": 60,
        "command": "longreach eval run x.yaml", "note": "a <machine>",
        "variants": {
            v.name: {"group": v.group, "method": v.method, "budget": v.budget, "question": v.question,
                     "fields": dict(v.fields)} for v in VARIANTS
        },
    }  # fmt: skip
    own = [row for variant in SCORES if variant not in without for row in rows(variant)]
    needles = [
        Row("needle", "needle", length, 0, 0, variant, "ok", score, info={"depth": depth})
        for variant, score in (("dense", 1.0), ("snapkv 25%", 0.0)) for length in (1024, 2048) for depth in (0.03, 0.97)
    ]  # fmt: skip
    return summarise([about], [*own, *needles, speed("dense", 0.2), speed("streaming", 0.1), *extra])


def test_tasks_that_the_dense_model_cannot_do_are_left_out_by_rule() -> None:
    summary = run_of()
    assert compared(summary, "ruler", 2048) == (["niah_single_1", "vt"], ["cwe"])
    found = {each.variant: each for each in standings(summary, "ruler", 2048)}
    assert found["dense"].mean == pytest.approx(0.9)
    # cwe, at which it is far better than dense, doesn't count.
    assert found["snapkv 25%"].mean == pytest.approx(0.87) and found["snapkv 25%"].worst_task == "vt"
    table = tables.task_table(summary, "ruler", 2048)
    assert "| (cwe) |" in table and "| snapkv 25% | 100 | 74 | 90 |" in table
    assert "| cwe | (20) |" in tables.dense_table(summary, "ruler")
    assert "Left out, since the dense model scores under 30%: cwe." in tables.left_out(summary, "ruler", 2048)


def test_errors_of_means_follow_the_samples_spread() -> None:
    split = [Row("ruler", "vt", 2048, 0, i, "tova 50%", "ok", score) for i, score in enumerate((0.4, 0.8))]
    split += [row for row in rows("tova 50%") if row.task != "vt"]
    own = standing(run_of(*split, without=("tova 50%",)), "ruler", "tova 50%", 2048)
    # The spread of 0.4 and 0.8 is 0.28, their mean's error 0.2; the other task has none; two tasks.
    assert own is not None and own.mean == pytest.approx(0.8) and own.error == pytest.approx(0.1)


def test_failed_requests_are_counted_and_not_rated() -> None:
    bad = Row("ruler", "vt", 2048, 0, 2, "tova 50%", "timeout", error="no answer in 60 s")
    summary = run_of(bad)
    own = standing(summary, "ruler", "tova 50%", 2048)
    assert own is not None and own.mean == pytest.approx(0.8) and (own.failed, own.worst) == (1, 0.6)
    assert "tova 50% (1 failed)" in tables.standing_table(summary, "ruler", 2048)
    assert "| 1 | timeout | tova 50% | ruler | no answer in 60 s |" in tables.failure_table(summary)
    assert "1 timeout" in tables.counts(summary) and "no answer in 60 s" in as_markdown(summary)


def test_a_task_without_any_answer_leaves_no_mean() -> None:
    lost = [Row("ruler", "vt", 2048, 0, i, "tova 50%", "error", error="gone") for i in (0, 1)]
    kept = [row for row in rows("tova 50%") if row.task != "vt"]
    own = standing(run_of(*lost, *kept, without=("tova 50%",)), "ruler", "tova 50%", 2048)
    assert own is not None and own.mean is None and own.failed == 2 and own.worst == 1.0


def test_recommendations_follow_the_rule() -> None:
    found = {advice.need.split(";")[-1].strip(): advice for advice in recommend(run_of(), "ruler", 2048)}
    known, unknown = found["the question is in the prompt"], found["one document, questions that come later"]
    # snapkv at a quarter has 0.87 of 0.9 on the mean and 0.74 of 0.8 in its worst task.
    assert (known.chosen.variant, known.enough, known.gain) == ("snapkv 25%", True, "4.0 times less KV cache")
    assert (unknown.chosen.variant, unknown.enough) == ("snapkv 50%, question unknown", False)
    assert found["each step reads little"].gain == "reads 512 tokens a step"
    assert found["The first token sooner"].gain == "2.00 times as fast to the first token"
    assert "none is good enough; best: snapkv 50%, question unknown" in tables.advice_table(run_of(), "ruler", 2048)


def test_a_good_mean_with_a_bad_task_is_not_good_enough() -> None:
    better = [Row("ruler", "vt", 2048, 0, i, "snapkv 25%", "ok", 0.6, kept=0.25) for i in (0, 1)]
    better += [Row("ruler", "niah_single_1", 2048, 0, i, "snapkv 25%", "ok", 1.3, kept=0.25) for i in (0, 1)]
    summary = run_of(*better, without=("snapkv 25%",))
    assert recommend(summary, "ruler", 2048)[0].chosen.variant == "snapkv 50%"


def test_a_page_needs_nothing_else() -> None:
    page = as_html(run_of())
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 3 and all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page) and "a &lt;machine&gt;" in page
    for title in ("Which one", "Results", "Score by budget", "Cost and worth", "Each task", "The dense model"):
        assert f"{title}: ruler" in page
    assert "&#34;policy&#34;: &#34;snapkv&#34;" in page or '"policy": "snapkv"' in page


def test_pictures_are_left_out_where_there_is_nothing_to_show() -> None:
    summary = summarise([{"model": "x", "variants": {"dense": VARIANTS[0].__dict__}}], rows("dense", bytes_held=None))
    assert plots.by_budget(summary, "ruler", 2048) is None and plots.needle_maps(summary, "ruler") is None
    assert plots.trade_offs(summary, "ruler", 2048) is None
    assert "Nothing was scored" in as_markdown(summarise([{"model": "x", "variants": {}}], []))


def test_without_matplotlib_the_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    page = as_html(run_of())
    assert "data:image" not in page and "There are no pictures" in page and "Each task: ruler" in page


def test_many_heat_maps_are_a_choice_that_holds_every_method() -> None:
    summary = run_of()
    names = [variant.name for variant in VARIANTS]
    assert plots._chosen(summary, names) == names
    plots_most = plots.PANELS
    many = Summary(summary.runs, {f"m{i // 4} {i % 4}": {"method": f"m{i // 4}", "question": None} for i in range(80)},
                   [], [])  # fmt: skip
    chosen = plots._chosen(many, list(many.variants))
    assert len(chosen) == plots_most and {name.split()[0] for name in chosen} == {f"m{i}" for i in range(20)}


def test_summaries_are_small_and_come_back(tmp_path: Path) -> None:
    summary = run_of()
    path = tmp_path / "summary.json"
    path.write_text(summary.as_json())
    again = of_files([path])
    assert tables.standing_table(again, "ruler", 2048) == tables.standing_table(summary, "ruler", 2048)
    other = summarise([{**summary.runs[0], "variants": {"dense": summary.variants["dense"]}}],
                      [*rows("dense"), *rows("dense", 4096)])  # fmt: skip
    (tmp_path / "dense.json").write_text(other.as_json())
    both = of_files([path, tmp_path / "dense.json"])
    assert both.lengths("ruler") == [2048, 4096] and len(both.runs) == 2
    wrong = tmp_path / "wrong.json"
    wrong.write_text(summary.as_json().replace('"model":"tiny"', '"model":"huge"'))
    with pytest.raises(ValueError, match="different models: huge, tiny"):
        of_files([path, wrong])


def test_the_documentation_is_written_from_a_summary(tmp_path: Path) -> None:
    path = tmp_path / "2026-summary.json"
    path.write_text(run_of().as_json())
    told = write_docs([path], tmp_path / "docs" / "quality.md", tmp_path / "docs" / "images")
    page = (tmp_path / "docs" / "quality.md").read_text()
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page)
    assert len(links) == 3 and all((tmp_path / "docs" / link).exists() for link in links)
    assert told.count("\n") == 3 and "longreach eval run x.yaml" in page and "Which one: ruler" in page


def test_the_committed_page_says_what_the_committed_results_say(tmp_path: Path) -> None:
    """When this fails: `longreach eval docs benchmarks/results/...` with the summaries that the page names."""
    root = Path(__file__).resolve().parents[3]
    page = (root / "docs" / "quality.md").read_text(encoding="utf-8")
    names = re.findall(r"`([\w.-]+\.json)`", page)
    write_docs([root / "benchmarks" / "results" / name for name in names], tmp_path / "quality.md", tmp_path / "images")
    assert names and (tmp_path / "quality.md").read_text(encoding="utf-8") == page
    assert all((root / "docs" / "images" / picture.name).exists() for picture in (tmp_path / "images").iterdir())
