"""Shapes of the models that run on GPUs: vLLM takes their configurations, and nothing about them is refused there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.models import MODELS, verdict, write
from server.model_layers import full_layers
from server.refusals import refuse_config

FULL = {"llama-3.1-8b": 32, "qwen3-8b": 36, "qwen3-30b-a3b": 48, "gemma-3-12b": 8, "gpt-oss-20b": 12, "mistral-7b": 32}


@pytest.mark.parametrize("name", MODELS)
def test_configurations_are_complete(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.model_executor.models import registry

    # vLLM asks each model class for its features in a process of its own (10 s each).
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda ask: ask())
    folder = write(name)
    assert [path.name for path in Path(folder).iterdir()] == ["config.json"]
    config = AsyncEngineArgs(
        model=folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=16384, block_size=32
    ).create_engine_config()
    assert len(full_layers(config)) == FULL[name]
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    refuse_config(config, "cuda")


def row(step: float, **more: Any) -> dict[str, Any]:
    return {"model": "m", "decode_step_ms": step, "requests": 8, "running": 8, **more}


@pytest.mark.parametrize(("step", "within"), [(10.9, True), (11.1, False)])
def test_the_verdict_compares_steps_at_the_same_true_length(step: float, within: bool) -> None:
    usage = {"kept_tokens": {"mean": 2040.0}, "bytes_held": 128, "bytes_freed": 896, "other_layers": {"bytes_held": 64}}
    rows = [row(10.0), row(10.1), row(step, usage=usage, block_bytes=1, blocks_held=1544, leaked=0)]
    found = verdict(rows)
    assert found["within_10_percent"] is within
    assert (found["none_ratio"], found["compressed_ratio"]) == (1.01, round(step / 10, 3))
    assert (found["freed_share"], found["blocks_of_a_request"], found["blocks_held_each"]) == (0.875, 192, 193.0)


def test_steps_of_fewer_requests_than_asked_for_are_told() -> None:
    usage = {"kept_tokens": {"mean": 2040.0}, "bytes_held": 128, "bytes_freed": 896}
    rows = [row(10.0), row(10.1), row(10.0, usage=usage, block_bytes=1, blocks_held=8, leaked=0)]
    assert verdict(rows)["all_running"]
    assert not verdict([*rows[:2], rows[2] | {"running": 7}])["all_running"]
