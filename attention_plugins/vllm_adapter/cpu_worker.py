"""vLLM's CPU worker (Model Runner V1) with compression."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from attention_plugins.vllm_adapter import cpu_backend
from attention_plugins.vllm_adapter.pages import flat_pages, probe_codec
from attention_plugins.vllm_adapter.runtime import CompressionRuntime, set_runtime
from attention_plugins.vllm_adapter.worker import attention_layers, keeps_positions, set_pages
from kvcache.compressor import Compressor
from kvcache.vllm_adapter.orders import attach_reports

# A worker's module is imported before its model is built, so the model's layers find our backend.
cpu_backend.register()


class CPUCompressionWorker(CPUWorker):
    """Compacts between steps, never inside the forward pass."""

    runtime: CompressionRuntime

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_from_config(*args, **kwargs)
        layers = attention_layers(self.vllm_config)
        pages, geometry = flat_pages([layer.kv_cache for layer in layers])
        set_pages(layers, pages, geometry.page_size)
        compressor = Compressor(
            geometry,
            probe_codec(geometry.page_size, geometry.head_dim, pages.dtype, layers[0].isa),
            pages,
            num_heads=layers[0].impl.num_heads,
            scale=layers[0].impl.scale,
            keep_positions=keeps_positions(self.vllm_config),
        )
        self.runtime = CompressionRuntime(compressor, lambda _: self.model_runner.input_batch.req_ids)
        set_runtime(self.vllm_config, self.runtime)

    def execute_model(self, scheduler_output: Any) -> Any:
        self.runtime.begin_step(scheduler_output)
        try:
            return super().execute_model(scheduler_output)
        finally:
            self.runtime.end_step()

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        if reports := self.runtime.take_reports():
            attach_reports(output, reports)
        return output
