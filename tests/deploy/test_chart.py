"""The Helm chart: that helm and Kubernetes' schemas take it, and what comes out."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml  # type: ignore[import-untyped]
from cloudcoil.models.prometheus_operator import v1 as prometheus_operator

pytest.importorskip("vllm")

from server.access.settings import OPEN
from server.arguments import parse
from server.platforms import Platform
from tests.deploy.project import ROOT, VERSION

CHART = ROOT / "deploy/helm/longreach"
VALUES = {file.stem: file for file in (ROOT / "deploy/helm/values").glob("*.yaml")} | {"default": CHART / "values.yaml"}
VERSIONS = ("1.27", "1.37")
"""Of Kubernetes: the oldest that the chart allows, and the newest that there are schemas of."""
CUSTOM: dict[str, Any] = {
    "ServiceMonitor": prometheus_operator.ServiceMonitor,
    "PrometheusRule": prometheus_operator.PrometheusRule,
}
"""Kinds of the Prometheus operator's, which Kubernetes has no schemas of."""

Objects = dict[tuple[str, str], dict[str, Any]]


def rendered(helm: Any, *arguments: str | Path) -> Objects:
    text = helm("template", "up", CHART, "--namespace", "models", *arguments)
    found = [thing for thing in yaml.safe_load_all(text) if thing]
    return {(thing["kind"], thing["metadata"]["name"]): thing for thing in found}


@pytest.fixture(scope="module", params=VALUES)
def objects(request: pytest.FixtureRequest, helm: Any) -> Objects:
    return rendered(helm, "--values", VALUES[request.param])


