"""Folders of models that aren't whole are refused in a line, before anything slow starts."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from server.checkpoint import check_checkpoint
from server.errors import Exit, StartError
from tests.tiny_model import write_tiny_model, write_tiny_tokenizer

Break = Callable[[Path], object]


def args(model: Path | str, load_format: str = "auto", tokenizer: str | None = None, skip: bool = False) -> Namespace:
    return Namespace(model=str(model), load_format=load_format, tokenizer=tokenizer, skip_tokenizer_init=skip)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_tokenizer(write_tiny_model(tmp_path))
    return tmp_path


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])


def longer(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")


def no_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")


def shard_gone(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cut, "model.safetensors has 100000 bytes, its header speaks of 8.*: copy or download it again"),
        (longer, "model.safetensors has .* its header speaks of"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10"), "is cut off after 1 bytes"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), "is cut off after 64 bytes"),
        (no_header, "no safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (shard_gone, r"model-2.safetensors is missing, model.safetensors.index.json names it"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": '), "config.json is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json holds no JSON object"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json is not JSON"),
        (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "holds no tokenizer.*--tokenizer"),
    ],
)
def test_what_is_broken_is_named(folder: Path, change: Break, words: str) -> None:
    check_checkpoint(args(folder))
    change(folder)
    with pytest.raises(StartError, match=words) as caught:
        check_checkpoint(args(folder))
    assert caught.value.code == Exit.MODEL and "\n" not in str(caught.value)


def test_a_file_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Path) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("server.checkpoint._check_safetensors", refuse)  # root reads everything
    with pytest.raises(StartError, match=r"model.safetensors can't be read: Permission denied: change its") as caught:
        check_checkpoint(args(folder))
    assert caught.value.code == Exit.MODEL


def test_what_is_not_asked_for_is_not_looked_at(folder: Path) -> None:
    for file in (*folder.glob("tokenizer*"), folder / "model.safetensors"):
        file.unlink()
    check_checkpoint(args(folder, "dummy", skip=True))
    check_checkpoint(args(folder, "dummy", tokenizer="another/one"))
    check_checkpoint(args("owner/name"))
