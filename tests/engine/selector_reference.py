"""What selectors read, by their papers' formulas, one step and one layer at a time. Shares no code with them."""

from __future__ import annotations

import math

import torch


def mask_of(chosen: list[list[int]], n: int) -> torch.Tensor:
    """Chosen places by KV head -> bool [num_kv_heads, n]."""
    mask = torch.zeros(len(chosen), n, dtype=torch.bool)
    for head, places in enumerate(chosen):
        mask[head, places] = True
    return mask


def everything(keys: torch.Tensor) -> torch.Tensor:
    return torch.ones(keys.shape[:2], dtype=torch.bool)


def top_tokens(
    queries: torch.Tensor, keys: torch.Tensor, k: int, probabilities: bool, kernel: int = 1
) -> list[list[int]]:
    """The newest token, and the k - 1 others that get most (they, or a token near them) from some query head of the
    group, best first behind it."""
    logits, reach = queries @ keys.transpose(1, 2), kernel // 2
    found = []
    for scores in logits.softmax(-1) if probabilities else logits:
        own = scores.amax(0)
        near = torch.stack([own[max(0, at - reach) : at + reach + 1].max() for at in range(len(own))])
        best = near[:-1].argsort(descending=True, stable=True)[: k - 1]
        found.append([keys.shape[1] - 1, *best.tolist()])
    return found


