"""Servers and variants as the command line names them; only this machine is loaded unasked."""

from __future__ import annotations

import sys

import pytest

from benchmarks.loadtest.systems import (
    SystemsError,
    parse_bytes,
    refuse_remote,
    runnable,
    server,
    systems,
    variant,
)

SNAPKV = '{"kv_cache": {"policy": "snapkv", "budget": 512}}'


def test_each_server_has_its_own_variants_or_itself() -> None:
    servers = [server("stock=vllm serve M --x 'a b'"), server("ours=longreach serve M"), server("there=http://[::1]:1")]
    assert servers[0].words == ("vllm", "serve", "M", "--x", "a b") and servers[2].url == "http://[::1]:1"
    found = systems(servers, [variant(f"snapkv@ours={SNAPKV}"), variant('none@ours={"kv_cache": {"policy": "none"}}')])
    assert [one.name for one in found] == ["stock", "snapkv", "none", "there"]
    assert [one.compresses for one in found] == [False, True, False, False]
    assert found[1].fields == {"kv_cache": {"policy": "snapkv", "budget": 512}}


def test_a_variant_of_several_servers_carries_their_names() -> None:
    servers = [server("a=longreach serve M"), server("b=longreach serve N")]
    assert [one.name for one in systems(servers, [variant(f"s={SNAPKV}")])] == ["a s", "b s"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("longreach serve", "isn't NAME=COMMAND"),
        ("a=longreach serve --port 3", "leave --port out"),
        ("a=longreach serve --host=0.0.0.0", "leave --host out"),
    ],
)
def test_servers_that_cant_be_started_are_refused(text: str, told: str) -> None:
    with pytest.raises(SystemsError, match=told):
        server(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a={kv_cache}", "isn't JSON"),
        ("a=3", "an object with fields"),
        ('a={"prompt": [1]}', "prompt is for the load test itself"),
    ],
)
def test_variants_that_mean_nothing_are_refused(text: str, told: str) -> None:
    with pytest.raises(SystemsError, match=told):
        variant(text)


def test_variants_of_nobody_and_names_of_two_are_refused() -> None:
    ours = [server("ours=longreach serve")]
    with pytest.raises(SystemsError, match="there is no --server theirs, there are ours"):
        systems(ours, [variant(f"s@theirs={SNAPKV}")])
    with pytest.raises(SystemsError, match="two systems have the name s"):
        systems(ours, [variant(f"s={SNAPKV}"), variant(f"s={SNAPKV}")])


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://localhost:1", "http://[::1]:1", "http://127.3.2.1"])
def test_this_machine_may_be_loaded(url: str) -> None:
    refuse_remote(url, allowed=False)


@pytest.mark.parametrize("url", ["http://10.0.0.1:8000", "https://example.org/v1", "http://0.0.0.0:1", "http://[::]:1"])
def test_another_machine_only_where_somebody_says_so(url: str) -> None:
    with pytest.raises(SystemsError, match="--remote"):
        refuse_remote(url, allowed=False)
    refuse_remote(url, allowed=True)


def test_commands_run_with_this_interpreter_and_the_pool_that_is_asked_for() -> None:
    assert runnable(["python", "x.py"]) == [sys.executable, "x.py"]
    assert runnable(["/opt/bin/longreach", "serve"]) == ["/opt/bin/longreach", "serve"]
    assert runnable(["longreach", "serve", "M"])[-2:] == ["serve", "M"]
    assert runnable(["vllm", "serve", "M", "--x"])[-2:] == ["M", "--x"]
    assert server("a=python x.py").command(5000)[-2:] == ["--kv-cache-memory-bytes", "5000"]


def test_sizes_have_units() -> None:
    assert [parse_bytes(text) for text in ("500", "2K", "1.5M", "3G", "2Gi", "1KiB")] == [
        500, 2000, 1_500_000, 3 * 10**9, 2**31, 1024,
    ]  # fmt: skip
    for text in ("", "M", "3 apples", "3Q"):
        with pytest.raises(SystemsError, match="bytes such as 500M"):
            parse_bytes(text)
