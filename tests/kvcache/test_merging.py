"""D2O's merging: numbers worked out by hand, the same in loops, and what it must leave alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import kvcache.merging
from kvcache.evidence import QuantScales, dequantise, quantise
from kvcache.merging import Merger, MergeRule, nearest
from kvcache.pages import InterleavedCodec, PageCodec, PermutedCodec
from tests.device import DEVICE
from tests.kvcache.synthetic import HEAD_DIM, PAGE, PagedCache, Run, bits, compress, positions_of, words

RULES = pytest.mark.parametrize("rule", ["paper", "scatter"])
KEYS = torch.tensor([[[1.0, 0], [0, 1], [0.8, 0.6], [0, -1]]], device=DEVICE)
KEPT, DROPPED = torch.tensor([[0, 1]], device=DEVICE), torch.tensor([[2, 3]], device=DEVICE)


def test_merging_of_four_tokens_as_in_the_code() -> None:
    """The mean similarity is 0.4, so the second dropped token is not merged."""
    similarity, slot = nearest(KEYS, KEYS, KEPT, DROPPED)
    torch.testing.assert_close(similarity.cpu(), torch.tensor([[0.8, 0.0]]))
    assert slot.tolist() == [[0, 0]]
    values = torch.tensor([[[1.0, 2], [3, 4], [5, 10], [7, 8]]], device=DEVICE)
    keys, merged = Merger("scatter").merge(KEYS, values, KEPT, DROPPED)
    torch.testing.assert_close(keys.cpu(), torch.tensor([[[0.82, 0.24], [0, 1]]]))
    torch.testing.assert_close(merged.cpu(), torch.tensor([[[(1 + 0.8 * 5) / 2, (2 + 0.8 * 10) / 2], [3, 4]]]))


def test_merging_of_four_tokens_as_in_the_paper() -> None:
    """Weights e and exp(0.8), of their sum."""
    keys, _ = Merger("paper").merge(KEYS, KEYS, KEPT, DROPPED)
    own, other = math.e / (math.e + math.exp(0.8)), math.exp(0.8) / (math.e + math.exp(0.8))
    torch.testing.assert_close(keys.cpu(), torch.tensor([[[own + 0.8 * other, 0.6 * other], [0, 1]]]))


@pytest.mark.parametrize(
    ("threshold", "slots"), [(-2.0, [0, 0]), (-0.4, [0, 0]), (-0.39, [0]), (0.4, [0]), (0.41, []), (2.0, [])]
)
def test_threshold_is_added_to_the_mean_similarity(threshold: float, slots: list[int]) -> None:
    keys, _ = Merger("scatter", threshold).merge(KEYS, KEYS, KEPT, DROPPED)
    expected = torch.tensor([1.0, 0], device=DEVICE) + (0.8 * KEYS[0, 2] if slots else 0)
    torch.testing.assert_close(keys[0, 0], expected / (1 + len(slots)), atol=1e-6, rtol=1e-6)
    assert torch.equal(keys[0, 1], KEYS[0, 1])


def merged_by_hand(
    keys: list[list[list[float]]], values: list[list[list[float]]], kept: list[list[int]], rule: str, threshold: float
) -> tuple[Any, Any, int]:
    """Of one layer, [heads][n][d]; kept keys and values after merging, and how many tokens were merged."""

    def cosine(a: list[float], b: list[float]) -> float:
        lengths = math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / lengths

    best = {}  # (head, token) -> (similarity, kept token)
    for head, positions in enumerate(kept):
        for token in set(range(len(keys[head]))) - set(positions):
            best[head, token] = max((cosine(keys[head][token], keys[head][to]), -to) for to in positions)
    mean = sum(similarity for similarity, _ in best.values()) / len(best)
    new_keys: list[Any] = []
    new_values: list[Any] = []
    count = 0
    for head, positions in enumerate(kept):
        into: dict[int, list[tuple[float, int]]] = {to: [] for to in positions}
        for (where, token), (similarity, to) in best.items():
            assert abs(similarity - mean - threshold) > 1e-6, "rounding decides here: choose another seed"
            if where == head and similarity >= mean + threshold:
                into[-to].append((similarity, token))
        for content, result in ((keys[head], new_keys), (values[head], new_values)):
            rows = []
            for to, parts in into.items():
                count += len(parts)
                if rule == "paper":
                    weights = [math.e] + [math.exp(similarity) for similarity, _ in parts]
                    total = sum(weights)
                else:
                    weights, total = [1.0] + [similarity for similarity, _ in parts], 1.0 + len(parts)
                tokens = [content[to]] + [content[token] for _, token in parts]
                rows.append([sum(w * t[i] for w, t in zip(weights, tokens, strict=True)) / total for i in range(8)])
            result.append(rows)
    return new_keys, new_values, count // 2


def assert_merged_by_hand(run: Run) -> None:
    """Pages hold what the loops say; NaN-free, and something was merged in every layer that dropped anything."""
    cache, n = run.cache, run.plan.full_pages * PAGE
    for layer, heads in enumerate(run.kept):
        keys, values = (part[layer, :, :n].tolist() for part in (cache.keys, cache.values))
        kept = [positions.tolist() for positions in heads]
        args = run.policy.args
        if all(len(positions) == n for positions in kept):
            continue
        *expected, merged = merged_by_hand(keys, values, kept, args.merge, args.threshold)
        assert merged > 0
        for head in range(len(heads)):
            found = cache.codec.unpack(cache.pages[run.compacted(layer, head)])
            for part, by_hand in zip(found, expected, strict=True):
                found_part = part.flatten(0, 1).cpu()
                torch.testing.assert_close(found_part, torch.tensor(by_hand[head]), rtol=1e-5, atol=1e-6)


@RULES
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize("prompt_len", [150, 160])
def test_compacted_pages_equal_those_by_hand(prompt_len: int, heads: tuple[int, int], rule: str) -> None:
    cache = PagedCache(prompt_len, num_heads=heads[0], num_kv_heads=heads[1], uneven=True, seed=prompt_len)
    assert_merged_by_hand(compress(cache, words("d2o", 70, merge=rule)))


@RULES
@pytest.mark.parametrize(
    "arguments",
    [
        {"threshold": -2.0},
        {"threshold": 0.05},
        {"heads": "adakv", "floor": 0.1},
        {"whole_first": 1},
        {"layers": "pyramid", "recent_share": 0.1},
    ],
    ids=str,
)
def test_arguments_equal_those_by_hand(arguments: dict[str, Any], rule: str) -> None:
    """Heads and layers of different lengths, and a layer that stays whole."""
    cache = PagedCache(150, num_heads=4, num_kv_heads=2, uneven=True, seed=3)
    assert_merged_by_hand(compress(cache, words("d2o", "80%", merge=rule, **arguments)))


@RULES
@pytest.mark.parametrize("most", [1, 300, 5000])
def test_pieces_of_any_size_merge_the_same(rule: MergeRule, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(3, 80, 8).to(DEVICE), torch.randn(3, 80, 8).to(DEVICE)
    kept = torch.stack([torch.randperm(80)[:20].sort().values for _ in range(3)]).to(DEVICE)
    dropped = torch.tensor([sorted({*range(80)} - {*row}) for row in kept.tolist()], device=DEVICE)
    whole = Merger(rule).merge(keys, values, kept, dropped)
    monkeypatch.setattr(kvcache.merging, "_MAX_SIMILARITIES", most)
    for found, expected in zip(Merger(rule).merge(keys, values, kept, dropped), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@RULES
@pytest.mark.parametrize("heads", ["equal", "adakv"])
def test_with_a_threshold_above_all_nothing_changes(rule: str, heads: str) -> None:
    """Bit for bit what is copied without merging."""
    merged = compress(PagedCache(150), words("d2o", 70, merge=rule, threshold=2.0, heads=heads))
    copied = compress(PagedCache(150), words("d2o", 70, merge="none", heads=heads))
    assert torch.equal(bits(merged.cache.pages), bits(copied.cache.pages))


@RULES
def test_only_target_pages_are_written_and_budgets_are_exact(rule: str) -> None:
    """The prompt's own blocks may be shared: they are only read, the tail's too; and merging moves no token."""
    run = compress(PagedCache(150), words("d2o", 70, merge=rule))
    target = run.cache.geometry.pool_of(run.cache.free[: run.plan.kept_pages])
    changed = (bits(run.cache.pages) != bits(run.before)).any(1).nonzero().flatten()
    assert changed.tolist() == target.sort().values.tolist()
    assert int(run.tables.counts[run.slot].sum()) == run.plan.kept_pages * 4 * 2
    copied = compress(PagedCache(150), words("d2o", 70, merge="none"))
    assert positions_of(run.kept) == positions_of(copied.kept)
    different = (bits(run.cache.pages) != bits(copied.cache.pages)).any(1)
    assert different.any() and not different.all()


@RULES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kept_tokens_without_a_part_keep_their_bits(rule: MergeRule, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(1, 40, 8).to(dtype), torch.randn(1, 40, 8).to(dtype)
    kept, dropped = torch.arange(0, 40, 2)[None], torch.arange(1, 40, 2)[None]
    new_keys, new_values = Merger(rule).merge(keys, values, kept, dropped)
    assert new_keys.dtype == new_values.dtype == dtype
    same = (new_keys == keys[:, kept[0]]).all(-1) & (new_values == values[:, kept[0]]).all(-1)
    slots = nearest(keys, values, kept, dropped)[1]
    assert not same.all() and same[0, [i for i in range(20) if i not in slots[0].tolist()]].all()


def test_convex_combinations_stay_between_their_parts() -> None:
    """Equal tokens merge into themselves, and no number leaves the range of what was there."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 50, 8), torch.randn(2, 50, 8)
    kept, dropped = torch.arange(10).expand(2, -1), torch.arange(10, 50).expand(2, -1)
    for new, old in zip(Merger("paper", -2.0).merge(keys, values, kept, dropped), (keys, values), strict=True):
        assert new.amax() <= old.amax() and new.amin() >= old.amin()
    alike = torch.ones(1, 6, 8)
    for new in Merger("paper").merge(alike, 3 * alike, torch.tensor([[0, 1]]), torch.tensor([[2, 3, 4, 5]])):
        torch.testing.assert_close(new, new[:, :1].expand(1, 2, 8), rtol=1e-6, atol=0)


