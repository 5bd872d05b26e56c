"""Results are appended, mended, and kept apart from those of other settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evaluation.store import Conflict, Row, Store, read

IDENTITY: dict[str, Any] = {"model": "tiny", "tokenizer": "abc", "variants": {"dense": {"fields": {}}}}


def row(index: int, **rest: Any) -> Row:
    values: dict[str, Any] = {"status": "ok", "score": 1.0} | rest
    return Row("ruler", "vt", 1024, 0, index, "dense", **values)


def filled(folder: Path, rows: int = 3) -> Path:
    store = Store(folder, IDENTITY)
    for index in range(rows):
        store.add(row(index))
    store.close()
    return folder / "results.jsonl"


def test_rows_come_back_as_they_went(tmp_path: Path) -> None:
    full = row(
        7, text="ünï\ncode", measures={"nll": 1.5}, info={"depth": 0.5}, steps={"select": 3}, keep={"tokens": ["a"]}
    )  # fmt: skip
    store = Store(tmp_path, IDENTITY)
    store.add(full)
    assert list(read(tmp_path)) == [full]  # at once, without closing
    store.close()
    assert '"error"' not in (tmp_path / "results.jsonl").read_text()


def test_a_torn_last_line_is_cut_off_and_nothing_else(tmp_path: Path) -> None:
    path = filled(tmp_path)
    whole = path.read_bytes()
    for cut in (1, 20, len(row(2).line())):
        path.write_bytes(whole[:-cut])
        assert len(list(read(tmp_path))) == 2
        store = Store(tmp_path, IDENTITY)
        assert len(store.rows) == 2 and store.mended == len(row(2).line()) + 1 - cut
        store.add(row(2))
        store.close()
        assert path.read_bytes() == whole


def test_the_latest_row_of_a_key_counts(tmp_path: Path) -> None:
    filled(tmp_path)
    store = Store(tmp_path, IDENTITY)
    store.add(row(1, score=0.25))
    store.close()
    assert [(r.index, r.score) for r in read(tmp_path)] == [(0, 1.0), (1, 0.25), (2, 1.0)]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "other"}, "another model"),
        ({"tokenizer": "xyz"}, "another tokenizer"),
        ({"variants": {"dense": {"fields": {"kv_cache": {"policy": "snapkv"}}}}}, "another variants"),
    ],
)
def test_rows_of_other_settings_are_not_mixed_in(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    filled(tmp_path)
    with pytest.raises(Conflict, match=named):
        Store(tmp_path, {**IDENTITY, **change})


def test_new_variants_and_suites_may_come(tmp_path: Path) -> None:
    filled(tmp_path)
    more = {**IDENTITY, "suite needle": {"depths": 5}, "variants": {"snapkv": {"fields": {"x": 1}}}}
    Store(tmp_path, more).close()
    about = json.loads((tmp_path / "run.json").read_text())
    assert list(about["variants"]) == ["dense", "snapkv"] and about["suite needle"] == {"depths": 5}
    with pytest.raises(Conflict, match="another suite needle"):
        Store(tmp_path, {**IDENTITY, "suite needle": {"depths": 6}})


def test_one_process_writes(tmp_path: Path) -> None:
    store = Store(tmp_path, IDENTITY)
    with pytest.raises(Conflict, match="being written"):
        Store(tmp_path, IDENTITY)
    store.close()
    Store(tmp_path, IDENTITY).close()


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = filled(tmp_path)
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], lines[1][:-5], lines[2], ""]))
    with pytest.raises(Conflict, match="line 2"):
        Store(tmp_path, IDENTITY)
