"""What is taken out of vLLM's statistics before its own loggers see them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

pytest.importorskip("vllm")

from kvcache.usage import POOL, pool_blocks
from server.pool_logger import PoolLogger


def seen(state: str) -> float | None:
    return REGISTRY.get_sample_value("longreach_kv_blocks", {"model_name": "m", "state": state})


def test_the_pool_is_told_and_vllm_sees_no_connector() -> None:
    config: Any = SimpleNamespace(
        cache_config=SimpleNamespace(num_gpu_blocks=101), model_config=SimpleNamespace(served_model_name="m")
    )
    logger = PoolLogger(config)
    try:
        assert seen("free") == 100
        stats = SimpleNamespace(kv_connector_stats={POOL: pool_blocks(100, 30, 20)})
        logger.record(stats, None)
        assert stats.kv_connector_stats is None
        assert (seen("compacted"), seen("dense"), seen("free")) == (20, 50, 30)
        others = SimpleNamespace(kv_connector_stats={"a connector": 1})
        for nothing in (None, SimpleNamespace(kv_connector_stats=None), others):
            logger.record(nothing, None)
        assert others.kv_connector_stats == {"a connector": 1} and seen("dense") == 50
    finally:
        REGISTRY.unregister(logger.metrics.gauge)
