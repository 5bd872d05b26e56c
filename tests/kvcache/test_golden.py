"""Numbers worked out by hand or with the papers' own code."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcache.policies.rkv
from kvcache.allocation import pyramid_bounds, pyramid_shares
from kvcache.allocators.adakv import AdaHeads
from kvcache.allocators.zigzag import ZigZagLayers, tokens_for_mass
from kvcache.allocators.zipvl import ZipVLLayers
from kvcache.budget import Budget
from kvcache.evidence import LayerEvidence
from kvcache.policies.criticalkv import CriticalKV
from kvcache.policies.keydiff import KeyDiff
from kvcache.policies.l2norm import L2Norm
from kvcache.policies.rkv import RKV, importance, redundancy
from kvcache.policies.snapkv import SnapKV
from kvcache.policies.tova import TOVA
from kvcache.registry import make_policy
from kvcache.scorers import Pooling, pool, reduce_group, window_attention
from kvcache.selection import force, keep_top
from tests.device import DEVICE
from tests.kvcache.synthetic import PagedCache, compress, positions_of, words


def test_streamingllm_of_ten_tokens() -> None:
    run = compress(PagedCache(10, page_size=1), words("streamingllm", 5, sinks=2))
    assert positions_of(run.kept) == [[[0, 1, 7, 8, 9]] * 2] * 4


@pytest.mark.parametrize(
    ("how", "kernel", "expected"),
    [
        ("avg", 3, [0.1, 0.1, 0.2 / 3, 0.2 / 3, 0.1, 0.1 / 3]),
        ("max", 3, [0.3, 0.3, 0.2, 0.2, 0.2, 0.1]),
        ("avg", 5, [0.06, 0.1, 0.1, 0.06, 0.06, 0.06]),
        ("avg", 1, [0.3, 0.0, 0.0, 0.2, 0.0, 0.1]),
        ("max", 1, [0.3, 0.0, 0.0, 0.2, 0.0, 0.1]),
        ("none", 5, [0.3, 0.0, 0.0, 0.2, 0.0, 0.1]),
    ],
)
def test_pooling(how: Pooling, kernel: int, expected: list[float]) -> None:
    scores = torch.tensor([0.3, 0.0, 0.0, 0.2, 0.0, 0.1], device=DEVICE)
    torch.testing.assert_close(pool(scores, how, kernel).cpu(), torch.tensor(expected))
    both = pool(torch.stack([scores, scores.flip(0)]), how, kernel).cpu()
    torch.testing.assert_close(both, torch.tensor([expected, expected[::-1]]))


def test_group_reduction() -> None:
    scores = torch.tensor([[1.0, 2.0], [3.0, -2.0]])
    assert reduce_group(scores, "mean", 0).tolist() == [2.0, 0.0]
    assert reduce_group(scores, "max", 0).tolist() == [3.0, 2.0]
    assert reduce_group(scores, "sum", 0).tolist() == [4.0, 0.0]


def test_kernel_and_window_of_one_are_the_last_querys_probabilities() -> None:
    """TOVA's scores per head."""
    torch.manual_seed(0)
    queries, keys = torch.randn(1, 3, 8).to(DEVICE), torch.randn(3, 20, 8).to(DEVICE)
    votes = window_attention(queries, keys, 0.3, kernel=1)
    probabilities = (torch.einsum("hd,hnd->hn", queries[0], keys) * 0.3).softmax(-1)
    torch.testing.assert_close(votes, probabilities[:, :19])


def test_window_queries_do_not_see_their_future() -> None:
    """A key after the first window query that would draw all its attention changes nothing for that query."""
    queries, keys = torch.ones(2, 1, 4, device=DEVICE), torch.zeros(1, 6, 4, device=DEVICE)
    keys[0, 5] = 100.0
    votes = window_attention(queries, keys, 1.0, pooling="none").cpu()
    torch.testing.assert_close(votes, torch.full((1, 4), (1 / 5 + 0) / 2))


def test_scores_are_accumulated_in_float32() -> None:
    votes = window_attention(torch.randn(8, 4, 8).bfloat16(), torch.randn(2, 40, 8).bfloat16(), 0.3)
    assert votes.dtype == torch.float32 and votes.shape == (2, 32)


