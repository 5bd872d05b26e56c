"""What a server sets for every request: first tokens that always stay, and the model's head gates."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from kvcache.method import ModelShape
from kvcache.registry import PolicyError, policies
from server.errors import StartError
from server.gates import read_gates, write_gates
from server.platforms import Platform
from server.policies import HouseRules, PolicyDesk
from server.settings import add_flags, default_policy, house_rules

NONE = {"policy": "none"}
GATES = [[0.5, 0.25], [1.0, 0.0]]
SHAPE = ModelShape(2, 2)


def desk(rules: HouseRules, model: ModelShape | None = SHAPE, default: dict[str, Any] = NONE) -> PolicyDesk:
    return PolicyDesk(default, 16, rules=rules, model=model)


def flags(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return argparse.Namespace(block_size=16, **vars(parser.parse_args(argv)))


def default(*argv: str) -> dict[str, Any]:
    return default_policy(flags(*argv), Platform("cpu", None))


@pytest.mark.parametrize("policy", [name for name in policies() if name != "duoattention"])
@pytest.mark.parametrize(
    ("always", "asked", "kept"), [(4, None, 4), (4, 0, 4), (4, 9, 9), (0, 0, 0), (20, None, 20), (20, 7, 20)]
)
def test_sinks_can_only_raise_what_always_stays(policy: str, always: int, asked: int | None, kept: int) -> None:
    words = {"policy": policy} | ({} if asked is None else {"sinks": asked})
    assert desk(HouseRules(always)).check(words)["sinks"] == kept


def test_what_always_stays_counts_in_the_smallest_budget() -> None:
    assert desk(HouseRules(4)).check({"policy": "streamingllm", "budget": 52})
    with pytest.raises(PolicyError, match=">= 148 tokens"):
        desk(HouseRules(100)).check({"policy": "streamingllm", "budget": 147})


@pytest.mark.parametrize("sinks", [-1, 1.5, "3", True, 5000, None])
def test_wrong_sinks_are_refused_not_raised(sinks: Any) -> None:
    with pytest.raises(PolicyError, match=r"kv_cache\.sinks"):
        desk(HouseRules(10)).check({"policy": "snapkv", "sinks": sinks})


def test_none_keeps_everything_anyhow() -> None:
    assert desk(HouseRules(100)).check(NONE) == NONE


def test_the_rule_holds_for_the_default_policy_and_is_told() -> None:
    assert default("--kv-policy", "tova", "--kv-sinks", "0")["sinks"] == 4
    assert default("--kv-policy", "tova", "--kv-sinks", "0", "--kv-always-keep", "0")["sinks"] == 0
    assert default("--kv-policy", "tova", "--kv-always-keep=30")["sinks"] == 30
    assert house_rules(flags()) == HouseRules(always_keep=4, gates=None)
    assert desk(HouseRules(30)).describe()["always_keep"] == 30


@pytest.mark.parametrize("tokens", ["-1", "1025"])
def test_a_senseless_number_ends_the_start(tokens: str) -> None:
    with pytest.raises(StartError, match=r"--kv-always-keep: .* allowed are 0 to 1024"):
        default(f"--kv-always-keep={tokens}")


def test_requests_without_gates_get_the_servers() -> None:
    checked = desk(HouseRules(gates=GATES)).check({"policy": "duoattention"})
    assert checked["gates"] == GATES and checked["sinks"] == 64
    own = [[0.1, 0.2], [0.3, 0.4]]
    assert desk(HouseRules(gates=GATES)).check({"policy": "duoattention", "gates": own})["gates"] == own
    assert "gates" not in desk(HouseRules(gates=GATES)).check({"policy": "snapkv"})


def test_without_any_gates_the_request_is_told() -> None:
    with pytest.raises(PolicyError, match=r"kv_cache\.gates: are missing.*--kv-head-gates FILE.*2 lists of 2 numbers"):
        desk(HouseRules()).check({"policy": "duoattention"})
    with pytest.raises(StartError, match="--kv-gates: are missing"):
        default("--kv-policy", "duoattention")


def test_gates_of_another_model_are_refused() -> None:
    with pytest.raises(PolicyError, match=r"1 layers of 2 KV heads.*Allowed: 2 lists of 2 numbers"):
        desk(HouseRules()).check({"policy": "duoattention", "gates": [[0.5, 0.5]]})
    for words in (NONE, {"policy": "duoattention"}):  # whatever the default policy
        with pytest.raises(PolicyError, match=r"kv_cache\.head_gates: are 2 layers of 2 KV heads.*30 lists of 3"):
            desk(HouseRules(gates=GATES), ModelShape(30, 3), words)
    desk(HouseRules(gates=GATES), None)  # the model isn't known when flags are read


def test_tensor_parallel_is_refused_by_name() -> None:
    wide = ModelShape(2, 2, tensor_parallel=2)
    with pytest.raises(PolicyError, match=r"kv_cache\.policy: .*--tensor-parallel-size"):
        desk(HouseRules(), wide).check({"policy": "duoattention", "gates": GATES})
    assert desk(HouseRules(), wide).check({"policy": "snapkv"})


@pytest.mark.parametrize(
    "text", ["0.5\t0.25\n1.0\t0.0\n", "0.5 0.25\n1 0", "[[0.5, 0.25], [1, 0]]", " [[0.5,0.25],\n[1.2,-0.1]]\n"]
)
def test_files_of_gates(text: str, tmp_path: Path) -> None:
    (tmp_path / "gates").write_text(text)
    words = default("--kv-policy", "duoattention", "--kv-head-gates", str(tmp_path / "gates"))
    assert words["gates"] == GATES and json.loads(json.dumps(words)) == words


def test_written_gates_are_read(tmp_path: Path) -> None:
    write_gates(tmp_path / "gates.tsv", GATES)
    assert read_gates(tmp_path / "gates.tsv") == GATES


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no numbers"),
        ("[]", "holds no numbers"),
        ("[[]]", "holds no numbers"),
        ("0.5 x", "could not convert"),
        ("0.5 0.5\n0.5", "layer 2 has 1 gates, the first 2"),
        ("0.5 nan", "layer 1 has a gate that is no number"),
        ("[[0.5, Infinity]]", "layer 1 has a gate that is no number"),
        ("[1, 2]", "not iterable"),
        ('{"gates": 1}', "could not convert"),
        ("[[0.5", "--kv-head-gates"),
        ("\x00\xff", "could not convert"),
        (None, "No such file"),
    ],
)
def test_files_that_hold_no_gates_end_the_start(text: str | None, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "gates.tsv"
    if text is not None:
        file.write_text(text, encoding="latin-1" if text == "\x00\xff" else "utf-8")
    with pytest.raises(StartError) as caught:
        default("--kv-head-gates", str(file))
    message = str(caught.value)
    assert message.startswith(f"--kv-head-gates {file}: ") and "\n" not in message
    assert problem in message or text == "\x00\xff"
