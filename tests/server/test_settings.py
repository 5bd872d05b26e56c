"""`--kv-...` flags: from words on the command line to the server's default policy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field
from safetensors.torch import save_file

from kvcache.policies.base import Policy, PolicyArgs
from kvcache.registry import HEADS, LAYERS, PARTS, policies
from server import settings
from server.errors import StartError
from server.platforms import Platform
from server.settings import add_flags, default_policy, pass_audit, pass_weights
from tests.kvcache.synthetic import BUDGETED, random_network

CPU = Platform("cpu", None)
BLOCK = 32


def chosen(*argv: str, platform: Platform = CPU) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    flags = vars(parser.parse_args(["--kv-namm-weights", "untouched", *argv]))
    return default_policy(argparse.Namespace(block_size=BLOCK, **flags), platform)


def test_no_flag_means_no_compression() -> None:
    assert chosen() == {"policy": "none"}


LATER = {"suffix": 0, "interval": 0}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--kv-policy", "streamingllm"), {"policy": "streamingllm", "budget": 1024, "sinks": 4, **LATER}),
        (("--kv-policy=streamingllm", "--kv-budget=25%"),
         {"policy": "streamingllm", "budget": "25%", "sinks": 4, **LATER}),
        (("--kv-policy=random", "--kv-budget=512", "--kv-seed=3"),
         {"policy": "random", "budget": 512, "sinks": 4, "recent": 32, "seed": 3}),
        (("--kv-policy", "snapkv", "--kv-pooling", "avg", "--kv-group-reduce", "max"),
         {"pooling": "avg", "group_reduce": "max"}),
        (("--kv-policy", "tova", "--kv-layers", "zigzag", "--kv-heads=adakv", "--kv-mass", "0.8", "--kv-floor=0"),
         {"policy": "tova", "layers": "zigzag", "heads": "adakv", "mass": 0.8, "bound": 0.5, "floor": 0.0,
          "window": 1}),
        (("--kv-policy=l2norm", "--kv-layers=zipvl", "--kv-window=8"),
         {"policy": "l2norm", "layers": "zipvl", "window": 8, "tau": 0.975, "recent": 32}),
        (("--kv-policy", "criticalkv", "--kv-first-stage", "1", "--kv-epsilon=1e-3"),
         {"policy": "criticalkv", "first_stage": 1.0, "epsilon": 0.001}),
    ],
)  # fmt: skip
def test_flags_become_words(argv: tuple[str, ...], words: dict[str, Any]) -> None:
    assert words.items() <= chosen(*argv).items()


def test_every_argument_of_every_policy_has_a_flag() -> None:
    gates = ("--kv-gates", "[[0.5], [1]]")
    for policy in policies().values():
        needed = gates if "gates" in policy.Args.model_fields else ()
        given = [
            text
            for name, value in policy(policy.Args.model_validate({})).args.model_dump(mode="json").items()
            for text in (f"--kv-{name.replace('_', '-')}", str(value))
        ]
        assert chosen("--kv-policy", policy.name, *given, *needed) == chosen("--kv-policy", policy.name, *needed)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("layers", LAYERS)
def test_every_argument_of_every_combination_has_a_flag(layers: str, heads: str) -> None:
    for name in BUDGETED:
        parts = ("--kv-policy", name, "--kv-layers", layers, "--kv-heads", heads)
        usual = policies()[name]
        words = chosen(*parts)
        assert words.get("layers", usual.layers.name) == layers and words.get("heads", usual.heads.name) == heads
        given = [
            text
            for argument, value in words.items()
            if argument not in ("policy", *PARTS)
            for text in (f"--kv-{argument.replace('_', '-')}", str(value))
        ]
        assert chosen(*parts, *given) == words


def test_an_own_allocator_that_is_named_goes_without_saying() -> None:
    assert chosen("--kv-policy=zigzagkv", "--kv-layers=zigzag", "--kv-heads=equal") == chosen("--kv-policy=zigzagkv")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--kv-budget", "25%"), ("--kv-budget without a policy", "--kv-policy NAME", "snapkv")),
        (("--kv-policy", "none", "--kv-sinks", "3"), ("--kv-sinks without a policy",)),
        (("--kv-policy", "streamingllm", "--kv-window", "8", "--kv-seed", "1"),
         ("--kv-window, --kv-seed: the policy streamingllm takes --kv-budget, --kv-sinks, --kv-suffix, "
          "--kv-interval, --kv-layers, --kv-heads.",)),
        (("--kv-policy", "streamingllm", "--kv-heads", "adakv", "--kv-mass", "0.9"),
         ("--kv-mass: the policy streamingllm takes --kv-floor, --kv-budget, --kv-sinks, --kv-suffix, --kv-interval, "
          "--kv-layers, --kv-heads.",)),
        (("--kv-layers", "zigzag"), ("--kv-layers without a policy", "--kv-policy NAME")),
        (("--kv-policy", "none", "--kv-heads", "adakv"), ("--kv-heads without a policy",)),
        (("--kv-policy", "snapkv", "--kv-layers", "zig"),
         ("--kv-layers: there is no such allocator: 'zig'. Allowed: uniform, pyramid, zigzag, zipvl, d2o.",)),
        (("--kv-policy", "snapkv", "--kv-layers", "5"), ("--kv-layers: there is no such allocator: 5",)),
        (("--kv-policy", "snapkv", "--kv-heads", "zigzag", "--kv-mass", "0.9"),
         ("--kv-heads: there is no such allocator: 'zigzag'. Allowed: equal, adakv.",)),
        (("--kv-policy", "adakv", "--kv-floor", "2"), ("--kv-floor", ">= 0 and <= 1")),
        (("--kv-policy", "tova", "--kv-layers", "zigzag", "--kv-window", "90", "--kv-budget", "157"),
         ("--kv-budget: 157 is too small for tova with these arguments", ">= 158")),
        (("--kv-policy", "snap"), ("--kv-policy: unknown policy 'snap'", "snapkv")),
        (("--kv-policy", "snapkv", "--kv-budget", "0"), ("--kv-budget", "'25%'")),
        (("--kv-policy", "snapkv", "--kv-budget", "1.5"), ("--kv-budget", "got 1.5")),
        (("--kv-policy", "snapkv", "--kv-sinks", "-1"), ("--kv-sinks", ">= 0")),
        (("--kv-policy", "snapkv", "--kv-group-stage", "later"), ("--kv-group-stage", "'probabilities'")),
        (("--kv-policy", "streamingllm", "--kv-budget", "99"), ("--kv-budget: 99 is too small", ">= 100")),
    ],
)  # fmt: skip
def test_wrong_flags_are_named_with_what_is_allowed(argv: tuple[str, ...], words: tuple[str, ...]) -> None:
    with pytest.raises(StartError) as caught:
        chosen(*argv)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "kv_cache" not in message and "\n" not in message


def test_the_smallest_budget_depends_on_the_page_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.server.test_settings.BLOCK", 16)
    assert chosen("--kv-policy", "streamingllm", "--kv-budget", "52")["budget"] == 52
    monkeypatch.setattr("tests.server.test_settings.BLOCK", None)  # vLLM decides later
    assert chosen("--kv-policy", "streamingllm", "--kv-budget", "7")["budget"] == 7


def test_where_policies_cannot_run_only_none_is_taken() -> None:
    cuda = Platform("cuda", "no adapter yet")
    assert chosen(platform=cuda) == {"policy": "none"}
    with pytest.raises(StartError, match=r"--kv-policy: snapkv is not available: no adapter yet"):
        chosen("--kv-policy", "snapkv", platform=cuda)


class Loud(Policy):
    """A third party's policy with an argument of a new kind."""

    name = "loud"
    title = "Loud"
    paper = "none"

    class Args(PolicyArgs):
        sinks: int = Field(1, description="100% of them.")
        loud_ness: bool = Field(False, description="How loud.")

    def scores(self, evidence: Any) -> Any:
        pytest.fail("nothing is scored here")


