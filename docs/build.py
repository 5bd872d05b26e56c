"""Write the pages of methods, models, settings and commands from what the source says: `make docs`.

A test checks that the pages are current.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from attention_plugins.decode.registry import BUILT_IN as SELECTORS
from attention_plugins.prefill.registry import BUILT_IN as PATTERNS
from docs import reference
from kvcache.registry import BUILT_IN, PARTS
from server import rules
from server.patterns import needs_of as pattern_needs
from server.selectors import needs_of
from tests.models.zoo import AVX2, COMMON, ZOO, Specimen

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "benchmarks" / "results"
QUALITY = "2026-11-22-quality-table-4000-h100.json"
COSTS = ("2026-11-22-cuda-h100-fourth.json", "2026-11-22-selectors-h100.json")
"""Of a policy that several have, the last one's row counts."""
SPEED = "2026-11-22-selectors-h100.json", "2026-11-23-quest-8-bit-h100.json", "2026-11-24-selectors-h100.json"
"""Of a shape that several have, the last one's row counts."""
SELECTOR_QUALITY = "2026-11-22-selector-quality-7000-h100.json"
"""What the pages quote; the files say how it was measured."""
LATER_QUALITY = "2026-11-23-selector-quality-7000-h100.json", "2026-11-24-selector-quality-pinned-h100.json"
"""With recycled's window and tidal's shared lists, then with what is pinned; of a row of both the last one counts."""
TAILS = "2026-11-23-pattern-quality-tails-7000-h100.json"
MORE_TAILS = "2026-11-23-pattern-quality-second-h100.json"
DELTAS = "2026-11-23-pattern-quality-delta-h100.json"
SIX_SEEDS = "2026-11-24-pattern-quality-six-seeds-h100.json"
TWELVE_SEEDS = "2026-11-24-pattern-quality-delta-windows-h100.json"
PREFILL, PATTERN_QUALITY = "2026-11-22-prefill-h100.json", "2026-11-22-pattern-quality-7000-h100.json"
MODEL_SPEED, NEEDLES = "2026-11-22-models-h100.json", "2026-11-22-gemma-needles-h100.json"
MODEL_MATRIX = "2026-11-22-models-matrix-h100.json"
NOT_ON = {"cpu": ", on GPUs alone", AVX2: ", not on x86 CPUs without AVX-512"}
SPEED_TOKENS = 2048
KINDS = {"recycled": ("mean over a stride of 50",), "local": ("all near", "all far")}
"""Of selectors whose steps differ, those that the page tells."""
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
    for cell in _read(QUALITY)["cells"]:
        row = rows.setdefault((cell["policy"], cell["budget"]), {"budget": cell["budget"]})
        row[cell["setting"]] = cell
    for (policy, _), row in rows.items():
        found.setdefault(policy, {"scores": [], "cost": None})["scores"].append(row)
    for file in COSTS:
        for run in _read(file)["runs"]:
            for row in run["rows"]:
                if row.get("prompt") == 32768 and "compaction_ms" in row:
                    found.setdefault(row["policy"], {"scores": [], "cost": None})["cost"] = row | {"file": file}
    return found


