"""`longreach calibrate --prefill`: which kind of pattern each head gets from MInference."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from attention_plugins.prefill.base import Chunk
from attention_plugins.prefill.grid import ROWS
from attention_plugins.prefill.minference import TABLE, Kind
from attention_plugins.prefill.minference_search import candidates, search
from server.errors import StartError
from server.watching import load, output_file, run_all, save, tokens

SHORTEST = 4 * ROWS
"""Tokens that the text needs at least."""


def measure(model: Any, prompt: list[int], density: float, *, bar: bool = False) -> torch.Tensor:
    """Search the best kind for each head on one text; the paper takes one of 30,000 tokens.

    Memory and time grow with the text's square, and each layer is attended once for every candidate.

    Args:
        model: a causal language model of transformers, all of whose layers attend to everything.
        prompt: token ids.
        density: most that a head may compute, of the causal pairs.

    Returns:
        int64 [num_layers, num_heads, 3], on the CPU.

    Raises:
        StartError: the text is too short, or no density.
    """
    if not 0 < density <= 1:
        raise StartError(f"--density: {density} is no share of the attention; allowed are more than 0, up to 1")
    tables: dict[int, torch.Tensor] = {}

    def see(layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> None:
        chunk = Chunk(queries.transpose(0, 1), keys, scale, layer=layer)
        choices = candidates(chunk.k_len, least=round(density * chunk.k_len / 4))
        tables[layer] = search(chunk, values, choices, density)

    run_all(model, [prompt], SHORTEST, lambda: see, bar)
    return torch.stack([tables[layer] for layer in sorted(tables)])


def calibrate_heads(model_path: str, text: str, output: str, density: float, *, bar: bool = False) -> torch.Tensor:
    """Load a model, measure it on this user message, and write the file.

    Raises:
        StartError: as `measure`; the model can't be loaded; the file can't be written, which is looked at first.
    """
    file = output_file(output)
    tokenizer, model = load(model_path)
    prompt = tokens(tokenizer, text)
    table = measure(model, prompt, density, bar=bar)
    note = {
        "model": Path(model_path).name if Path(model_path).is_dir() else model_path,
        "density": density,
        "tokens": len(prompt),
        "date": datetime.now(UTC).date().isoformat(),
    }
    save(file, {TABLE: table}, note)
    return table


def summary(table: torch.Tensor) -> str:
    """How many heads do what."""
    kinds = table[..., 0].flatten().tolist()
    counts = (f"{kinds.count(kind)} {kind.name.lower().replace('_', '-')}" for kind in Kind)
    return f"{TABLE}: {table.shape[0]} x {table.shape[1]} heads: {', '.join(counts)}"