def test_snapkv_without_queries_is_an_error() -> None:
    keys = torch.zeros(1, 8, 4)
    with pytest.raises(ValueError, match="the prompt's last queries are needed and were not kept"):
        SnapKV(SnapKV.Args.model_validate({})).scores(LayerEvidence(0, keys, keys, None, 1.0))


def published_pyramid(cap: int, window: int, beta: int, num_layers: int, prompt_len: int) -> list[int]:
    """PyramidKV's own integer rule: scored tokens by layer."""
    base = cap - window
    if prompt_len < 2 * base:
        return [base] * num_layers
    least = base // beta
    most = 2 * base - least
    if most >= prompt_len - window:
        most, least = prompt_len - window, 2 * base - (prompt_len - window)
    step = (most - least) // (num_layers - 1)
    return [most - layer * step for layer in range(num_layers)]


@pytest.mark.parametrize(
    ("cap", "num_layers", "first", "published"),
    [(128, 32, 234, 4016), (128, 80, 234, 12_400), (2048, 32, 3978, 65_296)],
)
def test_pyramid_spends_its_budget_where_the_published_rule_overspends(
    cap: int, num_layers: int, first: int, published: int
) -> None:
    assert sum(published_pyramid(cap, 8, 20, num_layers, 8000)) == published
    nominal = (cap - 8) * num_layers
    assert nominal == {4016: 3840, 12_400: 9600, 65_296: 65_280}[published]
    ours = pyramid_shares(num_layers, cap, 8000, 8, 20) - 8
    assert float(ours.sum()) == pytest.approx(nominal, abs=1e-6)
    assert ours[0] == first and ours[-1] == (cap - 8) // 20
    assert torch.allclose(ours.diff(), ours.diff()[0])


@pytest.mark.parametrize(
    ("scored", "room", "expected"),
    [
        (120, 7992, (234, 6)),
        (2040, 7992, (3978, 102)),
        (500, 1000 - 64, (936, 64)),  # kvpress: T=1000, half; the cap is w + T / 2, so T / 2 tokens are scored
        (2048, 4096 - 64, (3994, 102)),  # kvpress: T=4096, half
        (120, 234, (234, 6)),
        (120, 233, (233, 7)),
        (120, 121, (121, 119)),
    ],
)
def test_pyramid_bounds(scored: int, room: int, expected: tuple[int, int]) -> None:
    assert pyramid_bounds(scored, room, 20) == expected
    assert sum(expected) == 2 * scored


@pytest.mark.parametrize(
    ("words", "ends"),
    [
        ({"policy": "pyramidkv", "window": 100}, (490, 110)),
        ({"policy": "tova", "layers": "pyramid", "window": 100}, (490, 110)),
        ({"policy": "l2norm", "layers": "pyramid", "recent": 100}, (490, 110)),
        ({"policy": "streamingllm", "layers": "pyramid"}, (585, 15)),
    ],
)
def test_pyramid_leaves_out_the_last_tokens_that_stay_anyway(words: dict[str, object], ends: tuple[int, int]) -> None:
    policy = make_policy(words)
    assert policy is not None
    shares = policy.layer_allocator.shares(5, 300, 2000)
    assert shares[[0, -1]].tolist() == list(ends)
    assert float(shares.sum()) == pytest.approx(1500)


def test_short_prompts_are_shared_uniformly() -> None:
    assert pyramid_shares(32, 2048, 4000, 8, 20).tolist() == [2048.0] * 32
    assert pyramid_shares(32, 2048, 4079, 8, 20).tolist() == [2048.0] * 32
    assert pyramid_shares(32, 2048, 4080, 8, 20)[0] == 3978 + 8
    assert pyramid_shares(1, 128, 8000, 8, 20).tolist() == [128.0]
    assert pyramid_shares(4, 128, 8000, 8, 1).tolist() == [128.0] * 4


