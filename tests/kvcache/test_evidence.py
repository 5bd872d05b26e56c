"""What a scorer is given: keys, values and queries out of pages, real numbers out of fp8, votes of the window."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

import kvcache.scorers
from kvcache.evidence import Evidence, LayerEvidence, PagedEvidence, QuantScales, dequantise
from kvcache.observers.window import QueryWindow
from kvcache.registry import make_policy
from kvcache.scorers import GroupReduce, GroupStage, Pooling, WindowReduce, window_attention, window_votes
from tests.kvcache import synthetic
from tests.kvcache.synthetic import HEAD_DIM, SCALE, WINDOW, words

# Bits are compared here; tests/kernels has what kernels make of pages on a GPU.
PagedCache = partial(synthetic.PagedCache, device="cpu")
PROMPT = 107
REDUCES: tuple[WindowReduce, ...] = ("mean", "max")
LAYER = 2


def paged(cache: synthetic.PagedCache, layer: int = LAYER, **changes: Any) -> PagedEvidence:
    n = cache.prompt_len
    known: dict[str, Any] = {
        "prompt_len": n,
        "raw_queries": cache.queries[layer, n - WINDOW : n],
        "scale": SCALE,
        "quant": QuantScales(),
    }
    blocks = cache.blocks[: -(-n // cache.page_size)]
    table = cache.geometry.pages_of(layer, blocks)
    return PagedEvidence(layer, cache.pages, table, cache.geometry, cache.codec, **{**known, **changes})


@pytest.mark.parametrize("block_major", [False, True])
@pytest.mark.parametrize("prompt_len", [1, 16, 106, 112])
def test_evidence_is_the_prompts_and_nothing_behind_it(prompt_len: int, block_major: bool) -> None:
    cache = PagedCache(prompt_len, num_heads=9, num_kv_heads=3, block_major=block_major, new=3)
    for layer in range(4):
        evidence = paged(cache, layer)
        assert torch.equal(evidence.keys, cache.keys[layer, :, :prompt_len])
        assert torch.equal(evidence.values, cache.values[layer, :, :prompt_len])
        assert evidence.shape == evidence.keys.shape == (3, prompt_len, HEAD_DIM)
        assert evidence.device == cache.pages.device and evidence.layer == layer and evidence.scale == SCALE
        direct = LayerEvidence(layer, evidence.keys, evidence.values, None, SCALE)
        assert direct.shape == evidence.shape and direct.device == evidence.device


@dataclass(frozen=True)
class Unreadable:
    """A codec for pages that must not be read."""

    def unpack(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("pages were read")


@pytest.mark.parametrize(
    ("policy", "reads"), [("streamingllm", False), ("random", False), ("l2norm", True), ("keydiff", True)]
)
def test_pages_are_read_only_for_scorers_that_ask(policy: str, reads: bool) -> None:
    cache = PagedCache(PROMPT)
    evidence = paged(cache)
    evidence.codec = Unreadable()  # type: ignore[assignment]
    built = make_policy(words(policy, 64))
    assert built is not None
    if reads:
        with pytest.raises(AssertionError, match="pages were read"):
            built.scores(evidence)
    else:
        assert built.scores(evidence).shape == (2, PROMPT)


@pytest.mark.parametrize("window_reduce", ["mean", "max"])
@pytest.mark.parametrize("group_stage", ["probabilities", "logits"])
@pytest.mark.parametrize("group_reduce", ["mean", "max", "sum"])
@pytest.mark.parametrize(("pooling", "kernel"), [("avg", 5), ("max", 21), ("none", 3)])
def test_votes_over_pages_are_those_over_gathered_keys(
    pooling: Pooling, kernel: int, group_reduce: GroupReduce, group_stage: GroupStage, window_reduce: WindowReduce
) -> None:
    cache = PagedCache(PROMPT, num_heads=6, num_kv_heads=2)
    options: dict[str, Any] = {"pooling": pooling, "kernel": kernel, "group_reduce": group_reduce}
    options |= {"group_stage": group_stage, "window_reduce": window_reduce}
    keys, values = cache.keys[LAYER, :, :PROMPT], cache.values[LAYER, :, :PROMPT]
    queries = cache.queries[LAYER, PROMPT - WINDOW : PROMPT]
    expected = window_attention(queries, keys, SCALE, **options)
    assert expected.shape == (2, PROMPT - WINDOW) and expected.dtype == torch.float32
    assert torch.equal(window_votes(paged(cache), **options), expected)
    assert torch.equal(window_votes(LayerEvidence(LAYER, keys, values, queries, SCALE), **options), expected)


def test_votes_have_the_defaults_of_the_paper() -> None:
    cache = PagedCache(PROMPT)
    queries, keys = cache.queries[LAYER, PROMPT - WINDOW : PROMPT], cache.keys[LAYER, :, :PROMPT]
    expected = window_attention(
        queries, keys, SCALE, pooling="avg", kernel=5, group_reduce="mean", group_stage="probabilities",
        window_reduce="mean",
    )  # fmt: skip
    assert torch.equal(window_votes(paged(cache)), expected)
    assert torch.equal(window_attention(queries, keys, SCALE), expected)


def test_the_strongest_query_of_the_window_votes() -> None:
    """One query that looks at a token is enough; in the mean it is one of many."""
    queries, keys = torch.zeros(8, 1, 4), torch.zeros(1, 40, 4)
    queries[5, 0, 1], keys[0, 17, 1] = 10.0, 10.0
    keys[0, 9, 0], queries[:, 0, 0] = 2.5, 2.5  # what all of them look at a little
    votes = {how: window_attention(queries, keys, 1.0, pooling="none", window_reduce=how)[0] for how in REDUCES}
    assert votes["max"][17] > 0.99 and votes["max"].argmax() == 17
    assert votes["mean"].argmax() == 9 and votes["mean"][17] < 0.15


@pytest.mark.parametrize("group_stage", ["probabilities", "logits"])
@pytest.mark.parametrize("heads_at_once", [0, 1, 2, 3])
def test_heads_may_be_taken_a_few_at_a_time(
    heads_at_once: int, group_stage: GroupStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only memory is bounded: one head is the least that is taken."""
    cache = PagedCache(PROMPT, num_heads=10, num_kv_heads=5)
    queries, keys = cache.queries[LAYER, PROMPT - WINDOW : PROMPT], cache.keys[LAYER, :, :PROMPT]
    whole = window_attention(queries, keys, SCALE, group_stage=group_stage)
    monkeypatch.setattr(kvcache.scorers, "_MAX_LOGITS", heads_at_once * 2 * WINDOW * PROMPT)
    torch.testing.assert_close(window_attention(queries, keys, SCALE, group_stage=group_stage), whole)


