"""What each policy has to keep, written out in loops from the papers, without a line of the code under test."""

from __future__ import annotations

import cmath
import math
from fractions import Fraction
from itertools import pairwise

Matrix = list[list[float]]


def reduce(values: list[float], how: str) -> float:
    if how == "max":
        return max(values)
    return sum(values) / (len(values) if how == "mean" else 1)


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    total = sum(weights)
    return [weight / total for weight in weights]


def pooled(scores: list[float], how: str, kernel: int) -> list[float]:
    """Stride 1, zeros beyond both ends; the average divides by the whole kernel there too."""
    if how == "none":
        return scores
    half, result = kernel // 2, []
    for center in range(len(scores)):
        around = [scores[i] if 0 <= i < len(scores) else 0.0 for i in range(center - half, center + half + 1)]
        result.append(max(around) if how == "max" else sum(around) / kernel)
    return result


def snapkv_votes(
    queries: list[Matrix],
    keys: Matrix,
    scale: float,
    pooling: str,
    kernel: int,
    group_reduce: str,
    group_stage: str,
    window_reduce: str,
) -> list[float]:
    """Votes for the tokens before the window, of one KV head.

    Args:
        queries: [group][w][d], of the query heads that share this KV head, at the last w positions.
        keys: [n][d].
    """
    n, w = len(keys), len(queries[0])
    rows = [  # [group][w][keys up to the row's own position]
        [
            [scale * sum(a * b for a, b in zip(query, key, strict=True)) for key in keys[: n - w + row + 1]]
            for row, query in enumerate(head)
        ]
        for head in queries
    ]
    if group_stage == "logits":
        rows = [
            [
                [reduce([head[row][i] for head in rows], group_reduce) for i in range(n - w + row + 1)]
                for row in range(w)
            ]
        ]
    votes = []
    for head_rows in rows:
        probabilities = [softmax(row) for row in head_rows]
        reduced = [reduce([row[position] for row in probabilities], window_reduce) for position in range(n - w)]
        votes.append(pooled(reduced, pooling, kernel))
    return [reduce(list(at), group_reduce) for at in zip(*votes, strict=True)]


def kept(scores: list[float], count: int, sinks: int, recent: int, n: int, below_tail: int) -> list[int]:
    """Forced tokens first, then the highest scores; of equal ones the lower position.

    Args:
        scores: of the first tokens of a prompt of `n`; forced tokens need none.
    """

    def rank(position: int) -> float:
        forced = position < sinks or position >= n - recent
        return -math.inf if forced else -scores[position]

    order = sorted(range(below_tail), key=lambda position: (rank(position), position))
    last, first_out = rank(order[count - 1]), rank(order[count]) if count < below_tail else math.inf
    close = last != first_out and abs(last - first_out) < 1e-6 * abs(last)
    assert not close, "rounding decides here: choose another seed"
    return sorted(order[:count])


def shared(weights: list[Fraction], total: int, low: int, high: int) -> tuple[list[Fraction], list[int]]:
    """Real and whole shares in [low, high] with sum `total`: proportional where free, by largest remainder."""
    weights = [max(weight, max(weights) / 10**9) for weight in weights]

    def at(scale: Fraction) -> list[Fraction]:
        return [min(max(scale * weight, Fraction(low)), Fraction(high)) for weight in weights]

    # The sum is linear in the scale between two of these.
    breaks = sorted({Fraction(0)} | {Fraction(bound) / weight for weight in weights for bound in (low, high)})
    reals = at(breaks[-1])
    for left, right in pairwise(breaks):
        below, above = sum(at(left)), sum(at(right))
        if below <= total <= above:
            part = Fraction(total - below) / (above - below) if above > below else Fraction(0)
            reals = at(left + part * (right - left))
            break
    whole = [math.floor(real) for real in reals]
    by_remainder = sorted(range(len(reals)), key=lambda i: (whole[i] - reals[i], i))
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return reals, whole


