"""The sizes of a request's compressed region: arithmetic that scheduler and worker do alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RetentionPlan:
    """What a prompt occupies before and after compaction. Known at admission, from lengths alone.

    Attributes:
        prompt_len: tokens that compaction sees: the prompt, less its suffix.
        page_size: tokens per page (vLLM's block size).
        kept_pages: full pages that each layer and KV head keeps on average; also the number of target blocks.
    """

    prompt_len: int
    page_size: int
    kept_pages: int

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
        return self.full_pages - self.kept_pages

    def min_pages(self, sinks: int, recent: int) -> int:
        """Pages that a (layer, KV head) needs for its forced tokens."""
        return max(1, -(-(sinks + max(0, recent - self.tail)) // self.page_size))


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
