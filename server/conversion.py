"""From the GGUF file of an embedded model to a transformers checkpoint in bfloat16."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and warnings out of the way of ours."""
    from tqdm import tqdm
    from transformers import modeling_gguf_pytorch_utils as loader
    from transformers.utils import logging

    verbosity, bars, loader_bar = logging.get_verbosity(), logging.is_progress_bar_enabled(), loader.tqdm
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # The GGUF loader takes tqdm itself and asks no one.
    loader.tqdm = functools.partial(tqdm, disable=True)
    try:
        yield
    finally:
        loader.tqdm = loader_bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _told(gguf: Path) -> dict[str, Any]:
    """What the file says of its tokenizer, by keys without `tokenizer.ggml.`."""
    from gguf import GGUFReader

    fields = GGUFReader(str(gguf)).fields
    told = {name: fields.get(f"tokenizer.ggml.{name}") for name in ("pre", "add_bos_token")}
    return {name: field.contents() for name, field in told.items() if field is not None}


def _complete(tokenizer: Any, told: dict[str, Any]) -> None:
    """Add what transformers doesn't read of it, in place."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from tokenizers.processors import TemplateProcessing

    if told.get("pre") == "smollm":
        # It reads the merges but not this: digits are split off one by one before anything else. Without it, white
        # space before a number is cut otherwise than the model was trained on.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    if told.get("add_bos_token"):  # without it Gemma babbles
        first = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{first} $A",
            pair=f"{first} $A {first}:1 $B:1",
            special_tokens=[(first, tokenizer.bos_token_id)],
        )


def convert(gguf: Path, folder: Path, progress: tqdm[Any], title: str) -> None:
    """Write the GGUF's tokenizer, weights (dequantized to bfloat16) and configurations to an existing folder.

    Args:
        gguf: the file.
        folder: where the checkpoint goes.
        progress: goes on by three steps.
        title: what `progress` says before each step's name.

    Raises:
        OSError: a file can't be written.
    """
    progress.set_description(f"{title}: read tokenizer")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    with _quiet_transformers():
        source = {"gguf_file": gguf.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **source)
        _complete(tokenizer, _told(gguf))
        progress.update()

        progress.set_description(f"{title}: read weights")
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        # The weights are plain now; otherwise the checkpoint would be written, and read, as a quantized one.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        tokenizer.model_max_length = model.config.max_position_embeddings
        for passing in ("is_local", "local_files_only"):
            tokenizer.init_kwargs.pop(passing, None)
        progress.update()

        progress.set_description(f"{title}: write")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        progress.update()
