"""Every panel of the dashboard, asked of a real Prometheus that scrapes a real server with our configuration."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx
import promql_parser
import pytest
import yaml  # type: ignore[import-untyped]

from benchmarks.serving import Server
from deploy.grafana.build import DASHBOARD, RULES

SECONDS = 1
"""Between two scrapes; rates are taken over a minute, which all of it fits in."""
DOCUMENT = " ".join(f"Shelf {shelf} holds {shelf * 37 % 101} books about gardens." for shelf in range(30))
REQUESTS: tuple[dict[str, Any], ...] = (
    {"kv_cache": {"policy": "snapkv", "budget": 128}},
    {"kv_cache": {"policy": "none"}, "decode_attention": {"selector": "quest", "tokens": 128, "min_context": 0}},
    {"prefill_attention": {"pattern": "streaming", "sinks": 128, "window": 128, "min_context": 0}},
    {"kv_cache": {"policy": "no such policy"}},
)
MAY_BE_EMPTY: dict[str, str] = {}
"""Panels that show nothing in a healthy server, and why. None: those of what never happened show zeros."""
PANELS = [
    (panel["title"], target["expr"])
    for panel in json.loads(DASHBOARD.read_text())["panels"]
    for target in panel.get("targets", ())
]


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **params: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=10)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def values(self, expression: str) -> list[float]:
        return [float(sample["value"][1]) for sample in self.get("query", query=expression)["result"]]


def load(server: Server) -> None:
    """One request of each kind; a second round makes the counters that the first has made grow."""
    model = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
    for number, fields in enumerate(REQUESTS):
        body = {"model": model, "prompt": f"{number}. {DOCUMENT}", "max_tokens": 4, "ignore_eos": True, **fields}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == (400 if "no such" in str(fields) else 200), answer.text


def wait(what: str, seconds: float, there: Any) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, f"no {what} in {seconds} s"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Our configuration with another target, and shorter times."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((RULES.parent / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{SECONDS}s", "evaluation_interval": f"{SECONDS}s"}
    config["rule_files"] = [str(RULES)]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [server.url.removeprefix("http://")]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    words = [f"--config.file={file}", f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(["prometheus", *words], stdout=log, stderr=subprocess.STDOUT)
    found = Prometheus(f"http://{address}")
    try:

        def scraped(times: int) -> bool:
            try:
                return sum(found.values('count_over_time(up{job="longreach"}[1m])')) >= times
            except httpx.TransportError:
                return False

        load(server)
        wait("scrape", 20, lambda: scraped(2))
        load(server)
        seen = sum(found.values('count_over_time(up{job="longreach"}[1m])'))
        wait("scrape of the second round", 10, lambda: scraped(int(seen) + 2))
        yield found
    finally:
        process.terminate()
        process.wait(20)


def plain(expression: str) -> str:
    """As Grafana asks it, with all servers chosen."""
    return expression.replace("$__rate_interval", "1m").replace("$instance", ".*")


@pytest.mark.parametrize("title, expression", PANELS)
def test_no_panel_is_empty(prometheus: Prometheus, title: str, expression: str) -> None:
    values = prometheus.values(plain(expression))
    if title not in MAY_BE_EMPTY:
        assert values and not any(value != value for value in values), values


def nodes(node: Any) -> Iterator[Any]:
    """Of a parsed expression: it and all below it."""
    yield node
    for name in ("expr", "lhs", "rhs", "param", "vector_selector", "args"):
        child = getattr(node, name, None)
        for part in child if isinstance(child, list) else [child]:
            if part is not None:
                yield from nodes(part)


def of_kind(kind: type, tree: Any) -> list[Any]:
    return [node for node in nodes(tree) if isinstance(node, kind)]


def test_rules_and_panels_name_metrics_and_labels_that_there_are(server: Server, prometheus: Prometheus) -> None:
    """A label that doesn't exist would only make a panel say less."""
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    never = {"longreach_kv_nan_scores_total"}  # there when it isn't zero
    labels: dict[str, set[str]] = {}
    for expression in [plain(asked) for _, asked in PANELS] + [rule["expr"] for rule in rules]:
        tree = promql_parser.parse(expression)
        for selector in of_kind(promql_parser.VectorSelector, tree):
            if selector.name not in labels.keys() | recorded | never:
                found = prometheus.get("series", **{"match[]": selector.name})
                assert found, f"{selector.name} in {expression}"
                labels[selector.name] = set().union(*found)
            known = labels.get(selector.name)
            assert known is None or {matcher.name for matcher in selector.matchers.matchers} <= known, expression
        for sum_by in of_kind(promql_parser.AggregateExpr, tree):
            by = set(sum_by.modifier.labels) if sum_by.modifier else set()
            for selector in of_kind(promql_parser.VectorSelector, sum_by):
                known = labels.get(selector.name)
                assert known is None or by <= known, expression
    assert len(labels) >= 30


def test_rules_are_in_order(prometheus: Prometheus) -> None:
    groups = prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == 20 and {rule["health"] for rule in rules} <= {"ok", "unknown"}
    assert [rule["name"] for rule in rules if rule.get("alerts") and rule["state"] == "firing"] == []


def test_the_pool_is_told_while_requests_hold_it(server: Server) -> None:
    """A compacted request's blocks, to the block, while its answer streams."""
    model = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
    server.wait_until_empty()
    total = server.metric("longreach_kv_blocks", state="free")
    body = {
        "model": model,
        "prompt": "Pool. " + DOCUMENT,
        "max_tokens": 200,
        "ignore_eos": True,
        "stream": True,
        "kv_cache": {"policy": "snapkv", "budget": 128},
    }
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as answer:
        for number, _ in enumerate(answer.iter_lines()):
            if number == 20:
                held = {s: server.metric("longreach_kv_blocks", state=s) for s in ("compacted", "dense", "free")}
                break
    assert 128 // 32 <= held["compacted"] <= 128 // 32 + 9  # and up to 200 new tokens
    assert held["dense"] == 0 and sum(held.values()) == total
