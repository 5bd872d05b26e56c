"""What vLLM's CPU build can't do on some processors."""

from __future__ import annotations

import platform


def lacks_avx512() -> bool:
    """Whether this is an x86 processor without AVX-512: vLLM runs its AVX2 build there, and bfloat16 is emulated."""
    import torch

    return platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_supported()
