"""Takes what our scheduler says of its blocks out of vLLM's statistics of each step."""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from kvcache.usage import POOL
from server.metrics import PoolMetrics


class PoolLogger(StatLoggerBase):
    """A stat logger of vLLM's. It comes before vLLM's own, which know that dictionary as a KV connector's alone."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        blocks = vllm_config.cache_config.num_gpu_blocks - 1  # one is vLLM's null block
        self.metrics = PoolMetrics(vllm_config.model_config.served_model_name, blocks)

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is None or not scheduler_stats.kv_connector_stats:
            return
        told = dict(scheduler_stats.kv_connector_stats)
        if blocks := told.pop(POOL, None):
            scheduler_stats.kv_connector_stats = told or None
            self.metrics.update(blocks)

    def log_engine_initialized(self) -> None:
        pass
