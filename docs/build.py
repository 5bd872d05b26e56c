"""Write docs/policies/, docs/selectors.md and docs/selectors/ from their classes' own words: `make docs`.

A test checks that the pages are current.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from attention_plugins.decode.registry import BUILT_IN as SELECTORS
from kvcache.registry import BUILT_IN, PARTS
from server.selectors import needs_of

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "benchmarks" / "results"
QUALITY, COST = "2026-11-22-quality-table-4000-h100.json", "2026-11-22-cuda-h100-fourth.json"
"""What the pages quote; the files say how it was measured."""
_SIGNS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def arguments(schema: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of a table, the budget first."""
    properties = schema.get("properties", {})
    first = {name: properties[name] for name in ("budget", "sinks") if name in properties}
    return [
        {
            "name": name,
            "default": str(field.get("default", "needed")),
            "allowed": _allowed(field),
            "meaning": field.get("description", ""),
        }
        for name, field in {**first, **properties}.items()
    ]


def _allowed(field: dict[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    if "anyOf" in field:
        return "tokens, or a share such as 25%"
    if field.get("type") == "array":
        return f"list of {_allowed(field['items'])}".replace("list of list of", "lists of numbers")
    return ", ".join(f"{sign} {field[key]}" for key, sign in _SIGNS.items() if key in field)


def measured() -> dict[str, dict[str, Any]]:
    """By policy, what the result files tell: `scores`, a row for each budget, and `cost`, of a prompt of 32k."""
    found: dict[str, dict[str, Any]] = {}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in json.loads((RESULTS / QUALITY).read_text(encoding="utf-8"))["cells"]:
        row = rows.setdefault((cell["policy"], cell["budget"]), {"budget": cell["budget"]})
        row[cell["setting"]] = cell
    for (policy, _), row in rows.items():
        found.setdefault(policy, {"scores": [], "cost": None})["scores"].append(row)
    for run in json.loads((RESULTS / COST).read_text(encoding="utf-8"))["runs"]:
        for row in run["rows"]:
            if row.get("prompt") == 32768 and "compaction_ms" in row:
                found.setdefault(row["policy"], {"scores": [], "cost": None})["cost"] = row
    return found


def pages() -> dict[str, str]:
    """Texts by their places in docs/."""
    jinja = Environment(
        loader=FileSystemLoader(HERE / "templates"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    jinja.filters["arguments"] = arguments
    return {**_policies(jinja), **_selectors(jinja)}


def _policies(jinja: Environment) -> dict[str, str]:
    policies = [policy.describe() for policy in BUILT_IN]
    parts = {field: [part.describe() for part in known.values()] for field, known in PARTS.items()}
    found = {"policies/README.md": jinja.get_template("policies.md.jinja").render(policies=policies, parts=parts)}
    page = jinja.get_template("policy.md.jinja")
    told = measured()
    documents = json.loads((RESULTS / QUALITY).read_text(encoding="utf-8"))["settings"]["documents"]
    files = {"quality_file": QUALITY, "cost_file": COST, "documents": documents}
    return found | {
        f"policies/{policy['name']}.md": page.render(policy=policy, measured=told.get(policy["name"]), **files)
        for policy in policies
    }


def _selectors(jinja: Environment) -> dict[str, str]:
    selectors = [each.describe() for each in SELECTORS]
    found = {"selectors.md": jinja.get_template("selectors.md.jinja").render(selectors=selectors)}
    page = jinja.get_template("selector.md.jinja")
    for selector in selectors:
        found[f"selectors/{selector['name']}.md"] = page.render(selector=selector, needs=needs_of(selector))
    return found


def main() -> None:
    written = pages()
    for folder in ("policies", "selectors"):
        (HERE / folder).mkdir(exist_ok=True)
        for stale in set((HERE / folder).glob("*.md")) - {HERE / name for name in written}:
            stale.unlink()
    for name, text in written.items():
        (HERE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
