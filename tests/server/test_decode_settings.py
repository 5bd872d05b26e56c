"""`--decode-...` flags: from words on the command line to what servers, workers and scheduler know of selectors."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attention_plugins.decode.registry import selectors
from server.decode_settings import add_decode_flags, pass_selectors, selector_desk
from server.errors import StartError
from server.platforms import Platform
from server.selectors import SelectorDesk
from tests.server.calibrations import write

CPU = Platform("cpu", None)
STOCK = Platform("cuda", "no adapter yet")
NONE = {"policy": "none"}
SNAPKV = {"policy": "snapkv", "budget": 512}


def flags(*argv: str, tensor_parallel: int = 1) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_decode_flags(parser)
    others = {"tensor_parallel_size": tensor_parallel, "additional_config": None}
    return argparse.Namespace(**others, **vars(parser.parse_args(argv)))


def desk(*argv: str, platform: Platform = CPU, **rest: Any) -> SelectorDesk:
    return selector_desk(flags(*argv, **rest), platform)


def told(*argv: str, platform: Platform = CPU, policy: dict[str, Any] = NONE) -> Any:
    args = flags(*argv)
    pass_selectors(args, platform, policy)
    return args.additional_config


def test_without_flags_everything_is_read_and_what_costs_little_may_be_asked_for() -> None:
    found = desk()
    assert (found.default, list(found.enabled), found.states) == ({"selector": "dense"}, [], 64)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--decode-attention", "tidal"), {"selector": "tidal", "tokens": 2048, "min_context": 8192, "kernel": 1}),
        (("--decode-attention=recycled", "--decode-tokens=512", "--decode-min-context", "0", "--decode-stride=9"),
         {"selector": "recycled", "tokens": 512, "min_context": 0, "stride": 9, "similarity": 0.0}),
        (("--decode-attention", "quest"), {"selector": "quest"}),
    ],
)  # fmt: skip
def test_flags_become_words(argv: tuple[str, ...], words: dict[str, Any]) -> None:
    found = desk(*argv)
    assert words.items() <= found.default.items()
    assert list(found.enabled) == [words["selector"]]


def test_every_argument_of_every_selector_has_a_flag() -> None:
    for selector in selectors().values():
        named = ("--decode-attention", selector.name, "--decode-calibration", "untouched")
        words = desk(*named).default
        given = [
            text
            for name, value in words.items()
            if name != "selector"
            for text in (f"--decode-{name.replace('_', '-')}", str(value))
        ]
        assert desk(*named, *given).default == words


@pytest.mark.parametrize(
    ("argv", "enabled"),
    [
        (("tidal",), ["tidal"]),
        (("quest", "recycled"), ["recycled", "quest"]),
        (("quest", "quest"), ["quest"]),
        (("none",), []),
        (("all", "--decode-calibration", "c"), list(selectors())),
    ],
)
def test_selectors_are_enabled_by_name(argv: tuple[str, ...], enabled: list[str]) -> None:
    assert list(desk("--decode-selectors", *argv).enabled) == enabled


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--decode-tokens", "64"), ("--decode-tokens without a selector", "--decode-attention NAME", "tidal")),
        (("--decode-attention", "tidal", "--decode-stride", "5"),
         ("--decode-stride: the selector tidal takes --decode-tokens, --decode-min-context,", "--decode-heads.")),
        (("--decode-attention", "tide"), ("--decode-attention: unknown selector 'tide'", "dense, recycled")),
        (("--decode-attention", "tidal", "--decode-tokens", "31"), ("--decode-tokens: ", "got 31", ">= 32")),
        (("--decode-attention", "tidal", "--decode-selectors", "quest"),
         ("--decode-attention: tidal is not enabled", "--decode-selectors tidal")),
        (("--decode-attention", "tidal", "--decode-selectors", "none"), ("--decode-attention: tidal is not enabled",)),
        (("--decode-attention", "loki"),
         ("--decode-attention: loki needs", "--decode-calibration FILE", "`longreach calibrate`")),
        (("--decode-selectors", "tidal", "loki"),
         ("--decode-selectors: loki needs", "`longreach calibrate`", "Others: recycled tidal")),
        (("--decode-selectors", "all"), ("--decode-selectors: loki needs",)),
        (("--decode-selectors", "tide", "wave"), ("--decode-selectors: tide, wave: there are recycled", "all, none")),
        (("--decode-selectors", "tidal", "none"), ("--decode-selectors: none: there are",)),
        (("--decode-states", "0"), ("--decode-states: 0 requests; allowed is 1 or more.",)),
    ],
)  # fmt: skip
def test_wrong_flags_are_named_with_what_is_allowed(argv: tuple[str, ...], words: tuple[str, ...]) -> None:
    with pytest.raises(StartError) as caught:
        desk(*argv)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "decode_attention" not in message and "\n" not in message


def test_on_several_gpus_selectors_that_want_all_heads_are_left_out_or_refused() -> None:
    lonely = [name for name, selector in selectors().items() if not selector.with_tensor_parallel]
    assert lonely
    assert not set(lonely) & set(desk(tensor_parallel=2).enabled)
    for name in lonely:
        with pytest.raises(StartError, match=rf"--decode-attention: {name} needs .*--tensor-parallel-size 1"):
            desk("--decode-attention", name, tensor_parallel=2)
        with pytest.raises(StartError, match=rf"--decode-selectors: {name} needs .*--tensor-parallel-size 1"):
            desk("--decode-selectors", name, tensor_parallel=2)


def test_where_selectors_cannot_run_only_dense_is_taken() -> None:
    assert (desk(platform=STOCK).default, desk(platform=STOCK).enabled) == ({"selector": "dense"}, ())
    assert desk("--decode-selectors", "none", platform=STOCK).enabled == ()
    for argv in (("--decode-attention", "tidal"), ("--decode-selectors", "tidal"), ("--decode-selectors", "all")):
        with pytest.raises(StartError, match="not available: no adapter yet"):
            desk(*argv, platform=STOCK)
    assert told(platform=STOCK) is None


def test_workers_and_scheduler_are_told_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what is there; workers have another working folder."""
    assert told() == {"longreach": {"decode": {"selectors": [], "states": 64, "calibration": None}}}
    write(tmp_path / "c.safetensors")
    monkeypatch.chdir(tmp_path)
    args = flags("--decode-selectors", "loki", "--decode-states=7", "--decode-calibration=c.safetensors")
    args.additional_config = {"x": 1, "longreach": {"namm_weights": "w"}}
    pass_selectors(args, CPU, NONE)
    decode = {"selectors": ["loki"], "states": 7, "calibration": str((tmp_path / "c.safetensors").resolve())}
    assert args.additional_config == {"x": 1, "longreach": {"namm_weights": "w", "decode": decode}}


