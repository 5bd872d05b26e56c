"""vLLM's CPU worker (Model Runner V1) with compression."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.kv_cache_utils import check_enough_kv_cache_memory
from vllm.v1.worker.cpu_worker import CPUWorker

from attention_plugins import naive
from attention_plugins.decode.base import ReadPages
from attention_plugins.naive.paged_attention import read_pages
from attention_plugins.vllm_adapter import cpu_backend
from attention_plugins.vllm_adapter.cpu_lora import keep_adapters_apart
from attention_plugins.vllm_adapter.pages import probe_codec
from attention_plugins.vllm_adapter.prefilling import Executor, NaiveExecutor
from attention_plugins.vllm_adapter.worker import CompressionWorker
from kvcache.pages import PageCodec, PageGeometry
from kvcache.vllm_adapter.start_faults import telling

PRIMITIVES = 64
"""Compiled matrix products that oneDNN keeps, unless the environment says otherwise (docs/settings.md)."""


def bound_primitives() -> None:
    """Have oneDNN keep fewer compiled products than its 1,024, where nobody has said how many.

    It compiles one for each number of rows and each shape of weights, about 0.3 MiB apiece, so a server whose batches
    are never alike grows by hundreds of MiB until all places are taken. Layers of one shape share theirs within a step,
    for which few are enough, and vLLM's layers hold those of their last 32 numbers of rows anyway. oneDNN has no other
    setting that reaches the copies inside torch and vLLM, and reads this one when its first product is compiled.
    """
    if not {"ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"} & os.environ.keys():
        os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = str(PRIMITIVES)


def permit_amx() -> None:
    """Ask Linux for AMX, which vLLM's attention uses wherever the CPU has it and the model is in bfloat16.

    To a process that hasn't asked, AMX is an illegal instruction. oneDNN asks, but only before a product that is large
    enough for it: a small model's worker died at its first prompt.

    Raises:
        RuntimeError: the CPU has AMX, and Linux or the virtual machine doesn't give it.
    """
    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        raise RuntimeError("this CPU has AMX, but it isn't permitted here, and vLLM's attention in bfloat16 uses it")


# A worker's module is imported before its model is built, so the model's layers find our backend.
cpu_backend.register()
bound_primitives()


class _Discarded(torch.Generator):
    """Random numbers for a token that nobody gets: a prompt's chunk that isn't the last is sampled from too."""

    def get_offset(self) -> int:
        return 4  # what vLLM takes off again, which only GPUs' generators know

    def set_offset(self, offset: int) -> torch.Generator:
        return self


@telling
class CPUCompressionWorker(CompressionWorker, CPUWorker):
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        if self.model_config.dtype == torch.bfloat16:
            permit_amx()
        super().load_model(*args, **kwargs)
        keep_adapters_apart(self.model_runner)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """As vLLM's, which dies of a request with a `seed` whose prompt comes in chunks: it turns the generator back by
        an offset, and generators of the CPU have none. Such rows get another one; their own stays where it is."""
        runner = self.model_runner
        generators = runner.input_batch.generators
        unused = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0].tolist()
        own = {row: generators[row] for row in unused if row in generators}
        generators.update({row: _Discarded() for row in own})
        try:
            return super().sample_tokens(grammar_output)
        finally:
            generators.update(own)

    def determine_available_memory(self) -> int:
        """vLLM's; too little for one request is refused here already, where it can be told."""
        available = int(super().determine_available_memory())
        fixed = self.vllm_config.model_config.original_max_model_len != -1  # else vLLM fits the length to the memory
        if fixed and self.cache_config.num_gpu_blocks_override is None:
            check_enough_kv_cache_memory(self.vllm_config, self.get_kv_cache_spec(), available)
        return available

    def page_codec(self, geometry: PageGeometry, dtype: torch.dtype, layer: Any) -> PageCodec:
        return probe_codec(geometry.page_size, geometry.head_dim, dtype, layer.isa)

    @property
    def ops(self) -> ModuleType:
        return naive

    def read_pages(self) -> ReadPages:
        return read_pages

    def executor(self) -> Executor:
        return NaiveExecutor()

    def request_ids(self, common: CommonAttentionMetadata) -> Sequence[str]:
        return self.model_runner.input_batch.req_ids