def pyramid_tokens(num_layers: int, budget: int, prompt_len: int, window: int, beta: int) -> list[Fraction]:
    """PyramidKV's formula in real numbers: tokens of each layer, the window included."""
    scored, room = budget - window, prompt_len - window
    if prompt_len < 2 * scored:
        return [Fraction(budget)] * num_layers
    least = scored // beta
    most = 2 * scored - least
    if most >= room:
        most, least = room, 2 * scored - room
    return [most - Fraction(layer * (most - least), num_layers - 1) + window for layer in range(num_layers)]


def probabilities_before(queries: list[Matrix], keys: Matrix, scale: float) -> list[list[float]]:
    """Mean over the window of each query head's causal softmax, for the tokens before the window: SnapKV's votes of
    every query head before pooling and reduction.

    Args:
        queries: [group][w][d] of the query heads of one KV head; keys: [n][d].
    """
    return [snapkv_votes([head], keys, scale, "none", 1, "mean", "probabilities", "mean") for head in queries]


def tova_votes(heads: list[list[float]]) -> list[float]:
    """What the last tokens attend to, mean over all query heads of a layer: [num_heads][n] -> [n]."""
    return [sum(at) / len(heads) for at in zip(*heads, strict=True)]


def keydiff_scores(keys: Matrix) -> list[float]:
    """Minus the cosine between each key and the mean of the unit keys."""

    def unit(vector: list[float]) -> list[float]:
        length = math.sqrt(sum(x * x for x in vector))
        return [x / length for x in vector]

    units = [unit(key) for key in keys]
    anchor = unit([sum(column) / len(units) for column in zip(*units, strict=True)])
    return [-sum(a * b for a, b in zip(key, anchor, strict=True)) for key in units]


def clear_cut(falling: list[float], count: int) -> None:
    """Rounding must not decide what is among the first `count` of these."""
    if 0 < count < len(falling):
        last, first_out = falling[count - 1], falling[count]
        close = last != first_out and abs(last - first_out) < 1e-6 * abs(last)
        assert not close, "rounding decides here: choose another seed"


def critical_scores(votes: list[float], values: Matrix, sure: int, epsilon: float) -> list[float]:
    """CriticalKV over SnapKV: the first `sure` tokens by votes come first, the rest by votes times values.

    Args:
        votes: of all prompt tokens, the window's at infinity (it takes part in the first stage).
    """
    order = sorted(range(len(votes)), key=lambda position: (-votes[position], position))
    clear_cut([votes[position] for position in order], sure)
    safe = set(order[:sure])
    weighted = [(vote + epsilon) * sum(abs(x) for x in value) for vote, value in zip(votes, values, strict=True)]
    # The first stage's votes, made larger than all weighted ones.
    factor = (
        2 * max(score for score in weighted if score < math.inf) / min(votes[position] for position in safe or order)
    )
    return [factor * vote if i in safe else score for i, (vote, score) in enumerate(zip(votes, weighted, strict=True))]


def tokens_holding(row: list[float], mass: float) -> int:
    """LMBA: the fewest entries, largest first, that hold this share of the row."""
    total, held = sum(row), 0.0
    for count, value in enumerate(sorted(row, reverse=True), 1):
        held += value
        if held >= (mass - 1e-9) * total:
            assert held - value < (mass - 2e-6) * total, "rounding decides here: choose another seed"
            return count
    return len(row)


def zigzag_tokens(lmba: list[Fraction], budget: int, bound: Fraction) -> list[Fraction]:
    """`bound` tokens for every layer, the rest of the budget by uncertainty."""
    return [bound + (budget - bound) * len(lmba) * uncertainty / sum(lmba) for uncertainty in lmba]


