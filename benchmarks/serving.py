"""Start and stop a Longreach server for a benchmark or a test."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
START_LIMIT = 300.0
"""Seconds a server may take to start; two busy cores need about 40."""


@dataclass
class Server:
    """A server on loopback. `log`: what it printed."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> str:
        """Body of a GET.

        Raises:
            urllib.error.URLError: no answer, or an error status.
        """
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return str(answer.read().decode())

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples that carry these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            float(line.rpartition(" ")[2])
            for line in self.get("/metrics").splitlines()
            if line.startswith((name + "{", name + " ")) and all(label in line for label in wanted)
        )

    def wait_until_empty(self, seconds: float = 30) -> None:
        """Wait for vLLM's block pool to be empty.

        Raises:
            AssertionError: it isn't in time: a block leaked, or a request still runs.
        """
        deadline = time.monotonic() + seconds
        while self.metric("vllm:kv_cache_usage_perc") or self.metric("vllm:num_requests_running"):
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.metric('vllm:kv_cache_usage_perc'):.1%} of the KV cache is still in use")
            time.sleep(0.3)


@contextmanager
def running_server(log: Path, *flags: str, limit: float = START_LIMIT, progress: bool = False) -> Iterator[Server]:
    """`longreach serve` with these flags; see `running_command`."""
    with running_command(log, [*longreach_command(), "serve", *flags], limit, progress) as server:
        yield server


def longreach_command() -> list[str]:
    """The command line `longreach` beside this interpreter, or how a checkout that isn't installed has it."""
    script = Path(sys.executable).parent / "longreach"
    return [str(script)] if script.exists() else [sys.executable, "-m", "server.cli"]


def environment() -> dict[str, str]:
    """What a server's process gets: ours, and in a checkout that isn't installed what vLLM finds its plug-ins by."""
    try:
        metadata.distribution("longreach")
        return dict(os.environ)
    except metadata.PackageNotFoundError:
        paths = [_metadata(), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@cache
def _metadata() -> str:
    """A folder, until this process ends, with a package's metadata as installing would write them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    info = folder / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n", encoding="utf-8"
    )
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    lines = [
        line
        for group, entries in groups.items()
        for line in (f"[{group}]", *(f"{name} = {target}" for name, target in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


@contextmanager
def running_command(
    log: Path, command: Sequence[str], limit: float = START_LIMIT, progress: bool = False
) -> Iterator[Server]:
    """The server that a command starts, on a free port of 127.0.0.1, until the block ends.

    Args:
        command: its words; host and port are added.
        limit: seconds that it may take to start.
        progress: show how long it takes, and the log's last line.

    Raises:
        RuntimeError: it did not start; with the end of its log.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    words = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=environment())
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        _wait(server, limit, progress)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(server: Server, limit: float, progress: bool) -> None:
    end = time.monotonic() + limit
    with tqdm(desc="the server starts", disable=not progress, bar_format="{desc} [{elapsed}]{postfix}") as bar:
        while time.monotonic() < end and server.process.poll() is None:
            try:
                server.get("/health")
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
            if progress:
                bar.set_postfix_str(server.log.read_text(errors="replace").rstrip().rpartition("\n")[2][-90:])
    raise RuntimeError("the server did not start:\n" + server.log.read_text(errors="replace")[-4000:])