@pytest.mark.parametrize(("keep", "expected"), [("50%", [1, 2]), ("30%", [0, 2]), ("75%", [0, 1, 2])])
def test_l2norm_keeps_the_smallest_norms(keep: str, expected: list[int]) -> None:
    norms = [3.0, 1.0, 2.0, 5.0] if keep != "30%" else [1.0, 3.0, 2.0, 5.0]
    keys = torch.tensor([[[norm, 0.0], [0.0, -norm]][i % 2] for i, norm in enumerate(norms)], device=DEVICE)[None]
    policy = L2Norm(L2Norm.Args.model_validate({"sinks": 0, "recent": 0}))
    scores = policy.scores(LayerEvidence(0, keys, keys, None, 1.0))
    kept = keep_top(force(scores, 0, 0), torch.tensor([Budget.parse(keep).resolve(4)]))
    assert kept[0].tolist() == expected


LMBA = [
    ([0.5, 0.3, 0.15, 0.05], 0.9, 3),
    ([0.5, 0.3, 0.1, 0.1], 0.9, 3),  # in floating point a little less than 0.9
    ([0.97, 0.01, 0.01, 0.01], 0.9, 1),
    ([0.01, 0.01, 0.97, 0.01], 0.9, 1),
    ([0.25, 0.15, 0.025, 0.075], 0.9, 3),  # half the mass lies elsewhere: shares of what is here
    ([0.25] * 4, 1.0, 4),
    ([0.25] * 4, 0.5, 2),
    ([0.25] * 4, 0.51, 3),
    ([1.0, 0.0, 0.0, 0.0], 1.0, 1),
    ([0.0] * 4, 0.9, 1),
    ([1.0], 1.0, 1),
    ([1 / 25] * 25, 0.2, 5),  # five of them sum to less than a fifth of the whole in float32
]


@pytest.mark.parametrize(("row", "mass", "count"), LMBA)
def test_lmba(row: list[float], mass: float, count: int) -> None:
    found = tokens_for_mass(torch.tensor([row, row[::-1]], device=DEVICE), mass)
    assert found.dtype == torch.int64 and found.tolist() == [count, count]


def test_lmba_of_long_rows() -> None:
    """Sums of many small numbers: 90 % of 100,000 equal ones, not a token more than rounding explains."""
    assert abs(int(tokens_for_mass(torch.full((100_000,), 1e-5, device=DEVICE), 0.9)) - 90_000) <= 50


