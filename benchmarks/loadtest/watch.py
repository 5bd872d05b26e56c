"""What a server tells of itself while it is loaded: samples of /metrics."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

GAUGES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "cache": "vllm:kv_cache_usage_perc",
}
COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "generated_tokens": "vllm:generation_tokens_total",
    "prefix_queries": "vllm:prefix_cache_queries_total",
    "prefix_hits": "vllm:prefix_cache_hits_total",
    "compactions": "longreach_kv_compactions_total",
    "tokens_seen": "longreach_kv_tokens_seen_total",
    "tokens_kept": "longreach_kv_tokens_kept_total",
    "blocks_freed": "longreach_kv_blocks_freed_total",
    "compaction_seconds": "longreach_kv_compaction_seconds_total",
}
CONFIG = "vllm:cache_config_info"


def sums(text: str) -> dict[str, float]:
    """Of all metrics above that the page has, over their labels; and the pool's size as `pool_tokens`."""
    wanted = {metric: name for name, metric in (GAUGES | COUNTERS).items()}
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in wanted:
                name = wanted[sample.name]
                found[name] = found.get(name, 0.0) + sample.value
            elif sample.name == CONFIG and sample.labels.get("num_gpu_blocks", "").isdigit():
                blocks, size = int(sample.labels["num_gpu_blocks"]), int(sample.labels["block_size"])
                found["pool_tokens"] = found.get("pool_tokens", 0.0) + blocks * size
    return found


@dataclass
class Watched:
    """Samples, and what changed from the first to the last of them.

    Attributes:
        seconds: since the load began, one for each sample, as in the lists that follow.
        cache: share of the block pool that is in use, 0 to 1.
        grown: of counters, by how much.
        pool_tokens: size of the block pool, or None.
    """

    seconds: list[float] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    cache: list[float] = field(default_factory=list)
    grown: dict[str, float] = field(default_factory=dict)
    pool_tokens: int | None = None

    def peaks(self) -> dict[str, float | None]:
        return {f"peak_{name}": max(getattr(self, name), default=None) for name in GAUGES}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Watcher:
    """Samples an endpoint's /metrics until it is stopped. Endpoints without them leave everything empty."""

    def __init__(self, root: str, headers: dict[str, str], every: float = 0.5) -> None:
        self.client = httpx.AsyncClient(base_url=root, headers=headers, timeout=10.0)
        self.every = every
        self.watched = Watched()
        self.first: dict[str, float] = {}
        self.began = time.perf_counter()

    async def sample(self) -> dict[str, float]:
        """What /metrics tells now; empty if it doesn't."""
        try:
            reply = await self.client.get("/metrics")
            return sums(reply.text) if reply.status_code == 200 else {}
        except (httpx.HTTPError, ValueError):
            return {}

    async def start(self) -> None:
        self.watched = Watched()
        self.first = await self.sample()
        self.began = time.perf_counter()
        self.task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            self._add(await self.sample())
            await asyncio.sleep(self.every)

    def _add(self, found: dict[str, float]) -> None:
        if "running" not in found:
            return
        self.watched.seconds.append(round(time.perf_counter() - self.began, 2))
        self.watched.running.append(int(found["running"]))
        self.watched.waiting.append(int(found.get("waiting", 0)))
        self.watched.cache.append(round(found.get("cache", 0.0), 4))

    async def stop(self) -> Watched:
        self.task.cancel()
        last = await self.sample()
        grown = {name: last[name] - self.first.get(name, 0.0) for name in COUNTERS if name in last}
        self.watched.grown = {name: round(value, 3) for name, value in grown.items()}
        self.watched.pool_tokens = int(last["pool_tokens"]) if "pool_tokens" in last else None
        return self.watched

    async def until_idle(self, seconds: float) -> bool:
        """Wait until nothing runs or waits there; whether that was so in time. True where nobody tells."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            found = await self.sample()
            if not found.get("running") and not found.get("waiting"):
                return True
            await asyncio.sleep(0.3)
        return False

    async def close(self) -> None:
        await self.client.aclose()
