"""Numbers worked out by hand or with the papers' own code."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.allocation import pyramid_bounds, pyramid_shares
from kvcache.budget import Budget
from kvcache.evidence import LayerEvidence
from kvcache.policies.l2norm import L2Norm
from kvcache.policies.snapkv import SnapKV
from kvcache.scorers import Pooling, pool, reduce_group, window_attention
from kvcache.selection import force, keep_top
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
    scores = torch.tensor([0.3, 0.0, 0.0, 0.2, 0.0, 0.1])
    torch.testing.assert_close(pool(scores, how, kernel), torch.tensor(expected))
    both = pool(torch.stack([scores, scores.flip(0)]), how, kernel)
    torch.testing.assert_close(both, torch.tensor([expected, expected[::-1]]))


def test_group_reduction() -> None:
    scores = torch.tensor([[1.0, 2.0], [3.0, -2.0]])
    assert reduce_group(scores, "mean", 0).tolist() == [2.0, 0.0]
    assert reduce_group(scores, "max", 0).tolist() == [3.0, 2.0]
    assert reduce_group(scores, "sum", 0).tolist() == [4.0, 0.0]


def test_kernel_and_window_of_one_are_the_last_querys_probabilities() -> None:
    """TOVA's scores per head."""
    torch.manual_seed(0)
    queries, keys = torch.randn(1, 3, 8), torch.randn(3, 20, 8)
    votes = window_attention(queries, keys, 0.3, kernel=1)
    probabilities = (torch.einsum("hd,hnd->hn", queries[0], keys) * 0.3).softmax(-1)
    torch.testing.assert_close(votes, probabilities[:, :19])


def test_window_queries_do_not_see_their_future() -> None:
    """A key after the first window query that would draw all its attention changes nothing for that query."""
    queries, keys = torch.ones(2, 1, 4), torch.zeros(1, 6, 4)
    keys[0, 5] = 100.0
    votes = window_attention(queries, keys, 1.0, pooling="none")
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


def test_short_prompts_are_shared_uniformly() -> None:
    assert pyramid_shares(32, 2048, 4000, 8, 20).tolist() == [2048.0] * 32
    assert pyramid_shares(32, 2048, 4079, 8, 20).tolist() == [2048.0] * 32
    assert pyramid_shares(32, 2048, 4080, 8, 20)[0] == 3978 + 8
    assert pyramid_shares(1, 128, 8000, 8, 20).tolist() == [128.0]
    assert pyramid_shares(4, 128, 8000, 8, 1).tolist() == [128.0] * 4


@pytest.mark.parametrize(("keep", "expected"), [("50%", [1, 2]), ("30%", [0, 2]), ("75%", [0, 1, 2])])
def test_l2norm_keeps_the_smallest_norms(keep: str, expected: list[int]) -> None:
    norms = [3.0, 1.0, 2.0, 5.0] if keep != "30%" else [1.0, 3.0, 2.0, 5.0]
    keys = torch.tensor([[[norm, 0.0], [0.0, -norm]][i % 2] for i, norm in enumerate(norms)])[None]
    policy = L2Norm(L2Norm.Args.model_validate({"sinks": 0, "recent": 0}))
    scores = policy.scores(LayerEvidence(0, keys, keys, None, 1.0))
    kept = keep_top(force(scores, 0, 0), torch.tensor([Budget.parse(keep).resolve(4)]))
    assert kept[0].tolist() == expected


def test_ties_go_to_the_lower_position() -> None:
    assert keep_top(torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]]), torch.tensor([3]))[0].tolist() == [0, 1, 3]


def test_forced_tokens_come_before_nan_and_nan_before_all_else() -> None:
    scores = torch.tensor([[math.nan, math.nan, 3e38, math.inf, -math.inf, 0.0]])
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
