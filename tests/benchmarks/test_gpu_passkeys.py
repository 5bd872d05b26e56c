"""The passkey sweep on GPUs, as far as it needs none: what counts, and which policies run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu import passkeys
from benchmarks.gpu.passkeys import parse_policies, tally
from benchmarks.quality.passkeys import make_suite


def test_dense_runs_first_and_once() -> None:
    labels = [policy.label for policy in parse_policies(["snapkv:512", "none", "snapkv:512,window=16", "snapkv:512"])]
    assert labels == ["none", "snapkv:512", "snapkv:512,window=16"]


@pytest.mark.parametrize("text", ["snapkv:512,kernel=4", "nope:512", "snapkv:512,windows=3", "none,snapkv"])
def test_wrong_policies_are_errors_before_an_engine_starts(text: str) -> None:
    with pytest.raises(ValueError):
        parse_policies([text])


def test_documents_that_dense_misses_do_not_count() -> None:
    dense = {(0, 0): True, (0, 1): False, (1, 0): True, (1, 1): True}
    found = {(0, 0): False, (0, 1): True, (1, 0): True, (1, 1): True}
    assert tally(found, dense) == {
        "documents": 4, "dense": 3, "found": 2, "found_of_dense_by_seed": {0: [0, 1], 1: [2, 2]}, "missed": [(0, 0)],
    }  # fmt: skip
    assert tally(dense, dense)["found"] == 3


def test_one_row_for_each_policy(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two documents of two seeds each; the second policy finds those of seed 1."""
    rows: list[dict[str, Any]] = []
    keys: list[str] = []

    def run(llm: Any, prompts: list[list[int]], words: dict[str, Any], tokens: int) -> list[Any]:
        keys[:] = keys or [make_suite(tokenizer, 400, 2, 8, seed)[i].answer for seed in (0, 1) for i in (0, 1)]
        usage = {"usage": {"kept_tokens": 7}, "totals": {}}
        assert all(key in tokenizer.decode(prompt).replace(" ", "") for key, prompt in zip(keys, prompts, strict=True))
        return [
            SimpleNamespace(
                outputs=[SimpleNamespace(text=f"It is {key}." if words["policy"] == "none" or i > 1 else "No.")],
                kv_transfer_params={"kv_cache": usage},
            )
            for i, key in enumerate(keys)
        ]

    monkeypatch.setattr(passkeys, "run", run)
    monkeypatch.setattr(passkeys, "say", lambda **row: rows.append(row))
    args: Any = SimpleNamespace(seeds=[0, 1], documents=2, kept_sets=False)
    passkeys.measure(None, tokenizer, 400, parse_policies(["snapkv:128,window=8"]), args)
    assert [(row["policy"], row["dense"], row["found"]) for row in rows] == [
        ("none", 4, 4),
        ("snapkv:128,window=8", 4, 2),
    ]
    assert rows[1]["missed"] == [(0, 0), (0, 1)]
