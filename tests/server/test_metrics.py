"""Counters that follow the engine's totals."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from kvcache.usage import TOTALS, pool_blocks
from server.metrics import NAMES, CompressionMetrics, DecodeMetrics, ErrorMetrics, PoolMetrics


def totals(compactions: float, seconds: float = 0.5) -> dict[str, float]:
    return {
        **dict.fromkeys(TOTALS, 0.0),
        "compactions": compactions,
        "seconds": seconds,
        "tokens_seen": 10 * compactions,
    }


def value(registry: CollectorRegistry, name: str, policy: str = "snapkv", model: str = "m") -> float | None:
    return registry.get_sample_value(f"{NAMES[name][0]}_total", {"model_name": model, "policy": policy})


def test_every_total_has_a_counter() -> None:
    assert set(NAMES) == set(TOTALS)


def test_counters_show_the_engines_totals() -> None:
    registry = CollectorRegistry()
    metrics = CompressionMetrics("m", registry)
    metrics.update({"snapkv": totals(2)})
    metrics.update({"snapkv": totals(5, 0.75)})
    metrics.update({"snapkv": totals(5, 0.75)})
    assert [value(registry, name) for name in ("compactions", "tokens_seen", "seconds")] == [5, 50, 0.75]
    assert value(registry, "blocks_freed") is None  # zero so far: no sample


def test_missed_and_late_totals_count_once() -> None:
    """A request that is aborted tells nothing; answers are read in any order."""
    registry = CollectorRegistry()
    metrics = CompressionMetrics("m", registry)
    for compactions in (1, 4, 2, 3, 6, 6):
        metrics.update({"snapkv": totals(compactions, compactions / 10)})
    assert value(registry, "compactions") == 6
    assert value(registry, "seconds") == 0.6


def test_policies_are_counted_apart() -> None:
    registry = CollectorRegistry()
    metrics = CompressionMetrics("m", registry)
    metrics.update({"snapkv": totals(1)})
    metrics.update({"snapkv": totals(1), "random": totals(7)})
    assert (value(registry, "compactions"), value(registry, "compactions", "random")) == (1, 7)
    assert value(registry, "compactions", "l2norm") is None


def test_a_restarted_server_starts_from_zero_with_its_engine() -> None:
    for _ in range(2):  # a process each, hence a registry each
        registry = CollectorRegistry()
        CompressionMetrics("m", registry).update({"snapkv": totals(3)})
        assert value(registry, "compactions") == 3


def test_nothing_yet_is_no_error() -> None:
    registry = CollectorRegistry()
    CompressionMetrics("m", registry).update({})
    assert value(registry, "compactions") is None


def test_the_names_are_as_prometheus_wants_them() -> None:
    registry = CollectorRegistry()
    CompressionMetrics("a/b", registry).update({"snapkv": dict.fromkeys(TOTALS, 1.0)})
    text = generate_latest(registry).decode()
    for name in ("compactions", "tokens_seen", "tokens_kept", "blocks_freed", "nan_scores", "compaction_seconds"):
        assert f'longreach_kv_{name}_total{{model_name="a/b",policy="snapkv"}} 1.0' in text


def test_steps_of_decoding_are_counted_by_selector_and_by_what_they_read() -> None:
    registry = CollectorRegistry()
    metrics = DecodeMetrics("m", registry)
    for select, crowded in ((5, 0), (9, 2), (7, 1)):  # the last one is late
        metrics.update({"tidal": {"select": select, "crowded": crowded}, "quest": {"select": 1}})
    metrics.update({})
    text = generate_latest(registry).decode()
    name = "longreach_decode_steps_total"
    assert f'{name}{{mode="select",model_name="m",selector="tidal"}} 9.0' in text
    assert f'{name}{{mode="crowded",model_name="m",selector="tidal"}} 2.0' in text
    assert f'{name}{{mode="select",model_name="m",selector="quest"}} 1.0' in text


def blocks(registry: CollectorRegistry) -> list[float | None]:
    labels = [{"model_name": "m", "state": state} for state in ("compacted", "dense", "free")]
    return [registry.get_sample_value("longreach_kv_blocks", label) for label in labels]


def test_blocks_are_told_by_what_holds_them() -> None:
    registry = CollectorRegistry()
    metrics = PoolMetrics("m", 100, registry)
    assert blocks(registry) == [0, 0, 100]  # before the engine's first step
    metrics.update(pool_blocks(100, free=30, compacted=20))
    assert blocks(registry) == [20, 50, 30]


def errors(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    (family,) = registry.collect()
    samples = [sample for sample in family.samples if sample.name.endswith("_total")]
    return {(sample.labels["code"], sample.labels["field"]): sample.value for sample in samples}


def test_errors_are_counted_by_status_and_by_our_fields() -> None:
    registry = CollectorRegistry()
    metrics = ErrorMetrics(("kv_cache",), registry)
    assert errors(registry) == {("400", ""): 0, ("400", "kv_cache"): 0, ("500", ""): 0}
    for code, param in ((400, "kv_cache.budget"), (400, "kv_cache"), (400, "made.up"), (401, None)):
        metrics.count(code, param)
    assert errors(registry) == {("400", ""): 1, ("400", "kv_cache"): 2, ("500", ""): 0, ("401", ""): 1}
