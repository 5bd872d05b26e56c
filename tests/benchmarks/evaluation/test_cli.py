"""`longreach eval` from the command line to the report, against a fake endpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from benchmarks.evaluation import cli
from benchmarks.evaluation.store import read
from server.cli import main as longreach
from tests.benchmarks.evaluation.fake import Fake


@pytest.fixture
def known(fake: Fake, model_path: Path) -> Fake:
    """A fake whose tokenizer is found in a local folder."""
    fake.root = str(model_path)
    return fake


def sweep_file(folder: Path, **settings: Any) -> str:
    content = {
        "suites": {"needle": {"lengths": [1000, 2200], "depths": 2, "samples": 1}}, "policies": ["keeps", "forgets"],
        "budgets": ["50%"], "concurrency": 2, **settings,
    }  # fmt: skip
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_a_sweep_ends_in_a_report(known: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    argv = ["run", sweep_file(tmp_path), "--out", str(out), "--url", known.url, "--api-key", "secret", "--note", "here"]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert "| keeps 50% | 50.0 % |" in printed and "12 requests: 12 ok" in printed
    about = json.loads((out / "run.json").read_text())
    assert about["command"] == (
        f"longreach eval run sweep.yaml --out out --url {known.url} --api-key '***' --note here"
    )
    assert "secret" not in (out / "run.json").read_text() and str(tmp_path) not in (out / "report.html").read_text()
    assert (about["model"], about["server"], about["max_model_len"], about["note"]) == ("tiny", "fake-1", 4096, "here")
    summary = json.loads((out / "summary.json").read_text())
    assert {(cell["variant"], cell["score"]) for cell in summary["cells"]} == {
        ("dense", 1.0), ("keeps 50%", 1.0), ("forgets 50%", 0.0),
    }  # fmt: skip
    assert (out / "report.html").stat().st_size > 20_000 and "forgets 50%" in (out / "report.md").read_text()
    asked = len(known.bodies)
    assert cli.main(argv) == 0 and len(known.bodies) == asked + 3  # only the short trials
    assert cli.main(["report", str(out)]) == 0
    page = tmp_path / "quality.md"
    assert cli.main(["docs", str(out / "summary.json"), "--output", str(page), "--images", str(tmp_path)]) == 0
    assert "forgets 50%" in page.read_text()


def test_failed_requests_are_in_the_report_and_the_exit_code(
    known: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ["run", "--out", str(out), "--url", known.url, "--suites", "needle", "--lengths", "2200", "--samples", "1"]
    assert cli.main([*argv, "--policies", "broken:100", "--concurrency", "4"]) == 1
    assert "10 error: broken 100: status 500: out of memory" in capsys.readouterr().out
    assert {row.status for row in read(out) if row.variant != "dense"} == {"error"}
    assert "None of these is in a figure above" in (out / "report.html").read_text()


def test_variants_that_the_server_refuses_end_the_run_or_are_left_out(
    known: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "run",
        sweep_file(tmp_path, policies=["unknown", "keeps"]),
        "--out",
        str(tmp_path / "o"),
        "--url",
        known.url,
    ]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert "refused: unknown 50%: status 400: no such policy" in error and "--keep-going" in error
    assert not list(read(tmp_path / "o"))
    assert cli.main([*argv, "--keep-going"]) == 0
    assert {row.variant for row in read(tmp_path / "o")} == {"dense", "keeps 50%"}


def test_stock_servers_are_asked_without_our_fields(known: Fake, tmp_path: Path) -> None:
    known.longreach = False
    argv = ["run", sweep_file(tmp_path, policies=[]), "--out", str(tmp_path / "o"), "--url", known.url]
    assert cli.main(argv) == 0
    assert not any("kv_cache" in body or "decode_attention" in body for body in known.bodies)
    row = next(read(tmp_path / "o"))
    assert (row.status, row.kept, row.bytes_held) == ("ok", None, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--suites", "needle"], "needle: lengths: Field required"),
        (["--suites", "needle", "--lengths", "9000"], "needle: length 9000 doesn't fit the model's 4096 tokens"),
        (["--suites", "needle", "--lengths", "1k"], "--lengths 1k: must be whole numbers with commas"),
        (["--suites", "ruler", "--lengths", "900", "--tasks", "vtt"], "ruler: tasks.0"),
        (["--suites", "needle", "--lengths", "900", "--model", "other"], "no model other; there is tiny"),
        (["--suites", "needle", "--lengths", "900", "--haystack", "/nowhere"], "haystack: "),
        (["--suites", "needle", "--lengths", "900", "--timeout", "5"], "timeout: "),
        (["/nowhere.yaml"], "No such file"),
        (["--suites", "needle", "--lengths", "900", "--seeds", "a"], "--seeds a: must be whole numbers"),
        (["--suites", "needle", "--lengths", "900", "--url", "http://127.0.0.1:9"], "no models: is a server there"),
        ([], "nothing to measure: name suites (--suites ruler ...), or a SWEEP.yaml"),
    ],
)
def test_wrong_arguments_are_one_line(
    known: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        longreach(["eval", "run", "--out", str(tmp_path / "o"), "--url", known.url, *flags])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and message in lines[-1] and lines[-1].startswith("longreach eval: ")


def test_pages_are_written_from_summaries_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    for text, message in (
        ('{"a": 1}', "is no summary.json of `longreach eval report`"),
        ("{", "other.json: Expecting"),
    ):
        other.write_text(text)
        assert cli.main(["docs", str(other)]) == 2
        assert message in capsys.readouterr().err


def test_flags_of_a_server_go_with_a_server_that_is_started(known: Fake, tmp_path: Path) -> None:
    asked = ["run", "--out", str(tmp_path), "--url", known.url, "--suites", "needle"]
    for flags in (["--max-num-seqs", "4"], ["--", "--max-num-seqs", "4"]):
        with pytest.raises(SystemExit) as end:
            cli.main([*asked, *flags])
        assert end.value.code == 2


def test_a_server_is_started_and_stopped(known: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager
    from types import SimpleNamespace

    started: list[Any] = []

    @contextmanager
    def running_server(log: Path, *flags: str, **rest: Any) -> Any:
        started.append((log.name, flags))
        yield SimpleNamespace(url=known.url.removesuffix("/v1"))
        started.append("stopped")

    monkeypatch.setattr("benchmarks.serving.running_server", running_server)
    file = sweep_file(tmp_path, serve=["--max-num-seqs", 8], policies=[])
    assert (
        cli.main(["run", file, "--out", str(tmp_path / "o"), "--model", "/models/a", "--", "--dtype", "float32"]) == 0
    )
    flags = ("/models/a", "--max-num-seqs", "8", "--dtype", "float32")
    assert started == [("server.log", flags), "stopped"]