def test_a_calibration_that_can_not_be_read_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"--decode-calibration .*no: can't be read as safetensors"):
        told("--decode-calibration", str(tmp_path / "no"))


def test_a_default_selector_that_needs_a_whole_cache_and_a_policy_exclude_each_other() -> None:
    for name, selector in selectors().items():
        argv = ("--decode-attention", name)
        if selector.needs_calibration:
            continue
        assert told(*argv)["longreach"]["decode"]["selectors"]
        if selector.with_policies:
            assert told(*argv, policy=SNAPKV)
            continue
        with pytest.raises(
            StartError, match=rf"--decode-attention: {name} needs a whole cache.*--kv-policy snapkv"
        ) as e:
            told(*argv, policy=SNAPKV)
        assert "Allowed: dense, recycled" in str(e.value) and "--kv-policy none" in str(e.value)
    assert told(policy=SNAPKV), "requests may ask for what the server's own policy excludes, with another policy"


def test_a_config_file_may_say_it_all(parse: Callable[..., argparse.Namespace], tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("decode-selectors: [tidal, quest]\ndecode_attention: tidal\ndecode-tokens: 512\n")
    found = selector_desk(parse("--config", str(file), "--decode-tokens", "64"), CPU)
    assert (list(found.enabled), found.default["tokens"]) == (["tidal", "quest"], 64)
