"""Settings that must be made before any test module is imported."""

from __future__ import annotations

import os

import torch

# Kernels run in Triton's interpreter where there is no GPU. Triton reads this when it is imported, and vLLM imports
# it: in tests/kernels, the tests of other folders would already have done so.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
