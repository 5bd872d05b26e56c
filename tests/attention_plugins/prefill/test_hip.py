"""HiP's search: what it looks at, and what it finds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from attention_plugins.prefill.hip import HiP
from attention_plugins.prefill.search import Search
from tests.attention_plugins.prefill.prompts import DIM, NUM_HEADS, NUM_KV_HEADS, Prompt, make, make_prompt

SIDES = 256, 32, 16, 8, 1


def prompt_of(score: Callable[[torch.Tensor], torch.Tensor], length: int = 2048) -> Prompt:
    """All queries alike; keys whose scores are this function of their position."""
    prompt = Prompt(
        torch.zeros(length, NUM_HEADS, DIM), torch.zeros(NUM_KV_HEADS, length, DIM), torch.ones(2, length, DIM)
    )
    prompt.queries[..., 0] = 1.0
    prompt.keys[..., 0] = score(torch.arange(length).float())
    return prompt


@pytest.mark.parametrize("size", SIDES)
@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_finds_the_largest_of_a_monotone_chunk(size: int, slope: float) -> None:
    prompt = prompt_of(lambda position: slope * (position % 256))
    search = Search(prompt.chunk(scale=1.0), stride=4, share_heads=True)
    starts = torch.arange(0, 2048, size).expand(1, 16, -1)
    wanted = prompt.keys[0, :, 0].view(-1, size).amax(-1)
    assert torch.equal(search.best(starts, size), wanted.expand(1, 16, -1))


@pytest.mark.parametrize("size", SIDES)
def test_looks_at_two_tokens_a_halving(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    real = Search.score

    def counting(self: Search, positions: torch.Tensor) -> torch.Tensor:
        looked.append(positions.shape[-1])
        return real(self, positions)

    monkeypatch.setattr(Search, "score", counting)
    Search(make_prompt(1024).chunk(), 4, True).best(torch.zeros(1, 8, 3, dtype=torch.int64), size)
    assert sum(looked) == 3 * max(1, 2 * (size.bit_length() - 1))


@pytest.mark.parametrize("share", [True, False])
def test_search_in_loops(share: bool) -> None:
    """One chunk after the other, by the rule."""
    prompt = make_prompt(600)
    chunk = prompt.chunk(300)
    found = Search(chunk, 3, share).best(torch.arange(0, 512, 256).expand(1 if share else 2, 3, -1), 256)

    def score(head: int, block: int, key: int) -> float:
        rows = [min(row, 299) for row in range(block * 128, block * 128 + 128, 3)]
        heads = range(4) if share else range(head * 2, head * 2 + 2)
        return max(float((chunk.queries[rows, h] @ prompt.keys[h // 2, key]).max()) * DIM**-0.5 for h in heads)

    for head in range(len(found)):
        for block in range(3):
            for index, start in enumerate((0, 256)):
                size, best = 256, 0.0
                while size > 1:
                    size //= 2
                    left, right = (score(head, block, at + size // 2) for at in (start, start + size))
                    start, best = (start + size, right) if right > left else (start, left)
                assert float(found[head, block, index]) == pytest.approx(best, abs=1e-4)


def test_a_lone_spike_can_be_missed() -> None:
    """Documented: only tokens in the middle of something are looked at."""
    prompt = prompt_of(lambda position: (position == 600) * 10.0 - (position - 1000).abs() / 1000)
    words = {"window": 256, "first_tokens": 256, "second_tokens": 128, "tokens": 128}
    assert not make("hip", **words).plan(prompt.chunk()).mask[:, -1, 600 // 16].any()


def test_keeps_the_best_of_each_stage() -> None:
    """A hill: what is kept lies around its top."""
    prompt = prompt_of(lambda position: -(position - 1000).abs())
    plan = make("hip", window=256, sinks=128, first_tokens=512, second_tokens=256, tokens=128).plan(prompt.chunk())
    middle = plan.mask[0, -1, 8 : (1920 - 255) // 16].nonzero().flatten() + 8
    assert len(middle) == 8 and middle.tolist() == list(range(59, 67))


@pytest.mark.parametrize(("sinks", "top"), [(300, 400), (128, 200), (256, 300)])
def test_looks_behind_sinks_of_any_size(sinks: int, top: int) -> None:
    prompt = prompt_of(lambda position: -(position - top).abs())
    words = {"window": 256, "first_tokens": 256, "second_tokens": 128, "tokens": 128}
    assert make("hip", sinks=sinks, **words).plan(prompt.chunk()).mask[0, -1, top // 16]


def test_heads_share_a_list_or_do_not() -> None:
    chunk = make_prompt(2048).chunk()
    words = {"window": 256, "first_tokens": 512, "second_tokens": 256, "tokens": 128}
    shared = make("hip", **words).plan(chunk).mask
    assert torch.equal(shared[0], shared[1])
    alone = make("hip", share_heads=False, **words).plan(chunk).mask
    assert not torch.equal(alone[0], alone[1])


def test_stages_follow_the_unit() -> None:
    pattern = make("hip", first_tokens=1024, second_tokens=512, tokens=256)
    assert isinstance(pattern, HiP)
    assert pattern.stages(16) == [(256, 1024), (32, 512), (16, 256)]
    assert pattern.stages(128) == [(256, 1024), (128, 256)]
