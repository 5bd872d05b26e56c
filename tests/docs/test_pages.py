"""docs/policies/ and docs/selectors/ say what the source says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from attention_plugins.decode.registry import selectors

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build", DOCS / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_current(build: ModuleType) -> None:
    """When this fails: `make docs`."""
    pages = [*(DOCS / "policies").glob("*.md"), *(DOCS / "selectors").glob("*.md"), DOCS / "selectors.md"]
    written = {page.relative_to(DOCS).as_posix(): page.read_text(encoding="utf-8") for page in pages}
    assert written == build.pages()


def test_every_selector_has_a_formula(build: ModuleType) -> None:
    for selector in selectors().values():
        idea, formula = build.parted(selector.describe()["description"])
        assert idea and formula and "Formula:" not in idea + formula, selector.name


@pytest.mark.parametrize("page", [*DOCS.rglob("*.md"), DOCS.parent / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
