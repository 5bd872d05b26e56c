"""What our workers have in common, in front of vLLM's worker of a platform."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.worker.worker_base import WorkerBase

from attention_plugins.decode.base import ReadPages
from attention_plugins.decode.rows import LayerCache
from attention_plugins.decode.settings import DecodeSettings
from attention_plugins.prefill.grid import ROWS
from attention_plugins.prefill.orders import PATTERNS, PendingPatternReport
from attention_plugins.vllm_adapter.layers import compressible_layers, refuse_variants
from attention_plugins.vllm_adapter.pages import flat_pages
from attention_plugins.vllm_adapter.prefilling import Executor, Prefilling, prefill_calibration
from attention_plugins.vllm_adapter.readers import make_readers, place_for, read_calibration
from attention_plugins.vllm_adapter.rotary import UnknownRotary, find_rotary
from attention_plugins.vllm_adapter.runtime import CompressionRuntime, set_runtime
from attention_plugins.vllm_adapter.selection import Selecting
from kvcache.compressor import Compressor
from kvcache.evidence import Evidence, QuantScales
from kvcache.model import ModelFacts
from kvcache.namm import NO_WEIGHTS, Network
from kvcache.orders import PendingReport
from kvcache.pages import PageCodec, PageGeometry
from kvcache.tables import PageTables
from kvcache.vllm_adapter.orders import attach_reports


class ReportingOutput(AsyncModelRunnerOutput):
    """An output still on its way from the GPU, with reports for the scheduler."""

    def __init__(self, output: AsyncModelRunnerOutput, reports: Sequence[PendingReport | PendingPatternReport]) -> None:
        self._output, self._reports = output, reports

    def get_output(self) -> Any:
        output = self._output.get_output()
        attach_reports(output, [report.finish() for report in self._reports])
        return output


class CompressionWorker(WorkerBase if TYPE_CHECKING else object):  # type: ignore[misc]
    """Compacts between steps, never inside the forward pass. A platform says how pages and batches look."""

    runtime: CompressionRuntime
    attention_layers: list[Any]
    """Of full attention, in order."""
    missing: dict[str, str]
    """By kind of evidence (or `PATTERNS`), why this worker hasn't got it."""

    @abstractmethod
    def page_codec(self, geometry: PageGeometry, dtype: torch.dtype, layer: Any) -> PageCodec:
        """How the platform's kernel lays out a page."""

    @abstractmethod
    def request_ids(self, common: CommonAttentionMetadata) -> Sequence[str]:
        """The requests of a batch's rows, in order."""

    @property
    @abstractmethod
    def ops(self) -> ModuleType:
        """Selectors' operations: `attention_plugins.naive` or `attention_plugins.kernels`."""

    @abstractmethod
    def read_pages(self) -> ReadPages:
        """The platform's attention over page tables, for selectors."""

    @abstractmethod
    def executor(self) -> Executor:
        """The platform's attention over plans, for patterns."""

    def quant_scales(self, layer: Any) -> QuantScales:
        """What a layer's queries and cached numbers are multiplied with."""
        return QuantScales()

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_from_config(*args, **kwargs)
        layers = self.attention_layers = compressible_layers(self.vllm_config)
        for layer in layers:
            refuse_variants(layer, bool(DecodeSettings.of(self.vllm_config.additional_config).selectors))
        pages, geometry = flat_pages([layer.kv_cache for layer in layers])
        for index, layer in enumerate(layers):
            layer.impl.index, layer.impl.pages, layer.impl.page_size = index, pages, geometry.page_size
        tables = PageTables(
            geometry,
            slots=self.vllm_config.scheduler_config.max_num_seqs,
            # The widest row holds all of the longest request; one page more where its tail starts inside one.
            width=-(-self.vllm_config.model_config.max_model_len // geometry.page_size) + 1,
            device=pages.device,
        )
        self.missing, rotary = {}, None
        try:
            rotary = find_rotary(self.get_model(), layers, self.vllm_config.model_config.hf_text_config.model_type)
        except UnknownRotary as reason:
            self.missing[Evidence.QUERY_MOMENTS.value] = str(reason)
        if (network := self._namm(pages.device)) is None:
            self.missing[Evidence.SPECTROGRAMS.value] = NO_WEIGHTS
        compressor = Compressor(
            geometry,
            self.page_codec(geometry, pages.dtype, layers[0]),
            pages,
            tables,
            scale=layers[0].impl.scale,
            quant=[self.quant_scales(layer) for layer in layers],
            model=ModelFacts(rotary, network),
            keep_positions=bool(ours(self.vllm_config).get("keep_positions")),
        )
        selecting = self._selecting(compressor)
        prefilling = Prefilling(
            selecting.caches,
            self.vllm_config.model_config.dtype,
            prefill_calibration(self.vllm_config.additional_config, layers[0].impl.num_heads),
            self.executor(),
        )
        self.runtime = CompressionRuntime(compressor, selecting, prefilling, self.request_ids)
        set_runtime(self.vllm_config, self.runtime)

    def _selecting(self, compressor: Compressor) -> Selecting:
        """The server's selectors."""
        settings, layers = DecodeSettings.of(self.vllm_config.additional_config), self.attention_layers
        common = compressor.pages, compressor.geometry, compressor.codec
        caches = [
            LayerCache(index, *common, quant, compressor.scale, invariant=envs.VLLM_BATCH_INVARIANT)
            for index, quant in enumerate(compressor.quant)
        ]
        for layer, cache in zip(layers, caches, strict=True):
            layer.impl.cache = cache
        first = layers[0].impl
        if first.logits_soft_cap or getattr(first, "sinks", None) is not None:
            self.missing[PATTERNS] = "prefill patterns know neither logit soft caps nor learned attention sinks"
        elif ROWS % compressor.geometry.page_size:
            self.missing[PATTERNS] = (
                f"prefill patterns need blocks whose size divides {ROWS}, here they have "
                f"{compressor.geometry.page_size} tokens (--block-size 16, 32, 64 or 128, where one can choose)"
            )
        place = place_for(
            settings,
            compressor.geometry,
            num_blocks=len(compressor.pages) // (compressor.geometry.num_layers * compressor.geometry.num_kv_heads),
            group=first.num_heads // first.num_kv_heads,
            dtype=self.vllm_config.model_config.dtype,
            device=compressor.pages.device,
            max_num_seqs=self.vllm_config.scheduler_config.max_num_seqs,
            max_model_len=self.vllm_config.model_config.max_model_len,
            calibration=read_calibration(settings, compressor.geometry.num_kv_heads),
        )
        return Selecting(compressor, make_readers(settings, place, self.ops, self.read_pages()), caches)

    def _namm(self, device: torch.device) -> Network | None:
        file = ours(self.vllm_config).get("namm_weights")
        return Network.load(file, device) if file else None

    def missing_evidence(self) -> dict[str, str]:
        """By kind of evidence, why policies that need it can't run; the API process asks before it serves."""
        return self.missing

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
        attach_reports(output, [report.finish() for report in reports])
        return output


def ours(config: VllmConfig) -> dict[str, Any]:
    """Longreach's part of `additional_config`: `namm_weights` (a file), and in tests `keep_positions`."""
    found: dict[str, Any] = (config.additional_config or {}).get("longreach", {})
    return found
