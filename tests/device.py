"""Where the tests of tests/kvcache put their tensors: `pytest tests/kvcache --device cuda` runs them on a GPU.

Random numbers are drawn on the CPU and sent there, so that they are the same everywhere; what is worked out by hand
stays on the CPU. tests/conftest.py sets it before test modules are imported.
"""

from __future__ import annotations

import torch

DEVICE = torch.device("cpu")