def test_attention_of_the_window_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores and shares look at the same numbers: of each query head, by KV head, not pooled."""
    cache = PagedCache(PROMPT, num_heads=6, num_kv_heads=2)
    evidence, keys = paged(cache), cache.keys[LAYER, :, :PROMPT]
    attention = evidence.window_attention
    assert evidence.window_attention is attention and attention.dtype == torch.float32
    for head in range(6):
        queries = cache.queries[LAYER, PROMPT - WINDOW : PROMPT, head : head + 1]
        one = window_attention(queries, keys[head // 3 : head // 3 + 1], SCALE, pooling="none")
        torch.testing.assert_close(attention[head], one[0])
    monkeypatch.setattr(kvcache.scorers, "reduced_probabilities", None)
    for policy, options in (("snapkv", {"window_reduce": "mean"}), ("tova", {})):
        built = make_policy(words(policy, 64, layers="zigzag", **options))
        assert built is not None
        built.scores(evidence)
        built.layer_allocator.statistic(evidence)


def test_attention_of_a_window_without_queries_is_an_error() -> None:
    with pytest.raises(ValueError, match="last queries are needed and were not kept"):
        _ = paged(PagedCache(PROMPT), raw_queries=None).window_attention


@pytest.mark.parametrize("needs", [[0], [1], [2], [0, 1], [1, 0], [2, 0], [0, 1, 2], [0, 2, 1]])
def test_the_costliest_evidence_includes_all(needs: list[int]) -> None:
    kinds = [Evidence.NONE, Evidence.KEYS, Evidence.WINDOW_QUERIES]
    assert Evidence.costliest(*(kinds[need] for need in needs)) is kinds[max(needs)]


def test_votes_without_queries_are_an_error() -> None:
    cache = PagedCache(PROMPT)
    keys = cache.keys[LAYER, :, :PROMPT]
    for evidence in (paged(cache, raw_queries=None), LayerEvidence(LAYER, keys, keys, None, SCALE)):
        assert evidence.window_queries is None
        with pytest.raises(ValueError, match="last queries are needed and were not kept"):
            window_votes(evidence)


def fp8(byte: int) -> float:
    """E4M3: no infinities, one NaN of each sign."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def real(stored: torch.Tensor, factor: float) -> torch.Tensor:
    """Bytes as real numbers, times a factor, by a table."""
    return torch.tensor([fp8(byte) for byte in range(256)])[stored.long()] * factor


