"""The group of pods over several nodes: its pods against Kubernetes' schemas, and that both ends agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml  # type: ignore[import-untyped]

pytest.importorskip("vllm")

from server.arguments import parse
from server.platforms import Platform
from tests.deploy.project import ROOT, VERSION

FILE = ROOT / "deploy/kubernetes/leaderworkerset.yaml"
OBJECTS = {thing["kind"]: thing for thing in yaml.safe_load_all(FILE.read_text())}
GROUP = OBJECTS["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
PODS = {name: GROUP[f"{name}Template"]["spec"] for name in ("leader", "worker")}


def container(name: str) -> dict[str, Any]:
    (only,) = PODS[name]["containers"]
    assert isinstance(only, dict)
    return only


@pytest.mark.parametrize("version", ["1.27", "1.37"])
def test_kubernetes_takes_what_it_knows(version: str) -> None:
    known = [OBJECTS["ConfigMap"], OBJECTS["Service"]]
    known += [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec} for name, spec in PODS.items()
    ]
    for thing in known:
        kubernetes_validate.validate(thing, version, strict=True)


def test_the_service_leads_to_the_leader_alone() -> None:
    selector = OBJECTS["Service"]["spec"]["selector"]
    assert selector.pop("leaderworkerset.sigs.k8s.io/name") == OBJECTS["LeaderWorkerSet"]["metadata"]["name"]
    assert selector.items() <= GROUP["leaderTemplate"]["metadata"]["labels"].items()
    assert "metadata" not in GROUP["workerTemplate"]


def test_the_server_asks_for_all_gpus_of_the_group(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(OBJECTS["ConfigMap"]["data"]["server.yaml"])
    args = parse(["--config", str(file)], Platform("cpu", None))
    gpus = sum(container(name)["resources"]["limits"]["nvidia.com/gpu"] for name in PODS)
    assert GROUP["size"] == len(PODS) and args.tensor_parallel_size == gpus
    assert (args.distributed_executor_backend, args.port) == ("ray", container("leader")["ports"][0]["containerPort"])
    assert "exec longreach serve --config /etc/longreach/server.yaml" in container("leader")["args"][0]
    mounted = {mount["name"]: mount["mountPath"] for mount in container("leader")["volumeMounts"]}
    assert mounted["config"] == "/etc/longreach"


def test_workers_outlive_a_leader_that_drains(tmp_path: Path) -> None:
    (_, leaves) = container("leader")["lifecycle"]["preStop"]["exec"]["command"]
    (_, stays) = container("worker")["lifecycle"]["preStop"]["exec"]["command"]
    drain = yaml.safe_load(OBJECTS["ConfigMap"]["data"]["server.yaml"])["shutdown-timeout"]
    assert PODS["leader"]["terminationGracePeriodSeconds"] >= int(leaves) + drain + 5
    assert int(leaves) + drain < int(stays) < PODS["worker"]["terminationGracePeriodSeconds"]


def test_images_are_the_one_that_is_built() -> None:
    assert {container(name)["image"] for name in PODS} == {f"longreach-ray:{VERSION}"}
    assert f"FROM longreach:{VERSION}\n" in (ROOT / "deploy/ray/Dockerfile").read_text()


@pytest.mark.parametrize("name", PODS)
def test_nobody_is_root(name: str) -> None:
    assert PODS[name]["securityContext"]["runAsNonRoot"]
    assert container(name)["securityContext"]["capabilities"] == {"drop": ["ALL"]}
