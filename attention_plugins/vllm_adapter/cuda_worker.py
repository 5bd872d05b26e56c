"""vLLM's GPU worker (Model Runner V2) with compression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu_worker import Worker

from attention_plugins.vllm_adapter import cuda_backend
from attention_plugins.vllm_adapter.worker import CompressionWorker
from kvcache.pages import InterleavedCodec, PageCodec, PageGeometry

# A worker's module is imported before its model is built, so the model's layers find our backend.
cuda_backend.register()


class CUDACompressionWorker(CompressionWorker, Worker):
    def page_codec(self, geometry: PageGeometry, dtype: torch.dtype, layer: Any) -> PageCodec:
        return InterleavedCodec(geometry.page_size, geometry.head_dim)

    def request_ids(self, common: CommonAttentionMetadata) -> Sequence[str]:
        names = self.model_runner.req_states.index_to_req_id
        return [names[index] for index in common.req_idx.tolist()]