def attention(*rows: list[float], values: torch.Tensor | None = None) -> LayerEvidence:
    """One layer whose window gives this to the tokens before it, by query head; two query heads a KV head."""
    keys = torch.zeros(max(1, len(rows) // 2), len(rows[0]) + 1, 4, device=DEVICE)
    evidence = LayerEvidence(0, keys, keys if values is None else values, None, 1.0)
    evidence.__dict__["window_attention"] = torch.tensor(rows, device=DEVICE)
    return evidence


def test_zigzag_shares() -> None:
    allocator = ZigZagLayers(ZigZagLayers.Args.model_validate({"bound": 0.5}))
    lmba = torch.tensor([100.0, 50, 25, 25], dtype=torch.float64)
    assert allocator.shares(4, 128, 1000, lmba).tolist() == [192, 128, 96, 96]
    assert allocator.shares(1, 128, 1000, lmba[:1]).tolist() == [128]
    alike = ZigZagLayers(ZigZagLayers.Args.model_validate({"bound": 1.0}))
    assert alike.shares(4, 128, 1000, lmba).tolist() == [128] * 4
    free = ZigZagLayers(ZigZagLayers.Args.model_validate({"bound": 0.0}))
    assert free.shares(4, 128, 1000, lmba).tolist() == [256, 128, 64, 64]


def test_zigzag_measures_heads_and_zipvl_their_mean() -> None:
    """Two heads that each need one token need two together."""
    evidence = attention([0.97, 0.01, 0.01, 0.01], [0.01, 0.97, 0.01, 0.01])
    zigzag, zipvl = (
        ZigZagLayers(ZigZagLayers.Args.model_validate({})),
        ZipVLLayers(ZipVLLayers.Args.model_validate({"tau": 0.9})),
    )
    assert (float(zigzag.statistic(evidence)), float(zipvl.statistic(evidence))) == (1, 2)
    assert float(zigzag.statistic(attention([0.97, 0.01, 0.01, 0.01], [0.25] * 4))) == 2.5


@pytest.mark.parametrize(("tau", "count"), [(0.7, 2), (0.85, 3), (0.9, 4), (0.975, 5)])
def test_zipvl_counts(tau: float, count: int) -> None:
    allocator = ZipVLLayers(ZipVLLayers.Args.model_validate({"tau": tau}))
    statistic = allocator.statistic(attention([0.4, 0.3, 0.15, 0.1, 0.05]))
    assert statistic.shape == () and statistic.is_floating_point() and float(statistic) == count
    counts = torch.tensor([2.0, 3, 4, 5, 2], dtype=torch.float64)
    assert allocator.shares(5, 64, 1000, counts).tolist() == pytest.approx([40, 60, 80, 100, 40])


ADA = [[0.30, 0.25, 0.20, 0.15, 0.06, 0.02, 0.01, 0.01], [0.93, 0.02, 0.015, 0.01, 0.01, 0.005, 0.005, 0.005]]


@pytest.mark.parametrize(("floor", "counts"), [(0, [6, 2]), (0.2, [6, 2]), (0.5, [6, 2]), (0.75, [5, 3]), (1, [4, 4])])
def test_adakv_counts(floor: float, counts: list[int]) -> None:
    """The paper's code loses a token at 0.2; this rule, kvpress's, none."""
    allocator, scores = AdaHeads(AdaHeads.Args.model_validate({"floor": floor})), torch.tensor(ADA, device=DEVICE)
    before = scores.clone()
    assert allocator.shares(scores, 4).tolist() == counts
    assert allocator.shares(scores.flip(0, 1), 4).tolist() == counts[::-1]
    assert torch.equal(scores, before)
    assert allocator.shares(scores, 8).tolist() == [8, 8] and allocator.shares(scores, 0).tolist() == [0, 0]
    kept = keep_top(scores, torch.tensor([6, 2]))
    lost = [1 - float(row[positions[positions < 8]].sum()) for row, positions in zip(scores, kept, strict=True)]
    assert lost == pytest.approx([0.02, 0.05], abs=1e-6)


@pytest.mark.parametrize(("first_stage", "kept"), [(0.67, [0, 3]), (0, [2, 3]), (1, [0, 1])])
def test_criticalkv_of_four_tokens(first_stage: float, kept: list[int]) -> None:
    """Two of four tokens stay beside the window of one, which counts as one of the first stage: its share of a budget
    of three is one other token, none or two."""
    votes, norms = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.1, 1, 2, 10, 1], device=DEVICE)
    keys = torch.cat([votes.log(), torch.tensor([-50.0])])[None, :, None].to(DEVICE)
    values = norms[None, :, None] * torch.tensor([0.5, -0.5], device=DEVICE)
    evidence = LayerEvidence(0, keys, values, torch.ones(1, 1, 1, device=DEVICE), 1.0)
    words = {"budget": 3, "window": 1, "pooling": "none", "first_stage": first_stage}
    scores = CriticalKV(CriticalKV.Args.model_validate(words)).scores(evidence)
    assert keep_top(force(scores, 0, 1), torch.tensor([3])).tolist() == [[*kept, 4]]
    if not first_stage:
        torch.testing.assert_close(scores[0, :4].cpu(), torch.tensor([0.04001, 0.3001, 0.4002, 1.001]) / 1.001)


def test_criticalkv_with_a_first_stage_beyond_the_prompt_goes_by_votes() -> None:
    torch.manual_seed(0)
    keys, values, queries = (torch.randn(shape).to(DEVICE) for shape in ((1, 50, 8), (1, 50, 8), (2, 1, 8)))
    evidence = LayerEvidence(0, keys, values, queries, 1.0)
    words = {"budget": 1024, "window": 2, "pooling": "none"}
    votes, scores = (policy(policy.Args.model_validate(words)).scores(evidence) for policy in (SnapKV, CriticalKV))
    assert scores.argsort(-1).tolist() == votes.argsort(-1).tolist()


