"""`longreach calibrate`: measure on texts what selectors have to know of a model beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from attention_plugins.decode.loki import BASIS
from server.errors import StartError
from server.key_directions import KeyDirections
from server.layer_choice import SELECTORS, SHORTEST, LayerChoice
from server.watching import Watch, load, output_file, run_all, save, tokens


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        tensors: by the names that `server.calibration` reads.
        held: by the same names, the share of attention, or of the keys' squared length, that they hold.
        texts: how many tokens each had.
    """

    tensors: dict[str, torch.Tensor]
    held: dict[str, float]
    texts: list[int]

    def summary(self) -> str:
        basis = self.tensors[BASIS]
        layers, heads, _, rank = basis.shape
        share = self.held[BASIS]
        lines = [f"{BASIS}: {rank} directions in each of {layers} x {heads} heads hold {share:.1%} of its keys' square"]
        for name in SELECTORS:
            chosen = ", ".join(map(str, self.tensors[f"{name}.layers"].tolist()))
            lines.append(
                f"{name}.layers: {chosen}; their lists hold {self.held[f'{name}.layers']:.1%} of the far attention"
            )
        return "\n".join(lines)


def measure(
    model: Any, prompts: Sequence[list[int]], rank: int, *, selection_layers: int = 2, bar: bool = False
) -> Calibration:
    """Measure a model.

    Args:
        model: a causal language model of transformers, all of whose layers attend to everything.
        prompts: token ids.
        rank: directions kept of each KV head.
        selection_layers: how many layers select for the others.
        bar: show on stderr how far it is.

    Raises:
        StartError: a prompt is too short, there is none, or the model is too small.
    """
    layers = model.config.num_hidden_layers
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    if not 1 <= rank <= head_dim:
        raise StartError(f"--rank: {rank} directions; allowed are 1 to {head_dim}, the model's head_dim")
    if layers < 2:
        raise StartError("a model of one layer has no layer that could select for another")
    if not prompts:
        raise StartError("at least one text is needed")
    directions, choice = KeyDirections(), LayerChoice(layers)
    try:
        choice.best(next(iter(SELECTORS)), selection_layers)
    except ValueError as error:
        raise StartError(f"--selection-layers: {error}") from None

    def watch() -> Watch:
        choice.begin()

        def see(layer: int, queries: torch.Tensor, keys: torch.Tensor, _: torch.Tensor, scale: float) -> None:
            directions.see(layer, keys)
            choice.see(layer, queries, keys, scale)

        return see

    run_all(model, prompts, SHORTEST, watch, bar)
    found, held = {}, {}
    found[BASIS], held[BASIS] = directions.basis(rank)
    for name in SELECTORS:
        chosen, held[f"{name}.layers"] = choice.best(name, selection_layers)
        found[f"{name}.layers"] = torch.tensor(chosen)
    return Calibration(found, held, [len(prompt) for prompt in prompts])


def calibrate(
    model_path: str, texts: Sequence[str], output: str, rank: int, *, selection_layers: int = 2, bar: bool = False
) -> Calibration:
    """Load a model, measure it on these user messages, and write the file.

    Raises:
        StartError: as `measure`; the model can't be loaded; the file can't be written, which is looked at first.
    """
    file = output_file(output)
    tokenizer, model = load(model_path)
    found = measure(
        model, [tokens(tokenizer, text) for text in texts], rank, selection_layers=selection_layers, bar=bar
    )
    write(file, found, Path(model_path).name if Path(model_path).is_dir() else model_path)
    return found


def write(file: Path, found: Calibration, model: str) -> None:
    """Write the file, with a note of what it is of.

    Raises:
        StartError: it can't be written.
    """
    layers, heads, head_dim, rank = found.tensors[BASIS].shape
    note = {
        "model": model,
        "num_layers": layers,
        "num_kv_heads": heads,
        "head_dim": head_dim,
        "rank": rank,
        "texts": len(found.texts),
        "tokens": " ".join(map(str, found.texts)),
        "date": datetime.now(UTC).date().isoformat(),
        **{f"held.{name}": f"{share:.4f}" for name, share in found.held.items()},
    }
    save(file, found.tensors, note)