@pytest.mark.parametrize("typed", [False, True], ids=["bytes", "fp8"])
@pytest.mark.parametrize(
    "quant", [QuantScales(), QuantScales(0.5, 0.25, 4.0), QuantScales(0.0713, 0.0321, 1.37)], ids=str
)
def test_fp8_pages_give_real_numbers(quant: QuantScales, typed: bool) -> None:
    """Every byte there is, NaN too; queries, keys and values have factors of their own."""
    cache = PagedCache(PROMPT, num_heads=6, num_kv_heads=2, block_major=True)
    generator = torch.Generator().manual_seed(0)
    cache.pages = torch.randint(0, 256, cache.pages.shape, dtype=torch.uint8, generator=generator)
    queries = torch.randint(0, 256, (WINDOW, 6, HEAD_DIM), dtype=torch.uint8, generator=generator)
    pages = cache.geometry.pages_of(LAYER, cache.blocks)
    keys, values = (part.flatten(1, 2)[:, :PROMPT] for part in cache.codec.unpack(cache.pages[pages]))
    assert len(torch.cat([keys, values]).unique()) == 256
    evidence = paged(cache, raw_queries=queries.view(torch.float8_e4m3fn) if typed else queries, quant=quant)
    if typed:
        evidence.pages = cache.pages.view(torch.float8_e4m3fn)
    assert evidence.shape == (2, PROMPT, HEAD_DIM)
    found = (evidence.keys, evidence.values, evidence.window_queries)
    expected = (real(keys, quant.key), real(values, quant.value), real(queries, quant.query))
    for got, wanted in zip(found, expected, strict=True):
        assert got is not None and got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def test_votes_over_fp8_pages() -> None:
    """The factors of queries and keys are part of the logits."""
    cache = PagedCache(PROMPT, num_heads=6, num_kv_heads=2)
    generator = torch.Generator().manual_seed(0)
    small = torch.arange(256)[torch.tensor([fp8(byte) for byte in range(256)]).abs() < 8]
    cache.pages = small[torch.randint(0, len(small), cache.pages.shape, generator=generator)].to(torch.uint8)
    raw = small[torch.randint(0, len(small), (WINDOW, 6, HEAD_DIM), generator=generator)].to(torch.uint8)
    quant = QuantScales(0.5, 0.25, 9.0)
    evidence = paged(cache, raw_queries=raw.view(torch.float8_e4m3fn), quant=quant)
    stored = cache.codec.unpack(cache.pages[cache.geometry.pages_of(LAYER, cache.blocks)])[0]
    keys = real(stored.flatten(1, 2)[:, :PROMPT], quant.key)
    expected = window_attention(real(raw, quant.query), keys, SCALE)
    assert torch.equal(window_votes(evidence), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_not_quantised_stay_as_they_are(dtype: torch.dtype) -> None:
    stored = torch.randn(3, 4).to(dtype)
    assert dequantise(stored, 1.0) is stored


def test_window_takes_memory_with_its_first_query() -> None:
    """Its dtype and sizes are those of the queries; every query has its place."""
    window = QueryWindow(num_layers=2, window=4, prompt_len=10)
    assert (window.first, window.missing) == (6, 8)
    with pytest.raises(RuntimeError, match="no query of the window has come yet"):
        _ = window.queries
    queries = torch.randn(2, 10, 3, HEAD_DIM).bfloat16()
    for layer, first, last, missing in [(1, 6, 8, 6), (0, 6, 7, 5), (0, 7, 10, 2), (1, 8, 9, 1), (1, 9, 10, 0)]:
        window.record(layer, first, queries[layer, first:last])
        assert window.missing == missing
        assert window.queries.shape == (2, 4, 3, HEAD_DIM) and window.queries.dtype == torch.bfloat16
    assert torch.equal(window.queries, queries[:, 6:])
    assert window.overlap(0, 6) == (6, 6) and window.overlap(5, 8) == (6, 8) and window.overlap(9, 30) == (9, 10)


def test_window_keeps_fp8_queries() -> None:
    queries = torch.randn(4, 2, HEAD_DIM).to(torch.float8_e4m3fn)
    window = QueryWindow(num_layers=1, window=4, prompt_len=4)
    window.record(0, 0, queries)
    assert window.queries.dtype == torch.float8_e4m3fn
    assert torch.equal(window.queries[0].float(), queries.float())
