"""The sizes of a request's compressed region: arithmetic that scheduler and worker do alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RetentionPlan:
    """What a request occupies, and when it is compacted. Known at admission, from lengths alone.

    Compactions come when a certain number of tokens has been computed, their boundaries: the first at `prompt_len`,
    then, with an interval, every so many tokens from the last full page before it on.

    Attributes:
        prompt_len: tokens that the first compaction sees: the prompt, less its suffix; more than the prompt where it
            is compacted only when the answer has grown.
        page_size: tokens per page (vLLM's block size).
        kept_pages: full pages that each layer and KV head keeps on average; also the number of target blocks.
        pinned: first tokens that always stay.
        interval: tokens from one compaction to the next, in whole pages; 0: there is only one.
        question: first and end of the positions that every compaction keeps that sees them: a prompt's suffix.
    """

    prompt_len: int
    page_size: int
    kept_pages: int
    pinned: int = 0
    interval: int = 0
    question: tuple[int, int] = (0, 0)

    @property
    def full_pages(self) -> int:
        """Full blocks of the prompt: compaction reads them, and they are released after it."""
        return self.prompt_len // self.page_size

    @property
    def tail(self) -> int:
        """Tokens of the last, partly filled block, which stays as it is and takes the new tokens."""
        return self.prompt_len % self.page_size

    @property
    def kept_tokens(self) -> int:
        """Tokens kept per layer and KV head on average: at most the budget, less than a page under it."""
        return self.kept_pages * self.page_size + self.tail

    @property
    def freed_blocks(self) -> int:
        """Of the first compaction."""
        return self.full_pages - self.kept_pages

    def min_pages(self, recent: int) -> int:
        """Pages that a (layer, KV head) needs for its forced tokens; later compactions have no tail."""
        later = recent if self.interval else max(0, recent - self.tail)
        first, end = self.question
        return max(1, -(-(self.pinned + end - first + later) // self.page_size))

    def last_boundary(self, computed: int) -> int:
        """Of the compactions that are due when so many tokens are computed, the last one's boundary; 0: none is."""
        if computed < self.prompt_len:
            return 0
        whole = self.full_pages * self.page_size
        if not self.interval or computed < whole + self.interval:
            return self.prompt_len
        return computed - (computed - whole) % self.interval

    def next_boundary(self, computed: int) -> int | None:
        """The first boundary behind so many computed tokens, or None."""
        if computed < self.prompt_len:
            return self.prompt_len
        if not self.interval:
            return None
        return computed - (computed - self.full_pages * self.page_size) % self.interval + self.interval


def plan_retention(prompt_len: int, budget: int, page_size: int) -> RetentionPlan | None:
    """Whole pages for a budget in tokens, or None when there is nothing to drop (budget >= prompt).

    A budget is a limit: `kept_tokens` is the largest number <= budget that fills its pages, since attention
    can only have one partly filled page a sequence, and that is the prompt's own tail.

    Raises:
        ValueError: when the budget leaves no page beside the tail.
    """
    if budget >= prompt_len:
        return None
    kept_pages = (budget - prompt_len % page_size) // page_size
    if kept_pages < 1:
        raise ValueError(f"a budget of {budget} tokens leaves no page of {page_size} tokens beside the prompt's tail")
    return RetentionPlan(prompt_len, page_size, kept_pages)


def minimum_budget(sinks: int, recent: int, page_size: int) -> int:
    """The smallest budget in tokens whose plan has room for the forced tokens at any prompt length."""
    return max(recent, page_size) + sinks + 2 * page_size


def whole_pages(tokens: int, page_size: int) -> int:
    """So many tokens, rounded up to whole pages."""
    return -(-tokens // page_size) * page_size
