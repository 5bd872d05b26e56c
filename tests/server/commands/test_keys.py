"""`longreach keys`: the key is shown once, and the file never has it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from server.access.keys import find_key, read_keys
from server.cli import main


def add(file: Path, name: str, *more: str) -> None:
    main(["keys", "add", name, "--file", str(file), *more])


def test_a_key_is_added_listed_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    add(file, "alice", "--requests", "60", "--tokens", "5000", "--concurrent", "2", "--own-cache")
    key = capsys.readouterr().out.strip()
    add(file, "prometheus", "--for", "metrics", "console")
    capsys.readouterr()
    assert key not in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    assert find_key(read_keys(file), key) == read_keys(file)[0]

    main(["keys", "list", "--file", str(file)])
    told = capsys.readouterr().out
    assert told == "alice requests=60 tokens=5000 concurrent=2 cache=own\nprometheus for=metrics,console\n"

    monkeypatch.setattr("sys.stdin", io.StringIO(key + "\n"))
    main(["keys", "check", "--file", str(file)])
    assert capsys.readouterr().out == "alice\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("lr-other\n"))
    with pytest.raises(SystemExit) as ended:
        main(["keys", "check", "--file", str(file)])
    assert ended.value.code == 1


def test_lines_of_others_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\nold sha256:{'ab' * 32}")  # no line end
    add(file, "new")
    assert file.read_text().startswith(f"# ours\nold sha256:{'ab' * 32}\nnew sha256:")
    assert [key.name for key in read_keys(file)] == ["old", "new"]


@pytest.mark.parametrize(
    "argv, told",
    [
        (["add", "old"], "has a key named old"),
        (["add", "ä"], "a name has 1 to 64"),
        (["add", "a", "--requests", "0"], "requests= takes a whole number"),
        (["check"], "no key of this file"),
    ],
)
def test_mistakes(
    argv: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text(before := f"old sha256:{'ab' * 32}\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(SystemExit):
        main(["keys", *argv, "--file", str(file)])
    out = capsys.readouterr()
    assert told in out.out + out.err and file.read_text() == before
