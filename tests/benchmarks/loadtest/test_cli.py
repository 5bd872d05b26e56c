"""`longreach loadtest` from its command line, on fake endpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.loadtest import report
from benchmarks.loadtest.cli import main
from benchmarks.loadtest.store import load
from tests.benchmarks.loadtest import fake as fake_module
from tests.benchmarks.loadtest.fake import Fake

SNAPKV = 'snapkv={"kv_cache": {"policy": "snapkv"}}'
SMALL = ["--profile", "prompts,prompt=40,output=3", "--requests", "4", "--seconds", "60"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds, and test_report.py has them."""
    monkeypatch.setattr(report, "available", lambda: False)


def measured(fake: Fake) -> int:
    """Streamed requests; those before a load, that aren't measured, are not streamed."""
    return sum(bool(body.get("stream")) for body in fake.bodies)


def test_a_run_measures_reports_and_goes_on_where_it_was(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--url", fake.url, "--out", str(tmp_path), *SMALL]
    assert main([*words, "--rates", "20,inf", "--variant", SNAPKV, "--variant", "none={}"]) == 0
    assert "good" in capsys.readouterr().out
    assert measured(fake) == 2 * 2 * 4
    results = load([tmp_path])
    assert results.about["systems"] == ["snapkv", "none"] and results.about["not_begun"] == []
    for cell in results.cells:
        assert cell.count("done") == 4 and cell.watched["pool_tokens"] == 64_000
        assert cell.fields == ({"kv_cache": {"policy": "snapkv"}} if cell.key.system == "snapkv" else {})
    salts = {body["cache_salt"] for body in fake.bodies if body.get("stream")}
    assert len(salts) == 4  # no load finds another's prompts in the prefix cache
    by_salt = [[body["prompt"] for body in fake.bodies if body["cache_salt"] == salt] for salt in salts]
    assert all(sorted(prompts) == sorted(by_salt[0]) for prompts in by_salt)
    assert (tmp_path / "report.html").exists() and json.loads((tmp_path / "results.json").read_text())["cells"]
    # Again: nothing is asked. With one more rate: only that one.
    assert main([*words, "--rates", "20,inf", "--variant", SNAPKV, "--variant", "none={}"]) == 0
    assert measured(fake) == 16
    assert main([*words, "--rates", "20,40x3", "--variant", SNAPKV]) == 0
    assert measured(fake) == 19
    assert main(["report", str(tmp_path), "--baseline", "snapkv"]) == 0
    assert main(["run", "--url", fake.url, "--out", str(tmp_path), *SMALL, "--seed", "1"]) == 2
    assert "take another --out" in capsys.readouterr().err


def test_without_variants_a_longreach_server_is_compared_with_itself(fake: Fake, tmp_path: Path) -> None:
    assert main(["run", "--url", fake.url, "--out", str(tmp_path), *SMALL, "--rates", "inf"]) == 0
    assert load([tmp_path]).about["systems"] == ["none", "snapkv 512"]


def test_another_server_is_asked_as_it_is(fake: Fake, tmp_path: Path) -> None:
    fake.longreach = False
    with fake_module.serving(Fake(longreach=False)) as stock:
        words = ["run", "--server", f"stock={stock.url}", "--out", str(tmp_path), *SMALL, "--rates", "inf"]
        assert main(words) == 0
        assert load([tmp_path]).about["systems"] == ["stock"]
        # It ignores fields that it doesn't know: that isn't measured as if it had compressed.
        assert main([*words, "--variant", SNAPKV]) == 2


def test_commands_are_started_with_each_pool_and_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"a=python {fake_module.__file__}"
    words = ["run", "--server", command, "--out", str(tmp_path), *SMALL, "--rates", "inf", "--variant", SNAPKV]
    assert main([*words, "--pools", "32K,64K"]) == 0
    cells = load([tmp_path]).cells
    assert [(cell.key.pool, cell.watched["pool_tokens"]) for cell in cells] == [(32_000, 32_000), (64_000, 64_000)]
    assert "--kv-cache-memory-bytes 32000" in capsys.readouterr().err
    # All is there: nothing is started again.
    logs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("server-*.log")}
    assert len(logs) == 2 and main([*words, "--pools", "32K,64K"]) == 0
    assert {path: path.stat().st_mtime_ns for path in logs} == logs


def test_a_command_that_starts_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "--server", "a=python -c 'print(\"no model here\"); raise SystemExit(3)'", "--out", str(tmp_path)]
    assert main([*words, *SMALL]) == 1
    assert "no model here" in capsys.readouterr().err


def test_what_there_is_no_time_for_is_told(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "--url", fake.url, "--out", str(tmp_path), "--profile", "prompts,prompt=40,output=3"]
    words += ["--requests", "4", "--seconds", "12", "--rates", "0.1,inf", "--variant", "none={}"]
    assert main(words) == 1  # 40 s of arrivals don't fit, all at once does
    assert [cell.key.rate for cell in load([tmp_path]).cells] == [float("inf")]
    assert "Not measured, for want of time: none, 0.1 a second" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--url", "http://192.0.2.1:8000"], "Add --remote"),
        (["--server", "a=https://example.org"], "Add --remote"),
        (["--rates", "0.5,0"], "must be above 0"),
        (["--rates", "fast"], "numbers by commas"),
        (["--rates", "1x0"], "--rates 1x0: 0: allowed are 1 to 10000"),
        (["--requests", "0"], "--requests 0: allowed are 1 to 10000"),
        (["--seconds", "1e9"], "--seconds 1e+09: allowed are 10 to 21600"),
        (["--profile", "novels"], "there are prompts, document"),
        (["--variant", "a=b"], "isn't JSON"),
        (["--url", "http://127.0.0.1:1", "--pools", "1G"], "give --server NAME=COMMAND"),
        (["--token-ids", "5"], "two numbers such as 1000:30000"),
        (["--server", "a=x", "--server", "a=y"], "two servers have one name"),
    ],
)
def test_bad_arguments_say_what_to_change(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--out", str(tmp_path / "none"), *words]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--variant", 'x={"kv_cache": {"policy": "unknown"}}'], "there is no 'unknown'"),
        (["--profile", "prompts,prompt=9000"], "has room for 8192"),
        (["--model", "huge"], "no model huge; there is tiny"),
    ],
)
def test_what_the_server_refuses_is_told_before_any_load(
    fake: Fake, words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--url", fake.url, "--out", str(tmp_path), *words]) == 2
    assert told in capsys.readouterr().err
    assert measured(fake) == 0


def test_profiles_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles"]) == 0
    assert "agent" in capsys.readouterr().out
