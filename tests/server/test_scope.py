"""What a request's engine calls tell, put together."""

from __future__ import annotations

import copy
from typing import Any

from server.scope import RequestScope, current_scope, merge_kv


def usage(tokens: int, kept: tuple[float, float, float], held: int = 8, freed: int = 4) -> dict[str, Any]:
    return {
        "policy": "snapkv", "budget": "25%", "prompt_tokens": tokens,
        "kept_tokens": dict(zip(("mean", "min", "max"), kept, strict=True)), "bytes_held": held, "bytes_freed": freed,
    }  # fmt: skip


def test_one_prompt_is_told_as_it_is() -> None:
    one = usage(100, (25.0, 20.0, 30.0))
    assert merge_kv([one]) == one


def test_prompts_add_up_and_kept_tokens_are_averaged() -> None:
    parts = [usage(100, (25.0, 20.0, 30.0)), usage(200, (50.0, 50.0, 50.0), 16, 0), usage(3, (3.0, 3.0, 3.0), 1, 1)]
    before = copy.deepcopy(parts)
    assert merge_kv(parts) == usage(303, (26.0, 3.0, 50.0), 25, 5)
    assert parts == before


def test_stock_engines_tell_no_bytes() -> None:
    part = {"policy": "none", "prompt_tokens": 4, "kept_tokens": {"mean": 4.0, "min": 4.0, "max": 4.0}}
    assert merge_kv([part, part]) == {**part, "prompt_tokens": 8}


def test_scopes_do_not_share_their_lists() -> None:
    first, second = RequestScope(), RequestScope()
    first.tell("kv_cache", {})
    first.words["kv_cache"] = {}
    assert (second.usage, second.words, current_scope.get()) == ({}, {}, None)


def test_steps_of_several_prompts_add_up() -> None:
    scope = RequestScope()
    for steps in ({"select": 3, "dense": 1}, {"select": 4, "crowded": 2}):
        scope.tell("decode_attention", {"selector": "tidal", "tokens": 512, "steps": steps})
    steps = {"select": 7, "dense": 1, "crowded": 2}
    assert scope.merged() == {"decode_attention": {"selector": "tidal", "tokens": 512, "steps": steps}}
    assert scope.merged() == scope.merged()


def test_reading_everything_has_no_steps_to_tell() -> None:
    scope = RequestScope()
    scope.tell("decode_attention", {"selector": "dense"})
    scope.tell("decode_attention", {"selector": "dense"})
    assert scope.merged() == {"decode_attention": {"selector": "dense"}}