def ada_counts(scores: list[list[float]], tokens: int, floor: Fraction) -> list[int]:
    """AdaKV's tokens by head: each head's best are its own, all that is left competes.

    Args:
        scores: [heads][n], forced tokens at infinity.
        tokens: mean over heads.
    """
    sure = math.floor(tokens * floor)
    rest = []
    for head, row in enumerate(scores):
        rest += [(score, head) for score in sorted(row, reverse=True)[sure:]]
    rest.sort(key=lambda entry: (-entry[0], entry[1]))
    free = len(scores) * (tokens - sure)
    clear_cut([score for score, _ in rest], free)
    counts = [sure] * len(scores)
    for _, head in rest[:free]:
        counts[head] += 1
    return counts


def column_sums(queries: list[Matrix], keys: Matrix, scale: float) -> list[float]:
    """What each token of a prompt got from all of its queries: mean over the query heads of one KV head.

    Args:
        queries: [group][n][d]; keys: [n][d].
    """
    sums = [0.0] * len(keys)
    for head in queries:
        for i, query in enumerate(head):
            row = softmax([scale * sum(a * b for a, b in zip(query, key, strict=True)) for key in keys[: i + 1]])
            for j, probability in enumerate(row):
                sums[j] += probability / len(queries)
    return sums


def d2o_variance(heads: list[list[float]]) -> float:
    """D2O's `v` of a layer, from the column sums of its KV heads."""
    variances = []
    for sums in heads:
        mean = sum(sums) / len(sums)
        variances.append(sum((x - mean) ** 2 for x in sums) / len(sums))
    least, most = min(variances), max(variances)
    return sum((variance - least) / (most - least + 1e-6) for variance in variances) / len(variances)


def d2o_tokens(v: list[float], budget: int, prompt_len: int, first: int, last: int) -> list[Fraction]:
    """By softmax(-v); layers that are to stay whole get the prompt's length, together at most half of all."""
    weights = [Fraction(weight) for weight in softmax([-x for x in v])]
    whole = [layer < first or layer >= len(v) - last for layer in range(len(v))]
    total, count = Fraction(budget * len(v)), sum(whole)
    if count in (0, len(v)):
        return [total * weight / sum(weights) for weight in weights]
    each = min(Fraction(prompt_len), max(Fraction(budget), total / 2 / count))
    others = sum(weight for weight, own in zip(weights, whole, strict=True) if not own)
    rest = total - count * each
    return [each if own else rest * weight / others for weight, own in zip(weights, whole, strict=True)]


def turned(vector: list[float], position: int, rotary_dim: int, base: float, direction: int = 1) -> list[float]:
    """RoPE (neox) of one vector as complex numbers; `direction` -1 undoes it."""
    half, result = rotary_dim // 2, list(vector)
    for pair in range(half):
        z = complex(vector[pair], vector[pair + half])
        z *= cmath.exp(direction * 1j * position / base ** (2 * pair / rotary_dim))
        result[pair], result[pair + half] = z.real, z.imag
    return result


def future_moments(
    queries: Matrix, skipped: int, future: int, rotary_dim: int, base: float
) -> tuple[list[float], Matrix]:
    """Mean and covariance of one head's queries before RoPE (rotated ones come in), as if the mean of the next
    positions' rotation matrices were applied to them.

    Args:
        queries: [n][d], of the whole prompt.
    """
    n, d = len(queries), len(queries[0])
    plain = [turned(queries[i], i, rotary_dim, base, -1) for i in range(skipped, n)]
    unit = [[float(i == j) for j in range(d)] for i in range(d)]
    columns = [[turned(unit[j], n + step, rotary_dim, base) for step in range(future)] for j in range(d)]
    matrix = [[sum(turn[i] for turn in columns[j]) / future for j in range(d)] for i in range(d)]
    ahead = [[sum(row[j] * query[j] for j in range(d)) for row in matrix] for query in plain]
    mean = [sum(column) / len(ahead) for column in zip(*ahead, strict=True)]
    around = [[x - m for x, m in zip(query, mean, strict=True)] for query in ahead]
    covariance = [[sum(query[i] * query[j] for query in around) / len(around) for j in range(d)] for i in range(d)]
    return mean, covariance