def test_tova_averages_heads() -> None:
    """Alone, the first head would drop token 2 and the second token 0."""
    scores = TOVA(TOVA.Args.model_validate({})).scores(attention([0.5, 0.3, 0.2], [0.1, 0.2, 0.7]))
    torch.testing.assert_close(scores.cpu(), torch.tensor([[0.3, 0.25, 0.45, math.inf]]))
    assert keep_top(scores, torch.tensor([3])).tolist() == [[0, 2, 3]]


def test_tovas_votes_of_one_head_are_snapkvs_without_pooling() -> None:
    torch.manual_seed(0)
    keys = torch.randn(1, 30, 8).to(DEVICE)
    evidence = LayerEvidence(0, keys, keys, torch.randn(1, 1, 8).to(DEVICE), 0.3)
    snapkv = SnapKV(SnapKV.Args.model_validate({"window": 1, "kernel": 1}))
    assert torch.equal(TOVA(TOVA.Args.model_validate({})).scores(evidence), snapkv.scores(evidence))


def test_tova_keeps_the_same_tokens_in_all_heads_of_a_layer() -> None:
    kept = positions_of(compress(PagedCache(150, num_heads=8, num_kv_heads=4, uneven=True), words("tova", 70)).kept)
    assert all(heads == [heads[0]] * 4 for heads in kept)
    assert len({tuple(heads[0]) for heads in kept}) == len(kept)


def test_keydiff_keeps_the_outlier_and_identical_keys_tie() -> None:
    keys = torch.tensor([[3.0, 4.0]], device=DEVICE).repeat(12, 1)
    keys[7] = torch.tensor([4.0, -3.0], device=DEVICE)
    keys[5] *= 9.0  # lengths don't count
    scores = KeyDiff(KeyDiff.Args.model_validate({})).scores(LayerEvidence(0, keys[None], keys[None], None, 1.0))[0]
    others = torch.cat([scores[:7], scores[8:]])
    torch.testing.assert_close(others, others[:1].expand(11), rtol=1e-6, atol=0)
    kept = keep_top(force(scores[None], 0, 0), torch.tensor([1]))
    assert kept.tolist() == [[7]]
    # The anchor is the mean of eleven (3, 4) / 5 and one (4, -3) / 5: cosines 11 and 1 of the root of 122.
    assert [float(scores[0]), float(scores[7])] == pytest.approx([-11 / 122**0.5, -1 / 122**0.5])


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_rkv_spares_the_newest_of_like_keys(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A17: of three duplicates the newest costs nothing, the oldest most; a block of rows may have any size."""
    monkeypatch.setattr(kvcache.policies.rkv, "_MAX_COSINES", 4 * rows)
    keys = torch.tensor([[1.0, 0.0], [1, 0], [0, 1], [1, 0]], device=DEVICE)
    expected = torch.tensor([0.5, 0.25, 0.0, 0.0]).softmax(-1)
    torch.testing.assert_close(redundancy(keys[None], 0.5)[0].cpu(), expected)
    torch.testing.assert_close(expected, torch.tensor([0.334, 0.260, 0.203, 0.203]), atol=1e-3, rtol=0)
    longer = keys * torch.tensor([[9.0], [1], [2], [0.1]], device=DEVICE)
    torch.testing.assert_close(redundancy(longer[None], 0.5)[0].cpu(), expected)


def test_rkv_rows_without_a_similar_key_spare_none() -> None:
    """The published code would take the first key's cosine with each of the others for zero."""
    keys = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], device=DEVICE)
    row = torch.tensor([0.6, 0.6 + 0.8, 0.8]) / 3
    torch.testing.assert_close(redundancy(keys[None], 0.9)[0].cpu(), row.softmax(-1))
    spared = torch.tensor([0.6, 0.0, 0.0]) / 3  # rows 0, 1 and 2 lose keys 1, 2 and 1
    torch.testing.assert_close(redundancy(keys[None], 0.5)[0].cpu(), spared.softmax(-1))


