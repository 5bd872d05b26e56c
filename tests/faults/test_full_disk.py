"""A disk that is full: a file system of one MiB, mounted where only the server sees it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from server.errors import Exit

pytestmark = pytest.mark.e2e
UNSHARE = [shutil.which("unshare") or "unshare", "--map-root-user", "--mount"]


def allowed() -> bool:
    return subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not allowed(), reason="mount namespaces are not allowed here")
def test_the_embedded_model_does_not_fit(tmp_path: Path) -> None:
    serve = f"exec '{sys.executable}' -m server.cli serve --port 0"
    script = f"mount -t tmpfs -o size=1m tmpfs '{tmp_path}' && XDG_CACHE_HOME='{tmp_path}' {serve}"
    done = subprocess.run([*UNSHARE, "sh", "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == Exit.DISK, done.stderr[-2000:]
    reason = done.stderr.strip().splitlines()[-1].rpartition("longreach: ")[2]
    assert "No space left on device" in reason and str(tmp_path) in reason and "XDG_CACHE_HOME moves it" in reason
    assert "Traceback" not in done.stderr
