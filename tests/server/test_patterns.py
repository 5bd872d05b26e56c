"""`prefill_attention`: the check of the field, the flags, the calibration file, what several prompts add up to."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from attention_plugins.prefill.registry import patterns
from kvcache.method import PolicyError
from server.errors import StartError
from server.patterns import PatternDesk
from server.platforms import Platform
from server.prefill_settings import add_prefill_flags, pass_patterns, pattern_desk
from server.scope import RequestScope
from tests.server.asgi import Handler, post, sent_body

CPU, STOCK = Platform("cpu", None), Platform("cuda", "no adapter yet")


def flags(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_prefill_flags(parser)
    return argparse.Namespace(additional_config=None, **vars(parser.parse_args(argv)))


def test_words_are_checked_and_completed() -> None:
    desk = PatternDesk()
    assert desk.default == desk.check({"pattern": "dense"}) == {"pattern": "dense"}
    words = desk.check({"pattern": "xattention", "stride": 16})
    assert (words["stride"], words["threshold"], words["min_context"]) == (16, 0.9, 16384)
    delta = desk.check({"pattern": "delta", "base": {"pattern": "anchor", "min_context": 100}})
    assert delta["base"]["pattern"] == "anchor" and delta["base"]["step"] == 16


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ({"pattern": "dens"}, "prefill_attention.pattern"),
        ({"pattern": "xattention", "stride": 5}, "prefill_attention.stride"),
        ({"pattern": "flexprefill", "threshold": 0.5}, "prefill_attention.threshold"),
        ({"pattern": "delta", "base": {"pattern": "delta"}}, "prefill_attention.base.pattern"),
        ({"pattern": "dense", "tau": 1}, "prefill_attention.tau"),
        ("xattention", "prefill_attention"),
    ],
)
def test_bad_words_are_a_400_that_names_the_field(words: Any, field: str) -> None:
    sent = post(Handler(), {"prompt": "hi", "prefill_attention": words})
    error = json.loads(sent_body(sent))["error"]
    assert sent[0]["status"] == 400 and error["param"] == field and "Allowed:" in error["message"]


def test_a_server_that_lacks_patterns_says_why() -> None:
    desk = PatternDesk(unavailable="no adapter yet")
    with pytest.raises(PolicyError, match=r"streaming is not available: no adapter yet. Allowed: dense"):
        desk.check({"pattern": "streaming"})
    desk = PatternDesk()
    desk.lacks("soft caps")
    assert desk.describe()["unavailable_reason"] == "soft caps"
    with pytest.raises(PolicyError):
        PatternDesk({"pattern": "streaming"}).lacks("soft caps")


def test_what_there_is_is_told() -> None:
    told = PatternDesk().describe()
    assert [pattern["name"] for pattern in told["data"]] == ["dense", *patterns()]
    assert {pattern["name"] for pattern in told["data"] if pattern.get("needs_training")} == {
        "power", "strided", "bigbird",
    }  # fmt: skip


def test_flags_become_words() -> None:
    desk = pattern_desk(flags("--prefill-attention=flexprefill", "--prefill-gamma", "0.8"), CPU)
    assert (desk.default["pattern"], desk.default["gamma"]) == ("flexprefill", 0.8)
    base = '--prefill-base={"pattern": "streaming", "sinks": 8}'
    desk = pattern_desk(flags("--prefill-attention=delta", base), CPU)
    assert desk.default["base"]["sinks"] == 8


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prefill-gamma=0.5"], "--prefill-gamma without a pattern to take it: add --prefill-attention NAME"),
        (["--prefill-attention=anchor", "--prefill-gamma=0.5"], "--prefill-gamma: the pattern anchor takes --prefill"),
        (["--prefill-attention=nothing"], "--prefill-attention: unknown pattern 'nothing'. Allowed: dense, xattention"),
        (["--prefill-attention=anchor", "--prefill-step=0"], "--prefill-step: "),
    ],
)
def test_bad_flags_fail_at_the_start(argv: list[str], message: str) -> None:
    with pytest.raises(StartError) as caught:
        pattern_desk(flags(*argv), CPU)
    assert message in str(caught.value)


def test_a_server_without_patterns_refuses_one_of_its_own() -> None:
    with pytest.raises(StartError, match="no adapter yet"):
        pattern_desk(flags("--prefill-attention=streaming"), STOCK)


TABLE = torch.tensor([[[0, 1000, 6096], [2, 100, 0]]])


def test_tables_reach_the_workers(tmp_path: Path) -> None:
    file = tmp_path / "tables.safetensors"
    save_file({"minference.heads": TABLE}, file)
    args = flags("--prefill-calibration", str(file))
    pass_patterns(args, CPU)
    assert args.additional_config == {"longreach": {"prefill": {"calibration": str(file), "warm_up": []}}}


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ([], []),
        (["--prefill-attention=anchor"], ["anchor"]),
        (["--prefill-attention=anchor", "--prefill-warm-up", "none"], []),
        (["--prefill-warm-up", "xattention", "delta"], ["xattention", "delta"]),
        (["--prefill-warm-up", "all"], list(patterns())),
    ],
)
def test_what_is_compiled_at_the_start(argv: list[str], names: list[str]) -> None:
    args = flags(*argv)
    pass_patterns(args, CPU)
    assert args.additional_config["longreach"]["prefill"]["warm_up"] == names


def test_what_cant_be_compiled() -> None:
    with pytest.raises(StartError, match="--prefill-warm-up: hop: there are xattention, "):
        pass_patterns(flags("--prefill-warm-up", "hop"), CPU)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read as safetensors"),
        ({"x": TABLE}, "lacks minference.heads"),
        ({"minference.heads": TABLE.float()}, "must be int64"),
        ({"minference.heads": TABLE[0]}, "must be int64"),
        ({"minference.heads": TABLE + 3}, "kinds or sizes"),
        ({"minference.heads": -TABLE}, "kinds or sizes"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: dict[str, torch.Tensor] | None, message: str) -> None:
    file = tmp_path / "tables.safetensors"
    if content is None:
        file.write_bytes(b"none")
    else:
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, file)
    with pytest.raises(StartError, match=message):
        pass_patterns(flags("--prefill-calibration", str(file)), CPU)


def test_tables_of_another_model_are_refused(tmp_path: Path) -> None:
    from server.calibration import read_head_tables

    file = tmp_path / "tables.safetensors"
    save_file({"minference.heads": TABLE}, file)
    assert torch.equal(read_head_tables(file, (1, 2))["minference.heads"], TABLE)
    with pytest.raises(StartError, match="1 layers and 2 heads, the model has 30 and 9"):
        read_head_tables(file, (30, 9))


def test_several_prompts_add_up() -> None:
    scope = RequestScope()
    for tokens, densities in ((100, [0.5, 0.1]), (50, [0.3, 0.1])):
        density = {"mean": sum(densities) / 2, "by_layer": densities}
        scope.tell("prefill_attention", {"pattern": "anchor", "tokens": tokens, "density": density})
    merged = scope.merged()["prefill_attention"]
    assert merged["tokens"] == 150 and merged["pattern"] == "anchor"
    assert merged["density"]["mean"] == pytest.approx(0.25)
    assert merged["density"]["by_layer"] == pytest.approx([0.4, 0.1])
    scope.tell("prefill_attention", {"pattern": "anchor", "density": {"mean": 1.0}})
    merged = scope.merged()["prefill_attention"]
    assert merged["density"] == {"mean": pytest.approx(0.5)} and merged["tokens"] == 150


def test_dense_prompts_say_no_more() -> None:
    scope = RequestScope()
    for _ in range(2):
        scope.tell("prefill_attention", {"pattern": "dense"})
    assert scope.merged() == {"prefill_attention": {"pattern": "dense"}}
