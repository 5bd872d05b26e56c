"""`longreach explain`: which tokens of a prompt a policy keeps, by layer, KV head and position."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from server.errors import StartError

DEFAULT_WORDS = {"policy": "snapkv", "budget": "25%"}
"""Explained where no policy is named."""
ANSWER_TOKENS = 32
BLOCKS = " ▁▂▃▄▅▆▇█"
STRIP = 48
"""Characters of a layer's strip in the text."""


@dataclass(frozen=True)
class Explanation:
    """What one run kept.

    Attributes:
        text: the prompt as the model saw it; `spans`: first and past-the-last character of each token.
        mask: bool [num_layers, num_kv_heads, prompt tokens]: whether a token stays.
        words: the policy with all arguments.
        sinks, recent: tokens that the policy forces at both ends of what it sees.
        seen: tokens that compaction saw: the prompt less its suffix.
        tail_from: first token of the prompt's last, partly filled page, which always stays, as does what follows.
        answer: what the model said.
    """

    text: str
    spans: list[tuple[int, int]]
    mask: torch.Tensor
    words: dict[str, Any]
    sinks: int
    recent: int
    seen: int
    tail_from: int
    answer: str


def kept_mask(kept: Sequence[Sequence[torch.Tensor]], prompt_len: int, tail_from: int) -> torch.Tensor:
    """Kept positions as a mask.

    Args:
        kept: by layer and KV head, int64 positions below `tail_from`.
        prompt_len: tokens of the prompt.
        tail_from: from here on everything stays.

    Returns:
        bool [num_layers, num_kv_heads, prompt_len].
    """
    mask = torch.zeros(len(kept), len(kept[0]), prompt_len, dtype=torch.bool)
    for layer, heads in enumerate(kept):
        for head, positions in enumerate(heads):
            mask[layer, head, positions] = True
    mask[..., tail_from:] = True
    return mask