def measured_selectors() -> dict[str, dict[str, Any]]:
    """By selector: `speed`, a row for each shape and kind of step, the last run's, and `needles`, by variant and K."""
    times: dict[tuple[str, int, int, str], dict[str, Any]] = {}
    dense: dict[tuple[int, int], float] = {}
    for file, run in ((name, run) for name in SPEED for run in _read(name)["runs"]):
        for row in run["rows"] if "benchmarks.gpu.reading" in run["command"] else ():
            shape = row["context"], row["batch"]
            if row["selector"] == "dense":
                dense[shape] = row["ms"]
            elif row["tokens"] == SPEED_TOKENS and row["kind"] in KINDS.get(row["selector"], ("",)):
                times[row["selector"], *shape, row["kind"]] = row | {"dense": dense[shape], "file": file}
    found: dict[str, dict[str, Any]] = {}
    for (selector, *_), row in sorted(times.items(), key=lambda item: item[0][1:3], reverse=True):
        found.setdefault(selector, {"speed": [], "needles": {}})["speed"].append(row)
    for row in _read(SELECTOR_QUALITY)["rows"]:
        if row["section"] == "needles" and (own := found.get(row["label"].partition(",")[0])):
            own["needles"].setdefault((row["label"], row["tokens"]), {})[row["task"]] = row
    for run in (run for name in LATER_QUALITY for run in _read(name)["runs"]):
        settings = run["settings"]
        layers = f"; {settings.get('layers', 'seven layers')}" if settings["calibrated"] else ""
        remark = f"later; seed {settings['seed']}{layers}"
        # A variant's tasks are of one run: what an older form found isn't mixed in.
        told: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
        for row in run["rows"]:
            told.setdefault((row["label"], row["tokens"]), {})[row["task"]] = row
        for (label, tokens), tasks in told.items():
            if own := found.get(label.partition(",")[0]):
                own["needles"][f"{label} ({remark})", tokens] = tasks
    return found


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def pages() -> dict[str, str]:
    """Texts by their places in docs/."""
    jinja = Environment(
        loader=FileSystemLoader(HERE / "templates"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    jinja.filters["arguments"] = arguments
    return {**_policies(jinja), **_selectors(jinja), **_patterns(jinja), **_models(jinja), **_reference(jinja)}


def _policies(jinja: Environment) -> dict[str, str]:
    policies = [policy.describe() for policy in BUILT_IN]
    parts = {field: [part.describe() for part in known.values()] for field, known in PARTS.items()}
    found = {"policies/README.md": jinja.get_template("policies.md.jinja").render(policies=policies, parts=parts)}
    page = jinja.get_template("policy.md.jinja")
    told = measured()
    documents = _read(QUALITY)["settings"]["documents"]
    files = {"quality_file": QUALITY, "documents": documents}
    return found | {
        f"policies/{policy['name']}.md": page.render(policy=policy, measured=told.get(policy["name"]), **files)
        for policy in policies
    }


def _selectors(jinja: Environment) -> dict[str, str]:
    selectors = [each.describe() for each in SELECTORS]
    found = {"selectors.md": jinja.get_template("selectors.md.jinja").render(selectors=selectors)}
    page = jinja.get_template("selector.md.jinja")
    told, settings = measured_selectors(), _read(SELECTOR_QUALITY)["settings"]
    files = {"speed_tokens": SPEED_TOKENS, "quality_file": SELECTOR_QUALITY, "settings": settings}
    files["later_files"] = LATER_QUALITY
    for selector in selectors:
        found[f"selectors/{selector['name']}.md"] = page.render(
            selector=selector, needs=needs_of(selector), measured=told.get(selector["name"]), **files
        )
    return found


def measured_prefill() -> dict[str, list[dict[str, Any]]]:
    """By pattern, its times to the first token beside stock vLLM's."""
    rows = [row for run in _read(PREFILL)["runs"] for row in run["rows"] if "ttft_s" in row and "system" in row]
    stock = {(row["prompt"], row["batch"]): row["ttft_s"] for row in rows if row["system"] == "stock"}
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["words"]:
            told = {name: value for name, value in row["words"].items() if name not in ("pattern", "min_context")}
            more = {"stock": stock[row["prompt"], row["batch"]], "told": f"`{json.dumps(told)}`"}
            found.setdefault(row["words"]["pattern"], []).append(row | more)
    return {name: sorted(own, key=lambda row: (-row["prompt"], row["batch"])) for name, own in found.items()}


def measured_tails(file: str) -> dict[str, list[str]]:
    """By setting of a pattern, the share that was computed, and passkeys and several keys of each run."""
    found: dict[str, list[str]] = {}
    for run in _read(file)["runs"]:
        for row in run["rows"]:
            found.setdefault(row["label"], [f"{100 * row['density']:.0f} %" if "density" in row else "100 %"])
            more = f", {row['found_all']}" if row["found_all"] != row["found"] else ""
            found[row["label"]].append(f"{row['found']}/{row['dense']}{more}")
    return found


def measured_seeds(file: str) -> dict[str, dict[str, str]]:
    """By setting of a pattern: its density, and by task keys found of those that dense finds and in all, the sums over
    all runs."""
    sums: dict[str, dict[str, list[int]]] = {}
    density = {}
    for row in (row for run in _read(file)["runs"] for row in run["rows"] if row["section"] == "needles"):
        own = sums.setdefault(row["label"], {}).setdefault(row["task"], [0, 0, 0])
        for at, name in enumerate(("found", "dense", "found_all")):
            own[at] += row[name]
        # The last seed's: others differ by a tenth of a percent.
        density[row["label"]] = f"{100 * row.get('density', 1):.0f} %"
    return {
        label: {"density": density[label], **{task: "{}/{}, {}".format(*own) for task, own in tasks.items()}}
        for label, tasks in sums.items()
    }


def measured_patterns() -> dict[str, dict[str, str]]:
    """By setting of a pattern, what it loses."""
    found: dict[str, dict[str, str]] = {}
    for row in _read(PATTERN_QUALITY)["rows"]:
        own = found.setdefault(row["label"], {"density": "", "kl": "", "same": ""})
        if row["section"] == "needles":
            own[row["task"]] = f"{row['found']}/{row['dense']}"
        else:
            own |= {"kl": f"{row['mean']:.4f}", "same": f"{100 * row['same_choice']:.1f} %"}
            own["density"] = f"{100 * row['density']:.0f} %" if "density" in row else "100 %"
    again = found.pop("dense again")
    found["dense"] |= {name: again[name] for name in ("kl", "same", "density")}
    return found


def _patterns(jinja: Environment) -> dict[str, str]:
    patterns = [each.describe() for each in PATTERNS]
    needs = {pattern["name"]: pattern_needs(pattern) for pattern in patterns}
    speed, quality, settings = measured_prefill(), measured_patterns(), _read(PATTERN_QUALITY)["settings"]
    files = {"speed_file": PREFILL, "quality_file": PATTERN_QUALITY, "settings": settings}
    found = {"patterns.md": jinja.get_template("patterns.md.jinja").render(patterns=patterns, needs=needs)}
    page = jinja.get_template("pattern.md.jinja")
    for pattern in patterns:
        name = pattern["name"]
        base = "+ delta" if name == "delta" else name
        own = {label: row for label, row in quality.items() if base in label and (name == "delta" or "+" not in label)}
        found[f"patterns/{name}.md"] = page.render(
            pattern=pattern, needs=needs[name], speed=speed.get(name), quality=own, **files
        )
    tails = {"tails": measured_tails(TAILS), "tails_file": TAILS, "more": measured_tails(MORE_TAILS),
             "more_file": MORE_TAILS, "deltas": measured_tails(DELTAS), "deltas_file": DELTAS,
             "seeds": measured_seeds(SIX_SEEDS), "seeds_file": SIX_SEEDS,
             "windows": measured_seeds(TWELVE_SEEDS), "windows_file": TWELVE_SEEDS}  # fmt: skip
    found["pattern-quality.md"] = jinja.get_template("pattern-quality.md.jinja").render(rows=quality, **files, **tails)
    return found


def _models(jinja: Environment) -> dict[str, str]:
    zoo = {name: _specimen(specimen) for name, specimen in ZOO.items()}
    page = jinja.get_template("models.md.jinja").render(
        zoo=zoo, models=rules.MODELS, settings=rules.SETTINGS, works=rules.WORKS, matrix=_read(MODEL_MATRIX),
        speed=_read(MODEL_SPEED)["rows"], speed_file=MODEL_SPEED, needles=_needles(), needles_file=NEEDLES,
    )  # fmt: skip
    return {"models.md": page}


def _needles() -> dict[str, list[str]]:
    """Found by way, at each length; of engines that measured dense again, the first one's."""
    found: dict[str, dict[int, str]] = {}
    lengths = sorted({row["tokens"] for row in _read(NEEDLES)["rows"]})
    for row in _read(NEEDLES)["rows"]:
        share = f" ({row['density']:.0%})" if row["density"] is not None else ""
        found.setdefault(row["way"], {}).setdefault(row["tokens"], f"{row['found']}{share}")
    return {way: [told.get(length, "") for length in lengths] for way, told in found.items()}


def _reference(jinja: Environment) -> dict[str, str]:
    return {
        "settings.md": jinja.get_template("settings.md.jinja").render(**reference.settings()),
        "commands.md": jinja.get_template("commands.md.jinja").render(**reference.commands()),
    }


def _specimen(specimen: Specimen) -> dict[str, Any]:
    shape = {**COMMON, **specimen.shape}
    query, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    size = shape.get("head_dim", shape["hidden_size"] // query)
    return {
        "full": len(specimen.full),
        "layers": shape["num_hidden_layers"],
        "heads": f"{query}, {kv_heads}, {size}",
        "not_on": "".join(words for place, words in NOT_ON.items() if place in specimen.refused),
        **{name: getattr(specimen, name) for name in ("dtype", "selectors", "exact")},
    }


def main() -> None:
    written = pages()
    for folder in ("policies", "selectors", "patterns"):
        (HERE / folder).mkdir(exist_ok=True)
        for stale in set((HERE / folder).glob("*.md")) - {HERE / name for name in written}:
            stale.unlink()
    for name, text in written.items():
        (HERE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
