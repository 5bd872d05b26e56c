"""The share of attention in the pages that Quest would read: by hand, and no more than the best choice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.quality.page_mass import PAGE, PageMass, full_layers, held, page_scores


def test_scores_between_bound_and_middle() -> None:
    """One page whose keys go from -1 to 3 and from 0 to 2, under the query (1, -2)."""
    page = torch.tensor([[-1.0, 2.0], [3.0, 0.0]]).repeat(PAGE // 2, 1).view(1, 1, PAGE, 2)
    query = torch.tensor([[[1.0, -2.0]]])
    found = [float(page_scores(query, page, spread)) for spread in (1.0, 0.5, 0.0)]
    assert found == [3.0, 1.0, -1.0], "the bound, half of the way, 1 * 1 - 2 * 1"


def test_what_is_held_is_what_the_chosen_pages_get() -> None:
    """Two pages are read beside the newest tokens."""
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(2, 403, 8, generator=generator), torch.randn(2, 3, 8, generator=generator)
    found = held(queries, keys, 0.5, 3 * PAGE, (1.0, 0.5))
    assert found.shape == (2, 3, 2)
    for head in range(2):
        given = torch.stack([(keys[head] @ query * 0.5).softmax(0) for query in queries[head]]).mean(0)
        far = torch.where((torch.arange(403) < 16) | (torch.arange(403) >= 275), 0, given)
        for kind, weights in enumerate((given, far)):
            for number, spread in enumerate((1.0, 0.5)):
                best = []
                for first in range(0, 400, PAGE):
                    low, high = keys[head, first : first + PAGE].amin(0), keys[head, first : first + PAGE].amax(0)
                    middle, half = (low + high) / 2, (high - low) / 2
                    best.append(sum(float(q @ middle + spread * q.abs() @ half) for q in queries[head]))
                chosen = sorted(range(len(best)), key=lambda page: -best[page])[:2]
                read = [place for page in chosen for place in range(page * PAGE, (page + 1) * PAGE)] + [400, 401, 402]
                assert float(found[kind, number, head]) == pytest.approx(float(weights[read].sum() / weights.sum()))
    assert bool((found[:, :2] <= found[:, 2:] + 1e-6).all()), "none is better than the best"


def test_layers_and_queries_that_count() -> None:
    mass = PageMass([1], 64, (1.0,))
    keys, queries = torch.randn(2, 300, 8), torch.randn(4, 300, 8)
    mass.see(0, queries, keys, keys, 1.0)
    assert mass.count == 0
    mass.see(1, queries, keys, keys, 1.0)
    assert mass.count == 2 * 8
    assert [line.split(" | ")[0] for line in mass.lines()[2:]] == ["| spread 1", "| best"]
    sliding = SimpleNamespace(
        num_hidden_layers=3, layer_types=["full_attention", "sliding_attention", "full_attention"]
    )
    assert full_layers(sliding) == [0, 2] and full_layers(SimpleNamespace(num_hidden_layers=4)) == [2, 3]
