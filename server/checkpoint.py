"""A look at a model's folder before anything slow starts: are its files there, whole and readable?"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from server.errors import Exit, StartError

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model*", "tokenizer_config.json", "tekken.json", "vocab.*", "*.tiktoken")
_AGAIN = "copy or download it again"


def check_checkpoint(args: Namespace) -> None:
    """Refuse a local folder whose model can't be loaded; what isn't a local folder is left to vLLM.

    Raises:
        StartError: names the file, what is wrong with it, and what to do.
    """
    folder = Path(args.model)
    if not folder.is_dir():
        return
    try:
        _read_object(folder / "config.json")
        if args.load_format in ("auto", "hf", "safetensors"):
            _check_weights(folder)
        if not args.skip_tokenizer_init and args.tokenizer in (None, args.model):
            _check_tokenizer(folder)
    except OSError as error:
        raise _wrong(Path(error.filename or folder), f"can't be read: {error.strerror}", "change its rights") from error


def _wrong(file: Path, problem: str, change: str = _AGAIN) -> StartError:
    return StartError(f"{file} {problem}: {change}", Exit.MODEL)


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is no file."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise _wrong(file, f"is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise _wrong(file, "holds no JSON object")
    return content


def _check_weights(folder: Path) -> None:
    if not any(file for pattern in _WEIGHTS for file in folder.glob(pattern)):
        raise _wrong(folder, "holds no weights", "copy its *.safetensors, or name another folder")
    index = folder / "model.safetensors.index.json"
    for name in sorted({str(shard) for shard in _read_object(index).get("weight_map", {}).values()}):
        if not (folder / name).is_file():
            raise _wrong(folder / name, f"is missing, {index.name} names it", "copy or download it")
    for file in sorted(folder.glob("*.safetensors")):
        _check_safetensors(file)


def _check_safetensors(file: Path) -> None:
    """Its header says how long the file is: 8 bytes with the header's length, the header, the data."""
    size = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if size < 8 or length > size - 8:
            raise _wrong(file, f"is cut off after {size} bytes")
        try:
            header = json.loads(content.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            whole = 8 + length + max(ends, default=0)
        except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
            raise _wrong(file, "is no safetensors file: its header can't be read") from error
    if whole != size:
        raise _wrong(file, f"has {size} bytes, its header speaks of {whole}")


def _check_tokenizer(folder: Path) -> None:
    if not any(file for pattern in _TOKENIZERS for file in folder.glob(pattern)):
        raise _wrong(folder, "holds no tokenizer", "copy its tokenizer.json, or name one by --tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if os.path.lexists(folder / name):
            _read_object(folder / name)
