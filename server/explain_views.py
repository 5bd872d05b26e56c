"""An explanation as a picture and as a page."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
from pathlib import Path
from typing import Any

import torch

from server.errors import StartError
from server.explain import Explanation, narrowed

WIDTH = 900
"""Columns of the heat map, at most."""

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #1c2733 }}
img {{ max-width: 100% }}
pre {{ white-space: pre-wrap; font: 13px/1.7 ui-monospace, monospace }}
i {{ font-style: normal; background: rgb(47 111 222 / calc(var(--k) * 65%)) }}
i.none {{ color: #9aa5b1 }}
</style>
<h1>{title}</h1>
<p>{intro}</p>
<img alt="Share of KV heads that keep a position, by layer" src="data:image/png;base64,{picture}">
<h2>The prompt</h2>
<p>The darker a token's ground, the more (layer, KV head) pairs keep it; grey ones are kept by none.
Point at a token for its numbers.</p>
<pre>{text}</pre>
<h2>The answer</h2>
<pre>{answer}</pre>
</html>
"""


def require_matplotlib() -> None:
    """
    Raises:
        StartError: it isn't installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise StartError(
            "--output needs matplotlib: pip install 'longreach[explain]'; without --output, text is printed"
        )


def title(found: Explanation) -> str:
    kept = found.mask.float().mean()
    return (
        f"{found.words['policy']}, budget {found.words['budget']}: {kept:.1%} of {found.mask.shape[-1]:,} tokens stay"
    )


def figure(found: Explanation) -> Any:
    """The heat map by layer and position, above it all layers together, at its right the tokens of each layer."""
    from matplotlib.figure import Figure

    mask = found.mask.float()
    layers, heads, tokens = mask.shape
    drawing = Figure(figsize=(11, 2.6 + 0.11 * layers), layout="constrained")
    axes: dict[str, Any] = drawing.subplot_mosaic(
        [["all", "."], ["map", "bars"]], width_ratios=[4, 1], height_ratios=[1, max(2, layers / 8)]
    )  # fmt: skip
    drawing.suptitle(title(found), fontsize=10)
    together = narrowed(mask.mean((0, 1))[None], WIDTH)[0]
    axes["all"].fill_between(
        torch.linspace(0, tokens, len(together)).numpy(), together.numpy(), color="#2f6fde", linewidth=0
    )
    axes["all"].set(xlim=(0, tokens), ylim=(0, 1.05), xticks=[], ylabel="all layers")
    image = axes["map"].imshow(
        narrowed(mask.mean(1), WIDTH).numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="nearest",
        extent=(0, tokens, layers - 0.5, -0.5),
    )  # fmt: skip
    axes["map"].set(xlabel="position in the prompt", ylabel="layer")
    counts = mask.sum(-1)
    mean = counts.mean(1)
    reach = torch.stack([mean - counts.amin(1), counts.amax(1) - mean]).numpy()
    axes["bars"].barh(
        range(layers), mean.numpy(), xerr=reach if heads > 1 else None, height=0.8, color="#9dbdf2",
        error_kw={"elinewidth": 0.8, "ecolor": "#1c2733"},
    )  # fmt: skip
    axes["bars"].set(ylim=(layers - 0.5, -0.5), yticks=[], xlabel="tokens kept\n(line: min to max over heads)")
    for part in axes.values():
        part.spines[["top", "right"]].set_visible(False)
        part.tick_params(labelsize=8)
    drawing.colorbar(image, ax=axes["bars"], label="share of KV heads that keep it", location="right")
    return drawing


def png(found: Explanation) -> bytes:
    buffer = io.BytesIO()
    figure(found).savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def coloured(found: Explanation) -> str:
    """The prompt, every token with the number of (layer, KV head) pairs that keep it: HTML."""
    layers, heads, _ = found.mask.shape
    pieces, done = [], 0
    for position, count in enumerate(found.mask.sum((0, 1)).tolist()):
        first, last = found.spans[position]
        piece = found.text[max(first, done) : last]
        done = max(done, last)
        if not piece:  # a special token, or the second of those that share one character
            continue
        share = count / (layers * heads)
        kind = f'style="--k:{share:.2f}"' if count else 'class="none"'
        hint = f"token {position}: {count} of {layers * heads}"
        pieces.append(f'<i {kind} title="{hint}">{html.escape(piece)}</i>')
    return "".join(pieces)


def page(found: Explanation) -> str:
    """Everything in one file."""
    words = ", ".join(f"{name} {value}" for name, value in found.words.items())
    return PAGE.format(
        title=html.escape(title(found)), intro=html.escape(words), picture=base64.b64encode(png(found)).decode(),
        text=coloured(found), answer=html.escape(found.answer.strip()),
    )  # fmt: skip


def write(found: Explanation, path: Path) -> None:
    """A picture or a page, by the name's end.

    Raises:
        StartError: the file can't be written.
    """
    try:
        if path.suffix == ".html":
            path.write_text(page(found), encoding="utf-8")
        else:
            path.write_bytes(png(found))
    except OSError as error:
        raise StartError(f"--output {path}: {error.strerror or error}") from error
