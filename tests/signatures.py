"""What we take from vLLM, found by reading our own source: every name imported, every method overridden.

    python -m tests.signatures --write     after an import or an override was added, or vLLM moved on
    python -m tests.signatures             how the installed vLLM differs, as JSON

`signatures.json` holds what Longreach was written for. A test keeps it complete, `compat` compares the private part of
it at start-up, and `make upgrade-check` compares all of it with another release.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvcache.vllm_adapter.compat import PRIVATE, PRIVATE_CPU, PRIVATE_CUDA, SIGNATURES, fingerprint, known
from tests import naive_flash

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("server", "kvcache", "attention_plugins")


def resolve(key: str) -> Any:
    """The thing that a `module:name` names.

    Raises:
        ImportError, AttributeError: it is gone.
    """
    module, path = key.split(":")
    target: Any = import_module(module)
    for name in path.split("."):
        if isinstance(target, ModuleType) and not hasattr(target, name):
            import_module(f"{target.__name__}.{name}")  # a module that its package doesn't import
        target = getattr(target, name)
    return getattr(target, "__func__", target)  # of a class method


def imported() -> Iterator[str]:
    """`module:name` of every import from vLLM in our packages."""
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                    yield from (f"{node.module}:{alias.name}" for alias in node.names)


def overridden() -> Iterator[str]:
    """`module:Class.method` of every method of vLLM's that a class of ours has, too."""
    for module in _adapters():
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == module.__name__:
                yield from _overridden_by(cls)


def _adapters() -> Iterator[ModuleType]:
    """Our modules that import vLLM; builds for CPUs need `naive_flash` for it."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            if "from vllm" in file.read_text():
                yield import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))


def _overridden_by(cls: type) -> Iterator[str]:
    for depth, ours in enumerate(cls.__mro__):
        if ours.__module__.split(".")[0] not in PACKAGES:
            continue
        for name in vars(ours):
            if name.startswith("__"):
                continue
            for base in cls.__mro__[depth + 1 :]:
                if base.__module__.split(".")[0] == "vllm" and name in vars(base):
                    if callable(getattr(base, name)):
                        yield f"{base.__module__}:{base.__qualname__}.{name}"
                    break


def collect() -> dict[str, str]:
    """All of it with the installed vLLM's fingerprints; empty where this build of vLLM hasn't got it."""
    private = (f"{module}:{path}" for entries in (PRIVATE, PRIVATE_CPU, PRIVATE_CUDA) for module, path, _ in entries)
    return {key: now or "" for key, now in sorted(look({*imported(), *overridden(), *private}).items())}


def look(keys: set[str] | dict[str, str]) -> dict[str, str | None]:
    """The installed vLLM's fingerprints, None where something is gone."""
    found: dict[str, str | None] = {}
    for key in keys:
        try:
            found[key] = fingerprint(resolve(key))
        except Exception:  # a module of another release may fail in its own ways
            found[key] = None
    return found


def differences() -> dict[str, tuple[str, str | None]]:
    """What the installed vLLM has not, or has otherwise: by name, how it was and how it is."""
    now = look(known())
    return {key: (was, now[key]) for key, was in known().items() if was and now[key] != was}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help=f"write {SIGNATURES.name} anew")
    if parser.parse_args().write:
        with pytest.MonkeyPatch.context() as patch:
            naive_flash.install(patch)
            SIGNATURES.write_text(json.dumps(collect(), indent=1) + "\n")
    else:
        json.dump(differences(), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