def expected_attention(
    moments: list[tuple[list[float], Matrix]], keys: Matrix, values: Matrix, scale: float, sinks: int, epsilon: float
) -> list[float]:
    """Of one KV head, for all tokens; sinks at infinity. `moments`: of the query heads that share it."""
    heads = []
    for mean, covariance in moments:
        logits = []
        for key in keys[sinks:]:
            bent = sum(a * covariance[i][j] * b for i, a in enumerate(key) for j, b in enumerate(key))
            logits.append(scale * sum(a * b for a, b in zip(key, mean, strict=True)) + scale**2 * bent / 2)
        heads.append(softmax(logits))
    expected = [sum(at) / len(at) for at in zip(*heads, strict=True)]
    lengths = [math.sqrt(sum(x * x for x in value)) for value in values[sinks:]]
    return [math.inf] * sinks + [(p + epsilon) * length for p, length in zip(expected, lengths, strict=True)]


def redundancies(keys: Matrix, threshold: float) -> list[float]:
    """R-KV: column means of the cosines, the newest similar key of each row left out; their softmax."""
    n = len(keys)
    lengths = [math.sqrt(sum(x * x for x in key)) for key in keys]
    sums = [0.0] * n
    for i in range(n):
        row = [sum(a * b for a, b in zip(keys[i], keys[j], strict=True)) / lengths[i] / lengths[j] for j in range(n)]
        row[i] = 0.0
        assert all(abs(cosine - threshold) > 1e-6 for cosine in row), "rounding decides here: choose another seed"
        similar = [j for j in range(n) if row[j] > threshold]
        for j in range(n):
            sums[j] += 0.0 if similar and j == similar[-1] else row[j]
    return softmax([total / n for total in sums])


def rkv_scores(
    queries: list[Matrix], keys: Matrix, scale: float, kernel: int, mix: float, threshold: float
) -> list[float]:
    """R-KV of one KV head, for the tokens before the window. `queries`: [group][w][d]; `keys`: [n][d]."""
    w = len(queries[0])
    older = len(keys) - w
    rows = []
    for at in range(w):
        logits = [
            max(scale * sum(a * b for a, b in zip(head[at], key, strict=True)) for head in queries)
            for key in keys[:older]
        ]
        rows.append(softmax(logits))
    votes = pooled([sum(column) / w for column in zip(*rows, strict=True)], "max", kernel)
    return [mix * vote - (1 - mix) * again for vote, again in zip(votes, redundancies(keys, threshold), strict=False)]


def uses(queries: list[Matrix], keys: Matrix, scale: float, top: int) -> list[list[int]]:
    """Of one KV head: at which positions the last queries had a token among the `top` they attend to most.

    Args:
        queries: [group][w][d], of the query heads that share this KV head, at the last w positions; keys: [n][d].
    """
    n, w = len(keys), len(queries[0])
    found: list[list[int]] = [[] for _ in keys]
    for row in range(w):
        seen = n - w + row + 1
        heads = [
            softmax([scale * sum(a * b for a, b in zip(head[row], key, strict=True)) for key in keys[:seen]])
            for head in queries
        ]
        mean = [sum(at) / len(heads) for at in zip(*heads, strict=True)]
        order = sorted(range(seen), key=lambda position: -mean[position])
        clear_cut([mean[position] for position in order], top)
        for position in order[:top]:
            found[position].append(seen - 1)
    return found


def by_age(statistics: list[list[int]]) -> list[list[float]]:
    """Ranks in each row; of equal numbers the older, which stands first, ranks lower."""
    rows = []
    for row in statistics:
        order = sorted(range(len(row)), key=lambda position: (row[position], position))
        ranks = [0.0] * len(row)
        for rank, position in enumerate(order):
            ranks[position] = float(rank)
        rows.append(ranks)
    return rows
