"""Compose files: that Compose takes them, and what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

pytest.importorskip("vllm")

from server.arguments import parse
from server.platforms import Platform
from server.settings import default_policy
from tests.deploy.project import VERSION

ROOT = Path(__file__).parents[2]
FILES = {"gpu": (), "cpu": ("cpu",), "router": ("router",)}


@pytest.fixture(scope="module", params=FILES)
def services(request: pytest.FixtureRequest, compose: Any) -> dict[str, Any]:
    over = [word for name in FILES[request.param] for word in ("--file", f"deploy/compose.{name}.yaml")]
    config = json.loads(compose("--file", "deploy/compose.yaml", *over, "config", "--format", "json"))
    assert set(config["services"]) >= {"longreach", "prometheus", "grafana"}
    found = config["services"]
    assert isinstance(found, dict)
    return found


def seconds(duration: str) -> int:
    minutes, _, rest = duration.rpartition("m")
    return 60 * int(minutes or 0) + int(rest.removesuffix("s") or 0)


def test_compose_refuses_what_it_doesnt_know(compose: Any, tmp_path: Path) -> None:
    bad = tmp_path / "compose.yaml"
    bad.write_text((ROOT / "deploy/compose.yaml").read_text().replace("shm_size:", "shared_memory:"))
    assert "shared_memory" in compose("--file", bad, "config", fails=True)


def test_everything_is_published_on_this_machine_alone(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports") or ()]
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}
    assert sorted(port["published"] for port in ports) == ["3000", "8000", "9090"]


def test_what_is_built_and_mounted_is_there(services: dict[str, Any]) -> None:
    for service in services.values():
        if build := service.get("build"):
            assert (Path(build["context"]) / build["dockerfile"]).is_file()
        for volume in service.get("volumes") or ():
            assert volume["type"] == "volume" or (Path(volume["source"]).exists() and volume["read_only"])
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]


def test_the_server_understands_its_command_and_has_time_to_drain(services: dict[str, Any]) -> None:
    cpu = Platform("cpu", None)
    servers = [service for name, service in services.items() if name.startswith("longreach")]
    for service in servers:
        (mounted,) = (v["source"] for v in service["volumes"] if v["target"] == "/etc/longreach/server.yaml")
        words = [word.replace("/etc/longreach/server.yaml", mounted) for word in service["command"]]
        args = parse(words, cpu)
        policy = default_policy(args, cpu)
        assert (policy["policy"], policy["budget"]) == ("snapkv", 2048) and args.model is None
        assert args.shutdown_timeout + 5 <= seconds(service["stop_grace_period"])
        home = "/home/longreach" if service["image"].endswith("-cpu") else "/home/vllm"
        assert f"{home}/.cache" in {volume["target"] for volume in service["volumes"]}
        assert service["image"].removesuffix("-cpu") == f"longreach:{VERSION}"


def test_only_the_cpu_server_has_no_gpu(services: dict[str, Any]) -> None:
    for name, service in services.items():
        gpus = service.get("deploy") is not None
        assert gpus is (name.startswith("longreach") and not service["image"].endswith("-cpu"))


def test_prometheus_asks_every_server(services: dict[str, Any]) -> None:
    mounted = {volume["target"]: volume.get("source") for volume in services["prometheus"]["volumes"]}
    config = yaml.safe_load(Path(mounted["/etc/prometheus/prometheus.yml"]).read_text())
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    assert jobs["longreach"] == [f"{name}:8000" for name in services if name.startswith("longreach")]
    assert jobs.get("router", []) == [f"{name}:29000" for name in services if name == "router"]
    assert mounted["/etc/prometheus/rules.yml"] == str(ROOT / "deploy/prometheus/rules.yml")


def test_grafana_is_provisioned_with_what_is_mounted(services: dict[str, Any]) -> None:
    service = services["grafana"]
    mounted = {volume["target"]: Path(volume["source"]) for volume in service["volumes"]}
    provisioning = mounted["/etc/grafana/provisioning"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/longreach.yaml").read_text())["providers"]
    board = mounted[provider["options"]["path"]] / "longreach.json"
    assert json.loads(board.read_text())["title"] == "Longreach"
    home = service["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{board.name}"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert host in services and port == "9090" and source["type"] == "prometheus"
