"""vLLM's GPU worker (Model Runner V2) with compression."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker

from attention_plugins.vllm_adapter import cuda_backend
from attention_plugins.vllm_adapter.pages import flat_pages
from attention_plugins.vllm_adapter.runtime import CompressionRuntime, set_runtime
from attention_plugins.vllm_adapter.worker import attention_layers, keeps_positions, set_pages
from kvcache.compressor import CompactionReport, Compressor
from kvcache.pages import InterleavedCodec
from kvcache.vllm_adapter.orders import attach_reports

# A worker's module is imported before its model is built, so the model's layers find our backend.
cuda_backend.register()


class ReportingOutput(AsyncModelRunnerOutput):
    """An output still on its way from the GPU, with reports for the scheduler."""

    def __init__(self, output: AsyncModelRunnerOutput, reports: list[CompactionReport]) -> None:
        self._output, self._reports = output, reports

    def get_output(self) -> Any:
        output = self._output.get_output()
        attach_reports(output, self._reports)
        return output


class CUDACompressionWorker(Worker):
    """Compacts between steps, never inside the forward pass."""

    runtime: CompressionRuntime

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_from_config(*args, **kwargs)
        layers = attention_layers(self.vllm_config)
        pages, geometry = flat_pages([layer.kv_cache for layer in layers])
        set_pages(layers, pages, geometry.page_size)
        compressor = Compressor(
            geometry,
            InterleavedCodec(geometry.page_size, geometry.head_dim),
            pages,
            num_heads=layers[0].impl.num_heads,
            scale=layers[0].impl.scale,
            keep_positions=keeps_positions(self.vllm_config),
        )
        self.runtime = CompressionRuntime(compressor, self._request_ids)
        set_runtime(self.vllm_config, self.runtime)

    def _request_ids(self, common: CommonAttentionMetadata) -> list[str]:
        names = self.model_runner.req_states.index_to_req_id
        return [names[index] for index in common.req_idx.tolist()]

    def execute_model(self, scheduler_output: Any) -> Any:
        self.runtime.begin_step(scheduler_output)
        try:
            return super().execute_model(scheduler_output)
        finally:
            self.runtime.end_step()

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        reports = self.runtime.take_reports()
        if not reports:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return ReportingOutput(output, reports)
        attach_reports(output, reports)
        return output