class Quest:
    """Pages by their bounds; behind the prompt's those that its window chose, its own first."""

    def __init__(self, k: int, page: int, window: int = 0, pinned: int = 0, spread: float = 1.0) -> None:
        self.k, self.page, self.window, self.pinned, self.spread = k, page, window, pinned, spread
        self.pins: dict[int, list[list[int]]] = {}

    def prompt(self, layer: int, queries: torch.Tensor, keys: torch.Tensor) -> None:
        if not self.window:
            return
        n, self.pins[layer] = keys.shape[1], []
        for votes in votes_of_window(queries, keys, self.window, 21):
            given = [*votes, *[math.inf] * self.window]
            of_pages = [max(given[start : start + self.page]) for start in range(0, n, self.page)]
            self.pins[layer].append(ranked(of_pages)[: self.pinned])

    def __call__(self, layer: int, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        if layer < 2:
            return everything(keys)
        n, chosen = keys.shape[1], []
        size = self.page
        pages = [list(range(start, min(start + size, n))) for start in range(0, n, size)]
        pins = self.pins.get(layer, [[]] * len(keys))
        for group, head, pinned in zip(queries, keys, pins, strict=True):
            bounds = []
            for page in pages[:-1]:
                keys = head[page].to(torch.float8_e4m3fn).float()
                low, high = keys.amin(0), keys.amax(0)
                middle, most = (low + high) / 2, [torch.maximum(q * low, q * high) for q in group]
                less = [(1 - self.spread) * (each - q * middle) for q, each in zip(group, most, strict=True)]
                bounds.append(sum(float((each - off).sum()) for each, off in zip(most, less, strict=True)))
            order = [*(page for page in pinned if page < len(bounds)), *ranked(bounds)]
            best = list(dict.fromkeys(order))[: math.ceil(self.k / size) - 1]
            chosen.append(sum((pages[page] for page in best), pages[-1]))
        return mask_of(chosen, n)


class Loki:
    """With all principal directions: the exact best."""

    def __init__(self, k: int) -> None:
        self.k = k

    def __call__(self, layer: int, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return mask_of(top_tokens(queries, keys, self.k, False), keys.shape[1])


def votes_of_window(queries: torch.Tensor, keys: torch.Tensor, window: int, kernel: int) -> list[list[float]]:
    """By KV head, the most that one of a prompt's last queries gives to each token before them, or to one near it."""
    n, reach, found = keys.shape[1], kernel // 2, []
    before = n - window
    for group, head in zip(queries, keys, strict=True):
        votes = torch.zeros(len(group), before)
        for position in range(before, n):
            votes = votes.maximum((group[:, position] @ head[: position + 1].T).softmax(-1)[:, :before])
        found.append([float(votes[:, max(0, at - reach) : at + reach + 1].max()) for at in range(before)])
    return found


def ranked(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda at: -scores[at])


class Tidal:
    """`selecting` layers choose, layers before the first read everything; of what the prompt's window gives in the
    layers that read a list, the first are pinned to it."""

    def __init__(
        self, k: int, selecting: list[int], kernel: int = 1, shared: bool = False, window: int = 0, pinned: int = 0
    ) -> None:
        self.k, self.selecting, self.kernel, self.shared = k, selecting, kernel, shared
        self.window, self.pinned = window, pinned
        self.chosen: list[list[int]] = []
        self.votes: dict[int, list[list[float]]] = {}

    def prompt(self, layer: int, queries: torch.Tensor, keys: torch.Tensor) -> None:
        if self.window:
            self.votes[layer] = votes_of_window(queries, keys, self.window, 21)

    def pins(self, layer: int, heads: int) -> list[list[int]]:
        if not self.window:
            return [[]] * heads
        end = min([later for later in self.selecting if later > layer], default=max(self.votes) + 1)
        votes = torch.tensor([self.votes[reader] for reader in range(min(layer + 1, end - 1), end)]).amax(0)
        votes = votes.amax(0, keepdim=True).expand_as(votes) if self.shared else votes
        return [ranked(head)[: self.pinned] for head in votes.tolist()]

    def __call__(self, layer: int, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        if layer in self.selecting:
            chosen = self.choose(queries, keys)
            self.chosen = [
                [*listed[:1], *first, *(at for at in listed[1:] if at not in first)][: self.k]
                for listed, first in zip(chosen, self.pins(layer, len(keys)), strict=True)
            ]
        if layer in self.selecting or layer < self.selecting[0]:
            return everything(keys)
        return mask_of(self.chosen, keys.shape[1])

    def choose(self, queries: torch.Tensor, keys: torch.Tensor) -> list[list[int]]:
        if not self.shared:
            return top_tokens(queries, keys, keys.shape[1], True, self.kernel)
        given = (queries @ keys.transpose(1, 2)).softmax(-1).amax(1).sum(0).tolist()
        near = [max(given[max(0, at - self.kernel // 2) : at + self.kernel // 2 + 1]) for at in range(len(given))]
        return [[len(given) - 1, *ranked(near[:-1])]] * len(keys)


class LessIsMore(Tidal):
    def choose(self, queries: torch.Tensor, keys: torch.Tensor) -> list[list[int]]:
        n, most = keys.shape[1], self.k - self.k // 4
        last = self.k - most - 4
        middle = set(range(4, n - last))
        by_head = [
            [place for place in head if place in middle] for head in top_tokens(queries, keys, n, True, self.kernel)
        ]
        union: list[int] = []
        for of_all_heads in zip(*by_head, strict=True):
            for place in of_all_heads:
                if place not in union and len(union) < most:
                    union.append(place)
        return [[*range(4), *union, *range(n - last, n)]] * len(keys)


class Recycled:
    """Lists of K tokens by layer and head; a full step chooses them, in others the newest comes and the least goes."""

    def __init__(
        self,
        k: int,
        stride: int,
        similarity: float = 0.0,
        check_every: int = 1,
        kernel: int = 1,
        window: int = 0,
        pinned: int = 0,
    ) -> None:
        self.kernel, self.window, self.pinned = kernel, window, pinned
        self.pins: dict[int, list[list[int]]] = {}
        self.k, self.stride, self.similarity, self.check_every = k, stride, similarity, check_every
        self.lists: dict[int, list[list[int]]] = {}
        self.queries: dict[int, torch.Tensor] = {}
        self.steps = -1
        self.since = 0

    def prompt(self, layer: int, queries: torch.Tensor, keys: torch.Tensor) -> None:
        """The window's highest probabilities, pooled by query head; the window itself is on the lists, and the first of
        the others are pinned."""
        if not self.window:
            return
        n, self.lists[layer], self.pins[layer] = keys.shape[1], [], []
        for votes in votes_of_window(queries, keys, self.window, self.kernel):
            best = ranked(votes)
            self.lists[layer].append([*best[: self.k - self.window], *range(n - self.window, n)])
            self.pins[layer].append(best[: self.pinned])
        self.queries[layer] = queries[:, :, -1]

    def __call__(self, layer: int, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        if layer == 0:
            self.steps += 1
            self.since = 0 if self.steps % self.stride == 0 else self.since + 1
        begins = self.steps == 0 and self.window > 0
        full = self.since == 0 and not begins
        if not full and not begins and self.similarity and self.since % self.check_every == 0:
            likeness = torch.cosine_similarity(queries.flatten(), self.queries[layer].flatten(), dim=0)
            full = bool(likeness < self.similarity)
        if full:
            chosen = top_tokens(queries, keys, keys.shape[1], True, self.kernel)  # all, best first behind the newest
            pins = self.pins.get(layer, [[]] * len(chosen))
            self.lists[layer], self.queries[layer] = [], queries
            for listed, pinned in zip(chosen, pins, strict=True):
                others = [place for place in listed[1:] if place not in pinned]
                self.lists[layer].append([listed[0], *pinned, *others][: self.k])
            return everything(keys)
        n, seen = keys.shape[1], []
        for head, listed in enumerate(self.lists[layer]):
            listed.append(n - 1)
            seen.append(list(listed))
            got = (queries[head] @ keys[head, listed].T).softmax(-1).amax(0)
            del listed[int(got[:-1].argmin())]
        return mask_of(seen, n)


class Local:
    """Near tokens alone, where the prompt's moments say that far ones get little."""

    def __init__(self, k: int, share: float, page: int) -> None:
        self.k, self.share, self.page = k, share, page
        self.moments: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.local = 0

    def __call__(self, layer: int, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        n, size = keys.shape[1], self.page
        if layer not in self.moments:  # the first step: all before it is the prompt
            prompt = keys[:, :-1]
            centred = prompt - prompt.mean(1, keepdim=True)
            self.moments[layer] = prompt.mean(1), centred.transpose(1, 2) @ centred / (n - 1)
        mean, covariance = self.moments[layer]
        pages = math.ceil(n / size)
        near = [*range(1), *range(pages - math.ceil((self.k - 16) / size) - 1, pages)]
        places = [place for page in near for place in range(page * size, min((page + 1) * size, n))]
        seen = everything(keys)
        for head, group in enumerate(queries):
            shares = []
            for q in group:
                far = math.log(n - len(places)) + float(q @ mean[head]) + float(q @ covariance[head] @ q) / 2
                close = float((keys[head, places] @ q).logsumexp(0))
                shares.append(1 / (1 + math.exp(far - close)))
            if min(shares) >= self.share:
                self.local += 1
                seen[head] = mask_of([places], n)[0]
        return seen