def pod(objects: Objects, name: str = "up-longreach") -> dict[str, Any]:
    spec = objects["Deployment", name]["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def container(objects: Objects, name: str = "up-longreach") -> dict[str, Any]:
    (only,) = pod(objects, name)["containers"]
    assert isinstance(only, dict)
    return only


def refusal(helm: Any, *sets: str) -> str:
    words = [word for value in sets for word in ("--set", value)]
    told = helm("template", "up", CHART, *words, fails=True)
    assert isinstance(told, str)
    return told


@pytest.mark.parametrize("values", VALUES)
def test_helm_lints_it(helm: Any, values: str) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", CHART, "--values", VALUES[values])


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_it(objects: Objects, version: str) -> None:
    for thing in objects.values():
        if thing["kind"] not in CUSTOM:
            kubernetes_validate.validate(thing, version, strict=True)


def test_the_prometheus_operator_takes_its_own(helm: Any) -> None:
    objects = rendered(helm, "--values", VALUES["replicas"])
    for kind, model in CUSTOM.items():
        thing = objects[kind, "up-longreach"]
        read = model.model_validate(thing)
        # What a model doesn't know, it leaves out.
        assert read.model_dump(by_alias=True, exclude_unset=True, mode="json") == thing


def test_its_schemas_would_refuse(objects: Objects) -> None:
    wrong = {**objects["Service", "up-longreach"]}
    wrong["spec"] = {**wrong["spec"], "port": 1}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


@pytest.mark.parametrize(
    "value, told",
    [
        ("gpus=-1", "/gpus"),
        ("replica=2", "replica"),
        ("image.pullPolicy=Sometimes", "/image/pullPolicy"),
        ("router.policy=best", "/router/policy"),
        ("cache.size=big", "/cache/size"),
        ("probes.loadingSeconds=1", "/probes/loadingSeconds"),
        ("replicas=2", "ReadWriteMany"),
        ("autoscaling.enabled=true", "ReadWriteMany"),
        ("config.port=80", "service.port"),
        ("config.api-key=secret", "apiKey"),
        ("apiKey.value=k,apiKeyFile.existingSecret=keys", "set one"),
    ],
)
def test_wrong_values_are_refused_by_name(helm: Any, value: str, told: str) -> None:
    assert told in refusal(helm, value)


def test_selectors_find_the_pods(objects: Objects) -> None:
    labels = {
        name: d["spec"]["template"]["metadata"]["labels"] for (kind, name), d in objects.items() if kind == "Deployment"
    }
    for (kind, name), thing in objects.items():
        spec = thing.get("spec", {})
        if kind == "Service":
            selector = spec["selector"]
        elif kind in ("Deployment", "PodDisruptionBudget", "ServiceMonitor"):
            selector = spec["selector"]["matchLabels"]
        else:
            continue
        found = [pods for pods, has in labels.items() if selector.items() <= has.items()]
        assert found == [name] or kind == "ServiceMonitor"
        if kind == "ServiceMonitor":  # it looks for services
            services = [
                n
                for (k, n), s in objects.items()
                if k == "Service" and selector.items() <= s["metadata"]["labels"].items()
            ]
            assert services == ["up-longreach"]


def test_loading_is_known_from_broken_and_draining_from_both(objects: Objects) -> None:
    startup, live, ready = (container(objects)[f"{name}Probe"] for name in ("startup", "liveness", "readiness"))
    assert startup["httpGet"] == live["httpGet"] == {"path": "/health", "port": "http"}
    assert ready["httpGet"] == {"path": "/ready", "port": "http"}
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800
    assert live["periodSeconds"] * live["failureThreshold"] == 60


def test_a_pod_has_time_to_drain(objects: Objects) -> None:
    config = yaml.safe_load(objects["ConfigMap", "up-longreach"]["data"]["server.yaml"])
    (sleep, seconds) = container(objects)["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    grace = pod(objects)["terminationGracePeriodSeconds"]
    assert grace >= int(seconds) + config["shutdown-timeout"] + 5
    for (kind, _), thing in objects.items():  # a router must not go before the answers that pass through it
        if kind == "Deployment":
            assert thing["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= grace


def test_nobody_is_root_and_only_volumes_are_written(objects: Objects) -> None:
    for (kind, name), thing in objects.items():
        if kind != "Deployment":
            continue
        spec = thing["spec"]["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 2000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        security = container(objects, name)["securityContext"]
        assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}
    written = {mount["mountPath"] for mount in container(objects)["volumeMounts"] if not mount.get("readOnly")}
    (home,) = (path for path in written if path.startswith("/home/") and path.count("/") == 2)
    assert written == {home, f"{home}/.cache", "/tmp", "/dev/shm"}


def test_the_server_understands_its_settings(objects: Objects, tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(objects["ConfigMap", "up-longreach"]["data"]["server.yaml"])
    assert container(objects)["args"] == ["--config", "/etc/longreach/server.yaml"]
    args = parse(["--config", str(file)], Platform("cpu", None))
    assert (args.host, args.port) == ("0.0.0.0", container(objects)["ports"][0]["containerPort"])
    gpus = container(objects)["resources"]["limits"].get("nvidia.com/gpu", 0)
    assert args.tensor_parallel_size == max(1, gpus)


def test_images_are_of_this_version(objects: Objects) -> None:
    assert container(objects)["image"].removesuffix("-cpu") == f"longreach:{VERSION}"
    assert json.loads(json.dumps(yaml.safe_load((CHART / "Chart.yaml").read_text())))["appVersion"] == VERSION


def test_a_key_comes_from_a_secret(helm: Any) -> None:
    made = rendered(helm, "--set", "apiKey.value=k1")
    (variable,) = container(made)["env"]
    reference = variable["valueFrom"]["secretKeyRef"]
    assert variable["name"] == "VLLM_API_KEY"
    assert made["Secret", reference["name"]]["stringData"] == {reference["key"]: "k1"}
    theirs = rendered(helm, "--set", "apiKey.existingSecret=mine,apiKey.value=k1")
    assert container(theirs)["env"][0]["valueFrom"]["secretKeyRef"]["name"] == "mine"
    assert not [kind for kind, _ in theirs if kind == "Secret"]
    assert "env" not in container(rendered(helm))


def test_a_file_of_keys_comes_from_a_secret(helm: Any, tmp_path: Path) -> None:
    objects = rendered(helm, "--set", "apiKeyFile.existingSecret=mine")
    kubernetes_validate.validate(objects["Deployment", "up-longreach"], VERSIONS[-1], strict=True)
    config = yaml.safe_load(objects["ConfigMap", "up-longreach"]["data"]["server.yaml"])
    mounts = {mount["name"]: mount["mountPath"] for mount in container(objects)["volumeMounts"]}
    (volume,) = (volume for volume in pod(objects)["volumes"] if volume["name"] == "keys")
    assert config["api-key-file"] == f"{mounts['keys']}/keys.txt" and volume["secret"]["secretName"] == "mine"
    assert volume["secret"]["defaultMode"] & stat.S_IWOTH == 0  # the server refuses what everybody may write
    assert set(config["open-paths"]) == {*OPEN, "/metrics"}
    file = tmp_path / "server.yaml"
    file.write_text(yaml.safe_dump(config))
    assert parse(["--config", str(file)], Platform("cpu", None)).open_paths == config["open-paths"]
    assert "env" not in container(objects)
    closed = rendered(helm, "--set", "apiKeyFile.existingSecret=mine,config.open-paths={/health,/ready}")
    config = yaml.safe_load(closed["ConfigMap", "up-longreach"]["data"]["server.yaml"])
    assert config["open-paths"] == ["/health", "/ready"]


def test_a_changed_setting_is_a_new_pod(helm: Any) -> None:
    def checksum(*arguments: str) -> str:
        metadata = rendered(helm, *arguments)["Deployment", "up-longreach"]["spec"]["template"]["metadata"]
        return str(metadata["annotations"]["checksum/config"])

    assert checksum() == checksum() != checksum("--set", "config.kv-policy=snapkv")


def test_the_autoscaler_asks_for_what_the_adapter_offers(helm: Any) -> None:
    objects = rendered(helm, "--values", VALUES["replicas"])
    scaler = objects["HorizontalPodAutoscaler", "up-longreach"]["spec"]
    target = scaler["scaleTargetRef"]
    assert (target["kind"], target["name"]) in objects and "replicas" not in objects["Deployment", "up-longreach"][
        "spec"
    ]
    (metric,) = scaler["metrics"]
    (rule,) = yaml.safe_load((ROOT / "deploy/kubernetes/prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"] == "vllm_num_requests_waiting"
    assert '__name__="vllm:num_requests_waiting"' in rule["seriesQuery"]


def test_the_router_looks_for_the_servers_alone_and_may(helm: Any) -> None:
    objects = rendered(helm, "--values", VALUES["replicas"])
    args = container(objects, "up-longreach-router")["args"]
    selector = dict(word.split("=") for word in args if word.startswith("app.kubernetes.io/"))
    labels = objects["Deployment", "up-longreach"]["spec"]["template"]["metadata"]["labels"]
    own = objects["Deployment", "up-longreach-router"]["spec"]["template"]["metadata"]["labels"]
    assert selector.items() <= labels.items() and not selector.items() <= own.items()
    assert "--service-discovery-namespace=models" in args
    (rule,) = objects["Role", "up-longreach-router"]["rules"]
    assert (rule["resources"], set(rule["verbs"])) == (["pods"], {"get", "list", "watch"})
    assert pod(objects, "up-longreach-router")["serviceAccountName"] == "up-longreach-router"


def test_rules_and_dashboard_are_those_of_the_repository(helm: Any, promtool: Any, tmp_path: Path) -> None:
    objects = rendered(helm, "--values", VALUES["replicas"])
    rules = objects["PrometheusRule", "up-longreach"]["spec"]
    assert rules == yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump(rules))
    promtool("check", "rules", file)
    board = objects["ConfigMap", "up-longreach-dashboard"]
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(board["data"]["longreach.json"])["uid"] == "longreach"
    monitor = objects["ServiceMonitor", "up-longreach"]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    service = objects["Service", "up-longreach"]
    assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "longreach"  # the job that the rules know
    assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
