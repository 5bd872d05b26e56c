"""The console's files and headers, on vLLM's own application."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from server.console import FOLDER
from tests.server.vllm_app import application

Client = Callable[..., TestClient]


@pytest.fixture
def client(parse: Callable[..., Namespace], monkeypatch: pytest.MonkeyPatch) -> Client:
    return lambda *argv: TestClient(application(parse("m", *argv), monkeypatch))


def test_the_page_and_its_files_are_served_and_typed(client: Client) -> None:
    server = client()
    page = server.get("/console")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    wanted = set(re.findall(r'(?:src|href)="(console/[^"]+)"', page.text))
    assert wanted == {"console/icon.svg", "console/console.css", "console/main.js"}
    kinds = {".js": "javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
    for file in FOLDER.iterdir():
        answer = server.get(f"/console/{file.name}")
        assert answer.status_code == 200 and kinds[file.suffix] in answer.headers["content-type"]
        assert answer.content == file.read_bytes()


def test_every_answer_forbids_scripts_and_requests_of_others(client: Client) -> None:
    for path in ("/console", "/console/main.js"):
        headers = client().get(path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert {policy[f"{kind}-src"] for kind in ("script", "style", "connect", "img")} == {"'self'"}
        assert headers["x-content-type-options"] == "nosniff"


def test_the_page_holds_no_script_or_style_and_no_foreign_address() -> None:
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", page)
    for file in FOLDER.iterdir():
        found = re.findall(r"https?://[^\s\"')]+|(?<![:\w])//\w[\w.-]+\.\w", file.read_text(encoding="utf-8"))
        assert set(found) <= {"http://www.w3.org/2000/svg"}, file.name


@pytest.mark.parametrize("path", ["/console/nothing.js", "/console/..%2F__init__.py", "/console/%2e%2e/__init__.py"])
def test_nothing_else_is_served(client: Client, path: str) -> None:
    assert client().get(path).status_code == 404


def test_a_file_that_is_known_is_not_sent_again(client: Client) -> None:
    server = client()
    first = server.get("/console/main.js")
    again = server.get("/console/main.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_it_can_be_turned_off(client: Client, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("no-console: true\n")
    for flags in (["--no-console"], ["--config", str(file)]):
        server = client(*flags)
        assert server.get("/console").status_code == server.get("/console/main.js").status_code == 404
        assert server.get("/v1/kv/policies").status_code == 200


def test_an_api_key_guards_what_it_asks_not_the_page(client: Client) -> None:
    server = client("--api-key", "secret")
    assert server.get("/console").status_code == 200
    assert server.get("/v1/kv/policies").status_code == 401


def test_it_works_behind_a_proxys_path(client: Client) -> None:
    assert client("--root-path", "/llm").get("/llm/console/main.js").status_code == 200


def test_it_is_a_page_not_a_part_of_the_api(client: Client) -> None:
    server = client()
    assert isinstance(server.app, FastAPI)
    assert not [path for path in server.get("/openapi.json").json()["paths"] if "console" in path]
