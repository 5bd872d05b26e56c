"""A random Llama, small enough for any test: 3 layers, 4 query heads on 2 KV heads."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 512


def write_tiny_model(folder: Path) -> Path:
    """Write the checkpoint (float32, always the same weights) and return its folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        # Large weights make attention peaked, so that a wrong token in the cache changes the answer.
        initializer_range=0.25,
        tie_word_embeddings=False,
        dtype=torch.float32,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_tiny_tokenizer(folder: Path) -> None:
    """Add a tokenizer to the checkpoint: token i is the word `wi`."""
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder)