@RULES
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_tokens_are_not_merged(rule: MergeRule, bad: float) -> None:
    """A broken key or value spoils no kept token, and a broken kept key takes no part."""
    torch.manual_seed(0)
    keys, values = torch.randn(1, 40, 8), torch.randn(1, 40, 8)
    keys[0, 21, 3] = keys[0, 4, 2] = values[0, 23, 1] = bad
    kept, dropped = torch.arange(0, 40, 2)[None], torch.arange(1, 40, 2)[None]
    new_keys, new_values = Merger(rule, -2.0).merge(keys, values, kept, dropped)
    assert (~new_keys.isfinite()).nonzero().tolist() == [[0, 2, 2]] and new_values.isfinite().all()
    similarity, slot = nearest(keys, values, kept, dropped)
    assert (similarity == -math.inf).nonzero().tolist() == [[0, 10], [0, 11]]
    assert 2 not in slot[similarity > -math.inf]


def test_nothing_dropped_is_nothing_merged() -> None:
    keys = torch.randn(2, 6, 8)
    kept, none = torch.arange(6).expand(2, -1), torch.empty(2, 0, dtype=torch.int64)
    assert all(torch.equal(new, keys) for new in Merger("paper").merge(keys, keys, kept, none))


CODECS = [PermutedCodec(torch.randperm(2 * PAGE * HEAD_DIM), PAGE, HEAD_DIM), InterleavedCodec(PAGE, HEAD_DIM)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("codec", CODECS, ids=["permuted", "interleaved"])
def test_written_tokens_are_read_again(codec: PageCodec, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    pages, keys, values = (
        torch.randint(0, 256, shape, generator=generator).to(dtype)
        for shape in ((9, 2 * PAGE * HEAD_DIM), (30, HEAD_DIM), (30, HEAD_DIM))
    )
    before, slots = codec.unpack(pages.clone()), torch.randperm(9 * PAGE, generator=generator)[:30]
    codec.write_tokens(pages, slots, keys, values)
    again = torch.tensor([3, 0, 29, 3])
    for found, new in zip(codec.read_tokens(pages, slots[again]), (keys, values), strict=True):
        assert torch.equal(found, new[again])
    for found, old, new in zip(codec.unpack(pages), before, (keys, values), strict=True):
        expected = old.flatten(0, 1).clone()
        expected[slots] = new
        assert torch.equal(found.flatten(0, 1), expected)


@pytest.mark.parametrize("factor", [1.0, 0.25, 0.0321, 7.3])
def test_quantised_numbers_come_back(factor: float) -> None:
    """Every byte but NaN's; what lies beyond the range becomes its end."""
    stored = torch.tensor([byte for byte in range(256) if byte & 0x7F != 0x7F], dtype=torch.uint8)
    assert torch.equal(quantise(dequantise(stored, factor), factor, torch.uint8), stored)
    assert quantise(torch.tensor([1e9, -1e9]), factor, torch.uint8).tolist() == [0x7E, 0xFE]
    assert quantise(torch.tensor([1.5]), 1.0, torch.bfloat16).dtype == torch.bfloat16


@RULES
def test_merging_in_an_fp8_cache_quantises_anew(rule: str) -> None:
    """Kept tokens without a part keep their bytes; merged ones are the nearest bytes of the real numbers' merging."""
    cache, quant = PagedCache(150, uneven=True), QuantScales(1.0, 0.25, 4.0)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, cache.pages.shape, generator=generator) * 0x80
    stored = (torch.randint(0x20, 0x48, cache.pages.shape, generator=generator) + signs).to(torch.uint8)
    cache.pages = stored.to(DEVICE)
    compressor = cache.compressor()
    compressor.quant = [quant] * 4
    evidence = compressor.evidence(1, cache.geometry.pages_of(1, cache.blocks[:9]), 144)
    keys, values = evidence.keys, evidence.values
    plan = cache.start(compressor, words("d2o", 70, merge=rule))
    cache.feed(compressor, [150])
    cache.compact(compressor, plan)
    slot = compressor.slot("r")
    assert slot is not None
    kept = torch.stack(compressor.kept_positions("r")[1])
    dropped = torch.tensor([sorted({*range(144)} - {*row}) for row in kept.tolist()], device=DEVICE)
    expected = Merger(rule).merge(keys, values, kept, dropped)  # type: ignore[arg-type]
    for head in range(2):
        row, rank = torch.full((kept.shape[1],), 2 + head), torch.arange(kept.shape[1])
        at = compressor.tables.token_slots(slot, row.to(DEVICE), rank.to(DEVICE))
        parts = zip(cache.codec.unpack(cache.pages[at[::PAGE] // PAGE]), expected, (0.25, 4.0), strict=True)
        for found, merged, factor in parts:
            assert torch.equal(found.flatten(0, 1), quantise(merged[head], factor, torch.uint8))
    assert bool((expected[0] != keys[torch.arange(2, device=DEVICE)[:, None], kept]).any())
