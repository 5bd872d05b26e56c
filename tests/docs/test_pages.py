"""docs/policies/, docs/selectors/ and docs/patterns/ say what the source says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from attention_plugins.decode.registry import BUILT_IN as SELECTORS
from attention_plugins.prefill.base import Pattern
from attention_plugins.prefill.registry import BUILT_IN as PATTERNS
from kvcache.allocators.gates import GateHeads
from kvcache.method import Method
from kvcache.policies.base import Policy
from kvcache.registry import BUILT_IN, HEADS, LAYERS
from server import rules

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
    folders = [page for folder in ("policies", "selectors", "patterns") for page in (DOCS / folder).glob("*.md")]
    pages = [*folders, DOCS / "selectors.md", DOCS / "patterns.md", DOCS / "pattern-quality.md", DOCS / "models.md"]
    pages += [DOCS / "settings.md", DOCS / "commands.md"]
    written = {page.relative_to(DOCS).as_posix(): page.read_text(encoding="utf-8") for page in pages}
    assert written == build.pages()


EVERY = [*BUILT_IN, *PATTERNS, *LAYERS.values(), *HEADS.values()]


@pytest.mark.parametrize("method", [*EVERY, GateHeads], ids=lambda m: m.name)
def test_every_method_has_a_short_formula(method: type[Method], build: ModuleType) -> None:
    """On its page, apart from its description; an allocator's is on the page of all."""
    told, pages = method.describe(), build.pages()
    lines = told["formula"].splitlines()
    assert 1 <= len(lines) <= 6 and lines[0] == lines[0].lstrip() and "Formula" not in told["description"]
    folder = "patterns" if issubclass(method, Pattern) else "policies"
    page = pages[f"{folder}/{method.name if issubclass(method, Policy | Pattern) else 'README'}.md"]
    assert method is GateHeads or f"```text\n{told['formula']}\n```" in page
    assert not issubclass(method, Policy | Pattern) or page.count("## Formula") == 1


@pytest.mark.parametrize("method", EVERY, ids=lambda m: m.name)
def test_formulas_name_arguments_that_there_are(method: type[Method]) -> None:
    named = set(re.findall(r"`(\w+)", method.describe()["formula"]))
    assert named <= set(method.Args.model_fields)


@pytest.mark.parametrize("page", [*DOCS.rglob("*.md"), DOCS.parent / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda selector: selector.name)
def test_every_selector_has_a_formula(selector: type[Method], build: ModuleType) -> None:
    formula = selector.describe()["formula"]
    assert formula and f"```text\n{formula}\n```" in build.pages()[f"selectors/{selector.name}.md"]


@pytest.mark.parametrize("feature", rules.WORKS)
def test_features_that_work_have_a_test(feature: str) -> None:
    assert (DOCS.parent / rules.WORKS[feature]).exists()


def test_every_rule_says_what_to_change_or_why() -> None:
    for rule in (*rules.MODELS, *rules.SETTINGS):
        assert rule.flag or rule.change or rule.why or rule.name.startswith("models that"), rule.name
