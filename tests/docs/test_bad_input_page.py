"""docs/bad-input.md says what its tests test, and names all of them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.e2e.test_bad_input import BODIES
from tests.e2e.test_schema_fuzz import EXCLUDED

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "bad-input.md").read_text(encoding="utf-8")
FOLDERS = {"test_bad_input.py": "e2e", "test_schema_fuzz.py": "e2e", "test_connections.py": "server",
           "test_bodies.py": "server"}  # fmt: skip


def rows() -> list[tuple[str, str, str]]:
    return re.findall(r"^\| (.+?) \| (.+?) \| `(test_\w+\.py::\w+)` \|$", PAGE, re.MULTILINE)


def cases_of(name: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / FOLDERS[name] / name).read_text(encoding="utf-8"))
    return {f"{name}::{node.name}" for node in tree.body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}  # fmt: skip


def test_every_row_has_a_test_and_every_test_over_http_a_row() -> None:
    named = {test for _, _, test in rows()}
    assert named <= set().union(*map(cases_of, FOLDERS))
    assert cases_of("test_bad_input.py") | cases_of("test_schema_fuzz.py") <= named


def test_every_body_has_a_row_with_its_answer() -> None:
    told = {name: answer for name, answer, test in rows() if test.endswith("::test_bodies")}
    assert told == {name: str(status) for name, (_, status, _) in BODIES.items()}


def test_the_5xx_answers_that_stay_are_told() -> None:
    told = re.findall(r"^\| `(\w+) (\S+)` \| (5\d\d) \|", PAGE, re.MULTILINE)
    assert {(method, path, int(status)) for method, path, status in told} == set(EXCLUDED)
