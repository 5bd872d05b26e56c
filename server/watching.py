"""A model of transformers at work on texts, its attention watched layer by layer: for what is measured beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from server.errors import StartError, one_line

_ATTENTION = "longreach_watched"

Watch = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], None]
"""`watch(layer, queries, keys, values, scale)`: post-RoPE queries [num_heads, n, head_dim], keys and values
[num_kv_heads, n, head_dim] of a whole prompt, and the softmax scale."""


@contextmanager
def watched(model: Any, watch: Watch) -> Iterator[None]:
    """While this holds, a forward pass of one prompt calls `watch` in each layer."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **rest: Any) -> Any:
        watch(module.layer_idx, query[0], key[0], value[0], scaling)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **rest)

    AttentionInterface.register(_ATTENTION, attend)
    before = model.config._attn_implementation
    model.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def run(model: Any, prompt: list[int], watch: Watch) -> None:
    """One prompt through the model's body; its logits would take gigabytes."""
    with watched(model, watch):
        model.base_model(torch.tensor([prompt], device=model.device), use_cache=False)


def run_all(model: Any, prompts: Sequence[list[int]], shortest: int, watch: Callable[[], Watch], bar: bool) -> None:
    """Run prompts one after another.

    Args:
        model: a causal language model of transformers, all of whose layers attend to everything.
        prompts: token ids.
        shortest: tokens that a prompt needs at least.
        watch: gives a prompt's.
        bar: show on stderr how far it is.

    Raises:
        StartError: a prompt is too short; before any has run.
    """
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) < shortest:
            raise StartError(f"prompt {number} has {len(prompt)} tokens; at least {shortest} are needed")
    layers = model.config.num_hidden_layers
    with tqdm(total=len(prompts) * layers, unit="layer", disable=not bar) as progress:
        for number, prompt in enumerate(prompts, 1):
            progress.set_description(f"prompt {number} of {len(prompts)}, {len(prompt):,} tokens")
            see = watch()

            def attend(*layer: Any, see: Watch = see) -> None:
                see(*layer)
                progress.update()

            run(model, prompt, attend)


def load(model_path: str) -> tuple[Any, Any]:
    """Tokenizer and model, on a GPU if there is one.

    Raises:
        StartError: they can't be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return tokenizer, AutoModelForCausalLM.from_pretrained(model_path, dtype="auto").to(device).eval()
    except (OSError, ValueError) as error:
        raise StartError(f"{model_path} can't be loaded: {one_line(error)}") from error


def tokens(tokenizer: Any, text: str) -> list[int]:
    """A prompt as a server renders it: with the chat template where the model has one."""
    if tokenizer.chat_template is None:
        return list(tokenizer(text)["input_ids"])
    message = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def read_texts(files: Sequence[str]) -> list[str]:
    """Raises StartError: one can't be read."""
    return [_text(file) for file in files]


def _text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise StartError(f"the prompt {file} can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise StartError(f"the prompt {file} is no UTF-8 text") from error


def output_file(output: str) -> Path:
    """Where to write what was measured; looked at before anything is.

    Raises:
        StartError: nothing can be written there.
    """
    file = Path(output)
    if file.suffix != ".safetensors":
        raise StartError(f"--output {file}: the name must end in .safetensors")
    if not file.parent.is_dir():
        raise StartError(f"--output {file}: there is no folder {file.parent}")
    return file


def save(file: Path, tensors: dict[str, torch.Tensor], note: dict[str, Any]) -> None:
    """Write tensors, with a note of what they are of.

    Raises:
        StartError: they can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, file, {name: str(value) for name, value in note.items()})
    except (OSError, SafetensorError) as error:
        raise StartError(f"--output {file}: can't be written: {error}") from error
