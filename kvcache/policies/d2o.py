"""D2O."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kvcache.allocators.d2o import D2OLayers
from kvcache.merging import Merger
from kvcache.policies.base import PolicyArgs
from kvcache.policies.h2o import H2O


class D2O(H2O):
    """H2O with budgets by each layer's attention; dropped tokens that resemble a kept one are merged into it.

    A dropped token goes into the kept token of its KV head with the most similar key (by cosine), sinks and last
    tokens too, never into the prompt's tail, which is a partly filled page. It is merged if it is at least as similar
    as the mean over all of the layer's dropped tokens (plus `threshold`), each KV head by itself; the code compares
    means over query heads. The paper's threshold is a moving average over evictions; a prompt is compacted once, so the
    average has one term, as at the code's first eviction.

    `merge: paper` weighs by the exponentials of similarities, as the paper is remembered (not verified); `scatter` is
    the published code's mean; they differ. Keys are merged after RoPE, so a merged key's position is a mixture. The
    merged tokens are rounded to the cache's dtype; in an fp8 cache they are quantised with its scales.

    Formula:
        score_j as in h2o; u_i = max over kept j of cos(k_i, k_j) of a dropped token i, which goes to that j
        it is merged if u_i >= threshold + mean of u over the layer's dropped tokens; sums are over the i merged into j:
        merge "paper":   k_j <- (e k_j + sum exp(u_i) k_i) / (e + sum exp(u_i)), v_j alike
        merge "scatter": k_j <- (k_j + sum u_i k_i) / (1 + number of i), v_j alike
    """

    name = "d2o"
    title = "D2O: budgets by density, dropped tokens merged"
    paper = "arXiv 2406.13035"
    layers = D2OLayers
    watches_answers = False

    class Args(PolicyArgs):
        recent_share: float = Field(0.5, ge=0, le=1, description="Share of the budget that the last tokens get.")
        merge: Literal["paper", "scatter", "none"] = Field("paper", description="How dropped tokens are merged.")
        threshold: float = Field(
            0.0, ge=-2, le=2, description="Added to the mean similarity from which tokens are merged; 2 merges none."
        )

    args: Args  # type: ignore[assignment]

    @property
    def merger(self) -> Merger | None:
        return None if self.args.merge == "none" else Merger(self.args.merge, self.args.threshold)
