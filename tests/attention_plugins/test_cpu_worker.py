"""What a CPU worker keeps in memory beside weights and KV cache, and what it asks the CPU for."""

from __future__ import annotations

import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

from attention_plugins.vllm_adapter.cpu_worker import PRIMITIVES, bound_primitives, permit_amx

ONE, OTHER = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"
MANY_SHAPES = """
import ctypes, torch
from attention_plugins.vllm_adapter import cpu_worker
from vllm import _custom_ops as ops

class Mallinfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Mallinfo
weights = [torch.randn(size, 64) for size in (64, 128)]
layers = [ops.create_onednn_mm(weight.t(), 32) for weight in weights]
rows = torch.randn(300, 64)
before = library.mallinfo2().uordblks
for number in range(1, 300):
    for layer, weight in zip(layers, weights):
        found = ops.onednn_mm(layer, rows[:number], None)
torch.testing.assert_close(found, rows[:299] @ weights[-1].T)
print((library.mallinfo2().uordblks - before) >> 20)
"""
BOUND = 80
"""MiB. Compiled products take about 0.3 each: the 64 that oneDNN keeps here 18, and all 600 would take 165."""


def test_batches_of_all_sizes_do_not_fill_the_memory() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in (ONE, OTHER)}
    done = subprocess.run([sys.executable, "-c", MANY_SHAPES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < BOUND


@pytest.mark.parametrize("name", [ONE, OTHER])
def test_who_names_a_number_of_products_gets_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (ONE, OTHER):
        monkeypatch.delenv(each, raising=False)
    bound_primitives()
    assert os.environ.pop(ONE) == str(PRIMITIVES)
    monkeypatch.setenv(name, "1024")
    bound_primitives()
    assert os.environ[name] == "1024" and len({ONE, OTHER} & os.environ.keys()) == 1


@pytest.mark.parametrize("has", [False, True])
@pytest.mark.parametrize("permitted", [False, True])
def test_amx_is_asked_for_where_the_cpu_has_it(has: bool, permitted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Mock(return_value=permitted)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has)
    monkeypatch.setattr(torch.cpu, "_init_amx", asked)
    if has and not permitted:
        with pytest.raises(RuntimeError, match="has AMX, but it isn't permitted"):
            permit_amx()
    else:
        permit_amx()
    assert asked.call_count == has
