"""Launches that overlap the end of the kernel before them (programmatic dependent launch; Hopper and later).

In a CUDA graph of short kernels most of a launch is then over when the kernel before ends.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def _can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def overlapping(device: torch.device) -> dict[str, bool]:
    """Options of a launch whose kernel calls `after_previous(PDL)`."""
    return {"PDL": True, "launch_pdl": True} if _can_overlap(device) else {"PDL": False}


@triton.jit
def after_previous(PDL: tl.constexpr):
    """Wait until everything that earlier kernels write is there; only then may the next kernel's programs come in.

    To be called before anything is read or written that another kernel writes or reads. In this order the next kernel
    can rely on all kernels before this one having ended.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