def test_rkv_importance_takes_the_largest_logit_of_a_group() -> None:
    """Over older keys alone: the window's own keys take no attention from them."""
    queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], device=DEVICE)
    keys = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 1.0]], device=DEVICE)
    found = importance(queries[:, None], keys[None], 1.0)[0].cpu()
    torch.testing.assert_close(found, torch.tensor([2.0, 3.0, 1.0]).softmax(-1))
    values = torch.zeros(1, 4, 2, device=DEVICE)
    evidence = LayerEvidence(0, torch.cat((keys, 50 * keys[:1]))[None], values, queries, 1.0)
    scores = RKV(RKV.Args.model_validate({"window": 1, "mix": 1.0, "kernel": 1})).scores(evidence)
    torch.testing.assert_close(scores.cpu(), torch.tensor([[*found.tolist(), math.inf]]))


def test_rkv_needs_no_more_than_keys_and_queries() -> None:
    """Kept and new tokens of an answer are scored by the same call: nothing of the prompt is asked for."""
    torch.manual_seed(0)
    policy = RKV(RKV.Args.model_validate({}))
    keys, queries = torch.randn(2, 50, 8).to(DEVICE), torch.randn(8, 4, 8).to(DEVICE)
    evidence = LayerEvidence(0, keys, torch.zeros(0), queries, 0.3)
    scores = policy.scores(evidence)
    assert scores.shape == (2, 50) and scores.dtype == torch.float32
    assert scores[:, :42].isfinite().all() and scores[:, 42:].isposinf().all()
    evidence.window_queries = None
    with pytest.raises(ValueError, match="last queries are needed"):
        policy.scores(evidence)


def test_ties_go_to_the_lower_position() -> None:
    scores = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]], device=DEVICE)
    assert keep_top(scores, torch.tensor([3]))[0].tolist() == [0, 1, 3]


def test_forced_tokens_come_before_nan_and_nan_before_all_else() -> None:
    scores = torch.tensor([[math.nan, math.nan, 3e38, math.inf, -math.inf, 0.0]], device=DEVICE)
    forced = force(scores, 0, 1)
    assert scores.isnan().sum() == 2, "the scores themselves stay as they are"
    kept = [keep_top(forced, torch.tensor([n]))[0].tolist() for n in (1, 3, 5)]
    assert kept == [[5], [0, 1, 5], [0, 1, 2, 3, 5]]
    assert force(torch.zeros(1, 4), 2, 0).isinf().tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(
    ("value", "prompt_len", "tokens"),
    [
        (512, 9, 512), ("512", 9, 512), (" 512 ", 9, 512), ("25%", 1000, 250), (" 12.5 % ", 1000, 125),
        ("100%", 77, 77), ("30%", 4, 2), ("29%", 100, 29), ("7%", 100, 7), ("57%", 100, 57), ("0.001%", 5, 1),
        (Budget(tokens=3), 9, 3), (Budget(ratio=0.5), 9, 5),
    ],
)  # fmt: skip
def test_budget_forms(value: object, prompt_len: int, tokens: int) -> None:
    assert Budget.parse(value).resolve(prompt_len) == tokens


@pytest.mark.parametrize(
    "value",
    [0, -1, "0", "-5", True, 1.5, 512.0, "1.5", "0%", "0.0%", "-5%", "100.1%", "101%", "%", "", "abc", "1e3", "1e-3%",
     "25 percent", "25%%", None, [512], {"tokens": 3}],
)  # fmt: skip
def test_budget_errors_name_what_is_allowed(value: object) -> None:
    with pytest.raises(ValueError, match="whole number of tokens >= 1, or a share of the prompt such as '25%'"):
        Budget.parse(value)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 10_000), st.integers(1, 2_000_000))
def test_ratios_round_up_exactly_and_come_back_from_text(hundredths: int, prompt_len: int) -> None:
    budget = Budget.parse(f"{hundredths / 100:.2f}%")
    assert budget.resolve(prompt_len) == math.ceil(Fraction(hundredths, 10_000) * prompt_len)
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize("text", ["0.00001%", "12.34567%", "33.333333333%", "99.999999%", "100%", "29%", "7"])
def test_budget_comes_back_from_its_text(text: str) -> None:
    assert str(Budget.parse(text)) == text
