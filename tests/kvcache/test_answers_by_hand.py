"""LRA, LFA, RaaS and H2O over several intervals, against one query after the other; the golden sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvcache.evidence import HISTORY, POSITIONS, LayerEvidence
from kvcache.policies.base import Policy
from kvcache.registry import make_policy
from tests.device import DEVICE
from tests.kvcache.answers import Growing, grown
from tests.kvcache.synthetic import PAGE, SCALE, SINKS, PagedCache
from tests.kvcache.usage_by_hand import Head

STEP = 32
"""Every query of an answer counts: the window is as large as the interval."""
ORDERS: dict[str, dict[str, Any]] = {
    "lra": {"policy": "lra", "budget": 80, "top": 3, "window": STEP},
    "lfa": {"policy": "lfa", "budget": 80, "top": 5, "window": STEP},
    "lra, pyramid": {"policy": "lra", "budget": 80, "top": 2, "window": STEP, "layers": "pyramid", "beta": 4},
    "raas": {"policy": "raas", "budget": 90, "window": STEP, "alpha": 0.03, "page": PAGE},
    "raas, small pages": {"policy": "raas", "budget": 90, "window": STEP, "alpha": 0.05, "page": 5},
    "raas, all pages": {"policy": "raas", "budget": 90, "window": STEP, "alpha": 0.0},
    "h2o": {"policy": "h2o", "budget": 70, "watch": STEP, "recent_share": 0.3},
    "h2o, no recent": {"policy": "h2o", "budget": 70, "watch": STEP, "recent_share": 0.0},
}


def by_hand(request: Growing, layer: int, head: int) -> list[tuple[list[int], dict[int, float], list[int]]]:
    """Of each compaction: what was kept, what was known of each token that was there, and all that stayed."""
    cache, order = request.cache, request.order
    group = cache.num_heads // cache.geometry.num_kv_heads
    queries = cache.queries[layer, :, head * group : (head + 1) * group].transpose(0, 1).tolist()
    arguments = {key: order[key] for key in ("top", "alpha") if key in order}
    page = order.get("page", 16) if order["policy"] == "raas" else 0
    hand = Head(queries, cache.keys[layer, head].tolist(), SCALE, order["policy"], page=page, **arguments)
    count, found = request.done[0].counts[layer][head] * PAGE, []
    pinned = cache.prompt_len if order["policy"] == "raas" else SINKS
    before = 0
    for compaction in request.done:
        boundary = compaction.boundary
        for position in range(before, boundary):
            hand.come(position)
        # Of a prompt its last queries; sums are of all. An interval is watched as a whole.
        first = 0 if order["policy"] == "h2o" and not before else max(before, boundary - STEP)
        for position in range(first, boundary):
            hand.ask(position)
        below = boundary // PAGE * PAGE
        tokens = count + boundary - below
        recent = int(tokens * order["recent_share"] + 1e-9) if order["policy"] == "h2o" else STEP
        known = {position: hand.value(position) for position in hand.held}
        found.append((hand.evict(below, count, pinned, boundary - recent), known, list(hand.held)))
        before = boundary
    return found


@pytest.mark.parametrize("prompt_len", [40, 128, 139, 143])
@pytest.mark.parametrize("name", ORDERS)
def test_every_interval_equals_one_query_after_the_other(name: str, prompt_len: int) -> None:
    order = {"sinks": SINKS, "interval": STEP, **ORDERS[name]}
    new = 80 + 6 * STEP
    cache = PagedCache(prompt_len, num_layers=2, new=new, uneven=True, seed=prompt_len)
    request = grown(cache, order, prompt_len + new)
    assert len(request.done) > 2
    for layer in range(cache.geometry.num_layers):
        for head in range(cache.geometry.num_kv_heads):
            hands = by_hand(request, layer, head)
            for number, (compaction, (kept, _, _)) in enumerate(zip(request.done, hands, strict=True)):
                where = f"layer {layer}, KV head {head}, compaction {number} at {compaction.boundary}"
                assert compaction.kept[layer][head].tolist() == kept, where
                if not number:
                    continue
                _, known, stayed = hands[number - 1]
                positions, history = compaction.shown[layer]
                assert history is not None
                old = positions[head] < request.done[number - 1].boundary
                assert positions[head][old].tolist() == stayed, where
                remembered = torch.tensor([known[position] for position in stayed])
                torch.testing.assert_close(history[head][old].cpu(), remembered, rtol=1e-4, atol=1e-4, msg=where)


# The golden sequences: tokens have a key of their own, and a query attends to the one that it names.


class Sequence:
    """Tokens that come one after the other; each asks for one token, and is one.

    A token has a name; its key is that name's, its query that of the name that it asks for.
    """

    def __init__(self, policy: dict[str, Any]) -> None:
        made = make_policy({"budget": 100, "sinks": 0, **policy})
        assert made is not None
        self.policy: Policy = made
        self.names: list[str] = []
        self.asked: list[str] = []
        self.history: torch.Tensor | None = None
        self.old = 0
        self.positions: list[int] = []

    def come(self, tokens: str, asks: str) -> None:
        """Tokens of these names, which ask for those."""
        self.positions += range(len(self.names), len(self.names) + len(tokens))
        self.names += tokens
        self.asked += asks

    def scores(self, window: int) -> dict[int, float]:
        """By position, of all that are there, after the last queries; what is remembered is known the next time."""
        keys = torch.stack([self._vector(self.names[position]) for position in self.positions])[None]
        queries = torch.stack([30 * self._vector(name) for name in self.asked[-window:]])[:, None]
        observed = {POSITIONS: torch.tensor(self.positions, device=DEVICE)[None]}
        if self.history is not None:
            unknown = torch.full((1, len(self.positions) - self.history.shape[1]), float("nan"), device=DEVICE)
            observed[HISTORY] = torch.cat([self.history, unknown], 1)
        evidence = LayerEvidence(0, keys, torch.zeros_like(keys), queries, 1.0, observed)
        scores = self.policy.scores(evidence)[0].tolist()
        self.history = self.policy.carry(evidence)
        return dict(zip(self.positions, scores, strict=True))

    @staticmethod
    def _vector(name: str) -> torch.Tensor:
        """Names are digits and letters; that of a token that nobody asks for is a dot."""
        vector = torch.zeros(40)
        if name != ".":
            vector["ABCDEFGH".index(name)] = 1.0
        return vector.to(DEVICE)


def first_out(scores: dict[int, float], *candidates: int) -> int:
    return min(candidates, key=lambda position: scores[position])


@pytest.mark.parametrize("compacted_after", [0, 1, 2, 3])
@pytest.mark.parametrize(("policy", "evicted"), [("lra", 0), ("lfa", 1)])
def test_uses_a_a_b_c(policy: str, evicted: int, compacted_after: int) -> None:
    """Attendre: of A, B and C, used A, A, B, C, least recently used is A; least frequently B, older than C. Whether a
    compaction came meanwhile makes no difference."""
    sequence = Sequence({"policy": policy, "top": 1})
    sequence.come("ABC", "ABC")
    uses = "AABC"
    if compacted_after:
        sequence.come("." * compacted_after, uses[:compacted_after])
        sequence.scores(compacted_after)
    sequence.come("." * (4 - compacted_after), uses[compacted_after:])
    scores = sequence.scores(4 - compacted_after)
    assert first_out(scores, 0, 1, 2) == evicted
    assert sorted([0, 1, 2], key=lambda position: scores[position]) == {"lra": [0, 1, 2], "lfa": [1, 2, 0]}[policy]


@pytest.mark.parametrize("compacted_after", [0, 1, 2, 3])
def test_pages_a_b_and_a_new_one(compacted_after: int) -> None:
    """RaaS: A was looked at at times 1 and 3 (twice, to fill a page of answers), B at 2, C is new at 4: B goes."""
    sequence = Sequence({"policy": "raas", "page": 4})
    sequence.come("A...B...", "........")
    looks = "ABAA"
    if compacted_after:
        sequence.come("." * compacted_after, looks[:compacted_after])
        sequence.scores(compacted_after)
    sequence.come("." * (4 - compacted_after) + "C...", looks[compacted_after:] + "CCCC")
    scores = sequence.scores(8 - compacted_after)
    pages = {name: [scores[first + i] for i in range(4)] for name, first in (("A", 0), ("B", 4), ("C", 12))}
    assert max(pages["B"]) < min(pages["A"]) <= max(pages["A"]) < min(pages["C"])


def test_looked_at_by_all_pages_go_first_in_first_out() -> None:
    """alpha 0: every page is looked at by every query, and of equal ones the older goes first."""
    sequence = Sequence({"policy": "raas", "page": 2, "alpha": 0.0})
    sequence.come("ABCDEF", "FEDCBA")
    scores = sequence.scores(1)
    assert [scores[i] for i in range(6)] == [0, 1, 2, 3, 4, 5]


def test_sums_go_on_over_the_answer() -> None:
    """H2O: what the prompt gave counts on; one that came since starts from what it gets."""
    sequence = Sequence({"policy": "h2o"})
    sequence.names, sequence.asked, sequence.positions = list("AB."), list("..."), [0, 1, 2]
    sequence.history = torch.tensor([[2.0, 0.5, 0.25]], device=DEVICE)
    sequence.come("C..", "CCB")
    scores = sequence.scores(3)
    assert [round(scores[i], 4) for i in range(6)] == [2.0, 1.5, 0.25, 2.0, 0.0, 0.0]