def narrowed(shares: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of numbers by position, averaged to at most `width` columns: float [rows, min(width, positions)]."""
    if shares.shape[-1] <= width:
        return shares.float()
    return torch.nn.functional.adaptive_avg_pool1d(shares.float()[None], width)[0]


def middle(found: Explanation) -> torch.Tensor:
    """The positions that a policy chooses among: bool [prompt tokens]."""
    chosen = torch.zeros(found.mask.shape[-1], dtype=torch.bool)
    chosen[found.sinks : max(found.sinks, min(found.tail_from, found.seen - found.recent))] = True
    return chosen


def strip(shares: torch.Tensor) -> str:
    """Shares in 0..1 as a line of blocks; only a share of 0 is blank."""
    steps = len(BLOCKS) - 1
    return "".join(BLOCKS[min(steps, -int(-share * steps // 1))] for share in shares.tolist())


def summary(found: Explanation) -> str:
    """What is kept, in words and numbers, and a strip over positions for every layer."""
    mask, chosen = found.mask, middle(found)
    layers, heads, tokens = mask.shape
    per_head = mask.sum(-1).float()
    by_token = mask.sum((0, 1))
    ordered = sorted(found.words.items(), key=lambda word: word[0] != "budget")
    arguments = ", ".join(f"{name} {value}" for name, value in ordered if name not in ("policy", "gates"))
    freely = mask[..., chosen].sum().item()
    fifths = [int(part.sum()) for part in mask[..., chosen].flatten(0, 1).sum(0).tensor_split(5)]
    where = ", ".join(f"{part / max(freely, 1):.0%}" for part in fifths)
    head = (
        f"{found.words['policy']} ({arguments})\n"
        f"{tokens:,} tokens, of which {per_head.mean():,.0f} stay on average over {layers} layers of {heads} KV heads "
        f"({per_head.mean() / tokens:.1%})\n"
        f"  always: {found.sinks} sinks, {tokens - int(chosen.sum()) - found.sinks} at the end\n"
        f"  chosen: {freely / layers / heads:,.0f} of the {int(chosen.sum()):,} between, by fifth: {where}\n"
        f"  kept by every layer and head {int((by_token == layers * heads).sum()):,}, by none "
        f"{int((by_token == 0).sum()):,}\n"
    )
    strips = narrowed(mask.float().mean(1), STRIP)
    lines = [
        f"{layer:5} {row.mean():6,.0f} {row.min():6,.0f} {row.max():6,.0f}  {strip(strips[layer])}"
        for layer, row in enumerate(per_head)
    ]
    columns = "layer   mean    min    max  share of heads that keep a position, first to last"
    return "\n".join([head, columns, *lines, "", f"answer: {found.answer.strip()!r}"])


def read_prompt(place: str) -> str:
    """The text in a file, or on standard input for `-`.

    Raises:
        StartError: it can't be read, or is empty.
    """
    try:
        text = sys.stdin.read() if place == "-" else Path(place).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise StartError(f"the prompt {place} can't be read: {error}") from error
    if not text.strip():
        raise StartError(f"the prompt {place} is empty")
    return text


def rendered(tokenizer: Any, text: str, plain: bool) -> str:
    """The prompt's text: a user's message in the model's chat template, or as it is."""
    if plain or not getattr(tokenizer, "chat_template", None):
        return text
    return str(
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
    )


def run(engine: Any, text: str, words: dict[str, Any], *, special: bool) -> Explanation:
    """Run one prompt and take down what was kept.

    Args:
        engine: a `server.inprocess.InProcessEngine` that keeps positions.
        text: the prompt as the model is to see it.
        words: the policy.
        special: whether the tokenizer adds its special tokens, which a chat template has already.

    Raises:
        StartError: the prompt doesn't fit the model, or the policy drops nothing of it.
    """
    from vllm import SamplingParams

    from kvcache.registry import make_policy
    from server.inprocess import Job

    encoded = engine.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    prompt = list(encoded["input_ids"])
    if len(prompt) + ANSWER_TOKENS > engine.max_model_len:
        raise StartError(f"the prompt has {len(prompt)} tokens, the model takes {engine.max_model_len - ANSWER_TOKENS}")
    policy = make_policy(words)
    plan = policy.plan(len(prompt), engine.page_size) if policy else None
    if policy is None or plan is None:
        raise StartError(
            f"nothing is dropped: the budget {words.get('budget')} is not below the prompt's {len(prompt)} tokens, "
            "or is below what the policy needs at least; name another --kv-budget"
        )
    params = SamplingParams(max_tokens=ANSWER_TOKENS, min_tokens=2, temperature=0)  # compacted before the second
    (job,) = engine.run([Job(prompt, params, words)])
    tail_from = plan.full_pages * plan.page_size
    return Explanation(
        text=text,
        spans=[(first, last) for first, last in encoded["offset_mapping"]],
        mask=kept_mask(job.kept, len(prompt), tail_from),
        words=words,
        sinks=policy.args.sinks,
        recent=policy.recent,
        seen=plan.prompt_len,
        tail_from=tail_from,
        answer=job.output.outputs[0].text,
    )


def explain(args: argparse.Namespace, flags: Sequence[str]) -> str:
    """Do what the command line says; the text to print.

    Args:
        args: our own arguments (`server.commands.explain`).
        flags: those of `longreach serve`.

    Raises:
        SystemExit, StartError, EmbeddedModelError: a mistake in the flags, the model or the prompt.
    """
    if args.output:
        from server.explain_views import require_matplotlib

        require_matplotlib()
    prompt = read_prompt(args.prompt)

    from attention_plugins.decode.registry import DENSE
    from kvcache.registry import NONE
    from kvcache.vllm_adapter.compat import check
    from server.arguments import parse
    from server.inprocess import make_ready, start_engine
    from server.platforms import detect
    from server.policies import PolicyDesk
    from server.settings import default_policy

    check()
    platform = detect()
    check(platform.name)
    serve = parse(list(flags), platform, command="explain")
    if serve.decode_attention != DENSE:
        raise StartError(
            "--decode-attention: explain shows what a policy keeps, not what steps read of it; leave it out"
        )
    make_ready(serve, platform)
    words = default_policy(serve, platform)
    if words["policy"] == NONE:
        words = PolicyDesk(DEFAULT_WORDS, serve.block_size or 1).default
    engine = start_engine(serve, platform, keep_positions=True, max_num_seqs=1)
    text = rendered(engine.tokenizer, prompt, args.plain)
    found = run(engine, text, words, special=text == prompt)
    if args.output:
        from server.explain_views import write

        write(found, args.output)
    return summary(found)
