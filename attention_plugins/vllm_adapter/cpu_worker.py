"""vLLM's CPU worker (Model Runner V1) with compression."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.worker.cpu_worker import CPUWorker

from attention_plugins.vllm_adapter import cpu_backend
from attention_plugins.vllm_adapter.cpu_pages import flat_pages, probe_codec
from attention_plugins.vllm_adapter.runtime import CompressionRuntime, set_runtime
from kvcache.compressor import Compressor
from kvcache.vllm_adapter.orders import attach_reports

# A worker's module is imported before its model is built, so the model's layers find our backend.
cpu_backend.register()


class CPUCompressionWorker(CPUWorker):
    """Compacts between steps, never inside the forward pass."""

    runtime: CompressionRuntime

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_from_config(*args, **kwargs)
        layers = self._attention_layers()
        impl = layers[0].impl
        pages, geometry = flat_pages([layer.kv_cache for layer in layers])
        for layer in layers:
            layer.impl.pages = pages
        codec = probe_codec(geometry.page_size, geometry.head_dim, pages.dtype, layers[0].isa)
        compressor = Compressor(
            geometry, codec, pages, num_heads=impl.num_heads, scale=impl.scale, keep_positions=self._keeps_positions()
        )
        self.runtime = CompressionRuntime(compressor, lambda: self.model_runner.input_batch.req_ids)
        set_runtime(self.vllm_config, self.runtime)

    def _keeps_positions(self) -> bool:
        return bool((self.vllm_config.additional_config or {}).get("longreach", {}).get("keep_positions"))

    def _attention_layers(self) -> list[Any]:
        """The model's attention layers in order; layer i is layer i of the compressor."""
        context = self.vllm_config.compilation_config.static_forward_context
        by_index = {extract_layer_index(name): layer for name, layer in context.items() if hasattr(layer, "kv_cache")}
        if sorted(by_index) != list(range(len(context))):
            raise ValueError(f"KV compression expects one attention layer per decoder layer; got {list(context)}")
        return [by_index[index] for index in range(len(by_index))]

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