def test_an_installed_policy_brings_its_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    everyone = {**policies(), "loud": Loud}
    monkeypatch.setattr(settings, "policies", lambda: everyone)
    monkeypatch.setattr("kvcache.registry.policies", lambda: everyone)
    assert chosen("--kv-policy", "loud", "--kv-loud-ness", "true")["loud_ness"] is True
    parser = argparse.ArgumentParser()
    add_flags(parser)
    help_text = " ".join(parser.format_help().split())
    assert "--kv-loud-ness VALUE How loud (loud)." in help_text
    assert "One of uniform, pyramid, zigzag, zipvl, d2o." in help_text and "One of equal, adakv." in help_text
    assert "(zigzagkv, zigzag)." in help_text  # the takers of --kv-mass
    assert "is sure of (adakv)." in help_text  # policy and allocator of one name
    assert "random, loud" in help_text  # among the takers of --kv-sinks, and the names of --kv-policy


def test_values_of_a_config_file_are_taken(parse: Callable[..., argparse.Namespace], tmp_path: Any) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("kv-policy: snapkv\nkv_budget: 25%\nkv-window: 16\nport: 8011\n")
    args = parse("--config", str(file), "--kv-window", "8")
    args.block_size = BLOCK
    assert default_policy(args, CPU).items() >= {"policy": "snapkv", "budget": "25%", "window": 8}.items()
    assert (args.port, args.model) == (8011, None)


def test_namm_as_the_servers_policy_needs_weights() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    args = argparse.Namespace(block_size=BLOCK, **vars(parser.parse_args(["--kv-policy", "namm"])))
    with pytest.raises(StartError, match=r"--kv-policy: namm .* without trained weights \(--kv-namm-weights FILE"):
        default_policy(args, CPU)


def test_weights_reach_the_workers_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what the user has there; workers have another working folder."""
    save_file(random_network().weights, tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(kv_namm_weights="w.safetensors", additional_config={"x": 1, "longreach": {"y": 2}})
    pass_weights(args)
    file = str((tmp_path / "w.safetensors").resolve())
    assert args.additional_config == {"x": 1, "longreach": {"y": 2, "namm_weights": file}}
    args = argparse.Namespace(kv_namm_weights=None, additional_config=None)
    pass_weights(args)
    assert args.additional_config is None


def test_weights_that_can_not_be_read_end_the_start(tmp_path: Path) -> None:
    args = argparse.Namespace(kv_namm_weights=str(tmp_path / "no"), additional_config=None)
    with pytest.raises(StartError, match=r"--kv-namm-weights: .*no can't be read as safetensors") as caught:
        pass_weights(args)
    assert "\n" not in str(caught.value)


def test_scheduler_and_workers_are_told_how_often_to_check() -> None:
    args = argparse.Namespace(kv_audit=3, additional_config={"longreach": {"y": 2}})
    pass_audit(args)
    assert args.additional_config == {"longreach": {"y": 2, "audit": 3}}
    args = argparse.Namespace(kv_audit=0, additional_config=None)
    pass_audit(args)
    assert args.additional_config is None
    with pytest.raises(StartError, match=r"--kv-audit: -1 steps; allowed are 0 \(never\) and more"):
        pass_audit(argparse.Namespace(kv_audit=-1, additional_config=None))
