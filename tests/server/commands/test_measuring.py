"""Mistakes in the command lines of `longreach calibrate` and `longreach head-gates`, told before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.cli import main


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("A text.")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "bare").mkdir()
    monkeypatch.setattr("server.watching.load", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("server.calibrate.load", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("server.head_gates.load", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("server.embedded.ensure_embedded_model", lambda: tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("calibrate none.txt --output x.safetensors", "the prompt none.txt can't be read: No such file or directory"),
        ("calibrate binary.txt --output x.safetensors", "the prompt binary.txt is no UTF-8 text"),
        ("calibrate text.txt --output x.json", "--output x.json: the name must end in .safetensors"),
        ("calibrate text.txt --output no/x.safetensors", "--output no/x.safetensors: there is no folder no"),
        ("calibrate text.txt --output x.safetensors --model ./none", "./none doesn't exist: name a folder"),
        ("calibrate text.txt --output x.safetensors --model bare", "bare holds no model: there is no config.json"),
        ("calibrate text.txt text.txt --prefill --output x.safetensors", "--prefill takes one text"),
        ("calibrate text.txt --output x.safetensors --rank many", "argument --rank: invalid int value: 'many'"),
        ("head-gates none.txt --output x.tsv", "the prompt none.txt can't be read"),
        ("head-gates text.txt --output no/x.tsv", "--output no/x.tsv: there is no folder no"),
        ("head-gates text.txt --output x.tsv --model ./none", "./none doesn't exist: name a folder"),
        ("head-gates text.txt --output x.tsv --window 0", "--window is at least 1"),
        ("head-gates text.txt", "the following arguments are required: --output"),
    ],
)
def test_mistakes_end_in_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(line.split())
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
