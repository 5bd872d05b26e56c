"""Every architecture of the zoo: starts, serves, compresses, and frees to the block."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.models.zoo import ZOO

pytestmark = pytest.mark.engine
PROMPT = 650
NO_MOMENTS = ("phi3-longrope", "llama4-chunked")
"""Their rotations can't be undone."""
FEW_READ = ("gemma3", "llama4-chunked", "qwen3-next")
"""Two pages hold all that their few heads look at; tests/models/test_hybrid.py reads Gemma 3 by the formula."""
RUN = list(ZOO)
each = pytest.mark.parametrize("name", RUN)


@pytest.fixture(scope="module")
def everything(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """What `tests.models.matrix` tells of each, in one process for all; or told elsewhere."""
    if path := request.config.getoption("--matrix-rows"):
        return read(path.read_text())
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.matrix"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=1600,
    )
    rows = read(done.stdout)
    assert rows, done.stderr[-4000:]
    return rows


def read(lines: str) -> dict[str, dict[str, Any]]:
    found = (json.loads(line) for line in lines.splitlines() if line.startswith('{"name"'))
    return {row["name"]: row for row in found}


@pytest.fixture
def rows(everything: dict[str, dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    """No cell is silent: a model that isn't served is refused by name."""
    if why := everything[name].get("refused"):
        assert why == ZOO[name].refusal(everything[name]["device"])
        pytest.skip(f"refused there: {why}")
    return everything


@each
def test_every_model_has_a_row_and_what_is_refused_is_so_by_name(everything: dict[str, Any], name: str) -> None:
    row = everything[name]
    assert row.get("refused") == ZOO[name].refusal(row["device"])


@each
def test_none_is_token_identical_to_stock_vllm(rows: dict[str, Any], name: str) -> None:
    """The second time from the prefix cache, whose last tokens are a chunk of another length: in 16 bits, stock vLLM's
    sums round otherwise there, too."""
    row = rows[name]
    assert row["cached_tokens"] == PROMPT // row["page"] * row["page"]
    assert row["stock_anew"] == row["stock"], "kernels that don't answer alike twice"
    assert row["none"] == row["stock"]
    assert row["again"] == row["stock_again"]
    assert row["device"] == "cuda" or row["again"] == row["stock"]


@each
def test_the_full_attention_layers_are_compressed(rows: dict[str, Any], name: str) -> None:
    specimen = ZOO[name]
    assert rows[name]["layers"] == [f"model.layers.{index}.{specimen.attention}" for index in specimen.full]
    layers = specimen.shape.get("num_hidden_layers", 3)
    for done in rows[name]["policies"]:
        others = done["usage"].get("other_layers", {"layers": 0})
        assert others["layers"] == layers - len(specimen.full)


@each
def test_the_pool_holds_the_compressed_size_to_the_block(rows: dict[str, Any], name: str) -> None:
    """After the prompt: what usage tells of the full-attention layers and of the others, and nothing else."""
    row, page = rows[name], rows[name]["page"]
    for done in row["policies"]:
        usage, size = done["usage"], row["block_bytes"]
        freed, kept = usage["bytes_freed"] // size, usage["bytes_held"] // size
        assert freed > 0
        assert freed + kept == -(-PROMPT // page)
        others = usage.get("other_layers", {"bytes_held": 0})["bytes_held"] // size
        assert others == row["beside"]
        # Step 0 runs the prompt, step 1 compacts, and what it read is released with the step behind it.
        assert done["held"][3] == kept + others
        budget = done["words"]["budget"]
        assert budget - page < usage["kept_tokens"]["mean"] <= budget
    assert row["leaked"] == 0


@pytest.mark.parametrize("name", [name for name in RUN if ZOO[name].exact])
def test_answers_are_transformers_with_evicted_columns_masked(rows: dict[str, Any], name: str) -> None:
    """In float32, which GPUs' kernels don't serve."""
    row = rows[name]
    if row["device"] != "cpu":
        pytest.skip("served in bfloat16")
    assert row["reference"] == row["none"]
    masked = [done for done in row["policies"] if done["words"]["policy"] != "expectedattention"]
    assert len(masked) == 2
    for done in masked:
        assert done["tokens"] == done["masked"]
        assert done["tokens"] != row["none"]


@each
def test_selectors_read_the_full_attention_layers(rows: dict[str, Any], name: str) -> None:
    if not ZOO[name].selectors:
        assert "selector" not in rows[name]
        return
    found = rows[name]["selector"]
    assert found["steps"] == {"select": 23}
    assert ZOO[name].quantised or name in FEW_READ or found["tokens"] != rows[name]["none"]


@each
def test_what_policies_lack_is_said(rows: dict[str, Any], name: str) -> None:
    """Rotations that can't be undone are named; all others give Expected Attention what it needs."""
    missing, ran = rows[name]["missing"], [done["words"]["policy"] for done in rows[name]["policies"]]
    assert ("query moments" in missing) == (name in NO_MOMENTS)
    assert ("expectedattention" in ran) == (name not in NO_MOMENTS)


@each
def test_patterns_plan_the_full_attention_layers(rows: dict[str, Any], name: str) -> None:
    """One that computes everything answers as none does (in float32; elsewhere sums round otherwise)."""
    if reason := rows[name]["missing"].get("prefill patterns"):
        assert "patterns" not in rows[name]
        assert ("have 96 tokens" if ZOO[name].selectors else "soft caps nor learned attention sinks") in reason
        return
    every, few = rows[name]["patterns"]
    layers = len(ZOO[name].full)
    assert every["density"] == [1.0] * layers
    assert len(few["density"]) == layers and all(density < 1 for density in few["density"])
    exact = ZOO[name].exact and rows[name]["device"] == "cpu"
    assert not exact or every["tokens"] == rows[name]["none"]
    assert not exact or few["tokens"] != rows[name]["none"]
