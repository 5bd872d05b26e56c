"""From scores to kept positions."""

from __future__ import annotations

import torch

from kvcache.tables import to_device


def force(scores: torch.Tensor, sinks: int, recent: int | torch.Tensor) -> torch.Tensor:
    """A copy of `scores` [..., n] in which the first `sinks` and last `recent` tokens always stay, NaNs before others.

    `recent` may be a tensor [...] on the CPU, of whole numbers for each row; none stay where it is negative.

    NaN means that a score could not be computed; keeping the token is the conservative choice. Where more are NaN
    than fit (one NaN key makes all its head's votes NaN), they don't push out the forced tokens.
    """
    forced = scores.float().nan_to_num(nan=torch.finfo(torch.float32).max, neginf=float("-inf"))
    forced[..., :sinks] = float("inf")
    if isinstance(recent, torch.Tensor):
        left = torch.arange(forced.shape[-1], 0, -1, device=forced.device)
        forced.masked_fill_(left <= to_device(recent, forced.device)[..., None], float("inf"))
    elif recent > 0:
        forced[..., -recent:] = float("inf")
    return forced


def keep_top(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The positions of each row's highest scores, ascending; of equal scores the lower position wins.

    All rows are selected at once and nothing waits for the device.

    Args:
        scores: float32 [rows, n], no NaN.
        counts: int64 [rows], on the CPU: positions to keep of each row, 0 <= count <= n.

    Returns:
        int64 [rows, max(counts)]; a row's positions come first, n fills up the rest.

    Raises:
        ValueError: when a count is outside 0..n.
    """
    n, most, least = scores.shape[-1], int(counts.max()), int(counts.min())
    if not 0 <= least <= most <= n:
        raise ValueError(f"cannot keep {counts.tolist()} of {n} tokens")
    if not most:
        return scores.new_empty(len(scores), 0, dtype=torch.int64)
    # One whole number per token that orders by score, then by position: a float's bits, with those of negative
    # numbers flipped, are in the order of the floats (adding 0 makes -0 and 0 one number).
    bits = (scores + 0.0).view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    backwards = torch.arange(n - 1, -1, -1, device=scores.device)
    ranked = torch.topk((bits.long() << 32) | backwards, most, sorted=least < most).values
    positions = n - 1 - (ranked & 0xFFFFFFFF)
    if least < most:
        wanted = torch.arange(most) < counts[:, None]
        positions = positions.masked_fill(~to_device(wanted, scores.device), n)
    return positions.sort(-1).values


def among_top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Whether each entry is one of its row's `count` highest; of equal scores the lower position wins.

    For all rows alike, and unordered, this is less work than `keep_top`.

    Args:
        scores: float32 [rows, n], no NaN.
        count: 0 <= count <= n.

    Returns:
        bool [rows, n].
    """
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = scores.topk(count, -1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > least, scores == least
    return above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def left_over(kept: torch.Tensor, n: int, most: int) -> torch.Tensor:
    """The positions below n that `keep_top` did not keep, ascending.

    Args:
        kept: int64 [rows, any], as `keep_top` gives them.
        most: of any row.

    Returns:
        int64 [rows, most]; a row's positions come first, n fills up the rest.
    """
    free = torch.ones(len(kept), n + 1, dtype=torch.bool, device=kept.device).scatter_(1, kept, False)[:, :n]
    # All others go behind the end.
    place = torch.where(free, free.cumsum(-1) - 1, most)
    positions = torch.arange(n, device=kept.device).expand(len(kept), -1)
    return kept.new_full((len(kept), most + 1), n).scatter_(1, place, positions)[:, :most]


def ragged(counts: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and place in its row of every entry of rows with these lengths, row by row: two int64 [sum of counts].

    Args:
        counts: int64 [rows], on the CPU.
    """
    lengths = to_device(counts, device)
    row = torch.arange(len(counts), device=device).repeat_interleave(lengths, output_size=int(counts.sum()))
    return row, torch.arange(len(row), device=device) - (lengths.cumsum(0) - lengths)[row]
