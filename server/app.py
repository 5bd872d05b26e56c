"""Start vLLM's OpenAI application with our engine client and plug-in."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from argparse import Namespace
from importlib.metadata import entry_points
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.entry import build_and_serve
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.usage.usage_lib import UsageContext

from attention_plugins.prefill.orders import PATTERNS
from kvcache.method import ModelShape
from kvcache.registry import PolicyError
from server.access.settings import make_access
from server.calibration import CacheShape, read_calibration, read_head_tables
from server.checkpoint import check_checkpoint
from server.connections import guarded
from server.decode_settings import selector_desk
from server.desks import Desks
from server.draining import Door
from server.engine import LongreachLLM
from server.errors import EngineDied, Exit, StartError, one_line
from server.faults import StartWatch
from server.flags import in_flags
from server.limits import make_limits
from server.metrics import AuditMetrics, CompressionMetrics, DecodeMetrics, PrefillMetrics
from server.model_layers import full_layers
from server.platforms import Platform, choose_scheduler
from server.policies import PolicyDesk
from server.pool_logger import PoolLogger
from server.prefill_settings import pattern_desk
from server.refusals import refuse_config
from server.settings import house_rules

_PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.platform_plugins", "vllm.io_processor_plugins",
                  "vllm.stat_logger_plugins")  # fmt: skip
# It downloads what clients name, so vLLM takes its being on the list for consent, which is the user's to give.
_ONLY_BY_NAME = "lora_hf_hub_resolver"
_CLOSING = 5
"""Seconds that open connections have to end when the engine has."""
_OUTERMOST = "server.error_counter.ErrorCounter"


def allow_plugin() -> None:
    """Put our endpoint plug-in on vLLM's list of allowed plug-ins, which it reads from the environment.

    vLLM loads all other kinds of plug-ins when there is no list, so a list of ours has to name those too.

    Raises:
        StartError: Longreach's entry points are missing, so vLLM would serve without our routes and fields.
    """
    if not entry_points(group="vllm.endpoint_plugins", name="longreach"):
        raise StartError("the package longreach is not installed: run `pip install -e .` where its pyproject.toml is")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None:
        names = {entry.name for group in _PLUGIN_GROUPS for entry in entry_points(group=group)} - {_ONLY_BY_NAME}
    else:
        names = {name for name in allowed.split(",") if name}
    os.environ["VLLM_PLUGINS"] = ",".join(sorted(names | {"longreach"}))


class _Stop:
    """Ends the start when the process is told to; vLLM installs handlers of its own only when it listens."""

    def __init__(self) -> None:
        self.told = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self)

    def __call__(self, *_: Any) -> None:
        self.told = True
        # vLLM waits for the engine in ZeroMQ, which swallows exceptions of signal handlers, but notices its end.
        for child in multiprocessing.active_children():
            child.terminate()
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise what was swallowed.

        Raises:
            KeyboardInterrupt: told to stop.
        """
        if self.told:
            raise KeyboardInterrupt


async def serve(args: Namespace, default: dict[str, Any], platform: Platform) -> None:
    """Run the server until it is told to stop, and then until the requests under way have finished.

    Args:
        args: vLLM's arguments.
        default: policy of requests that name none.
        platform: where we run.

    Raises:
        StartError: the address, the model, or the configuration together with compression.
        EngineDied: while it served.
        KeyboardInterrupt: told to stop before the server listened, or it stopped with requests unfinished.
    """
    stop = _Stop()
    allow_plugin()
    args.middleware = [*args.middleware, _OUTERMOST]
    limits = make_limits(args)
    make_access(args)  # what is wrong with it is told before the slow part
    address, sock = _listen(args)
    try:
        try:
            engine = _start_engine(args, default, platform)
        except StartError:
            stop.check()
            raise
        try:
            stop.check()
            if platform.unavailable is None:
                await _ask_workers(engine)
            await engine.reset_mm_cache()  # vLLM's warm-up left dummy data there
            # The timeout: else a client that doesn't read its answer would hold the server up forever.
            closing: dict[str, Any] = {"timeout_graceful_shutdown": _CLOSING, "http": guarded(limits)}
            shutdown = await build_and_serve(engine, address, sock, args, **closing)
        finally:
            engine.shutdown(timeout=engine.vllm_config.shutdown_timeout)
        await shutdown  # open connections end when the engine has
        if engine.drained is False:
            raise KeyboardInterrupt
        if engine.drained is None:
            raise EngineDied("the engine died; its own messages above say why, if it had time for any. Start it again")
    finally:
        sock.close()


async def _ask_workers(engine: LongreachLLM) -> None:
    """Let the desk know what only workers see: what their model doesn't give policies.

    Raises:
        StartError: the server's own policy needs it.
    """
    try:
        for missing in await engine.collective_rpc("missing_evidence"):
            if reason := missing.pop(PATTERNS, None):
                engine.desks.patterns.lacks(reason)
            engine.desks.policies.lacks(missing)
    except PolicyError as error:
        raise StartError(in_flags(error)) from None


def _listen(args: Namespace) -> tuple[str, Any]:
    """Take the address before the slow part.

    Raises:
        StartError: it is taken or not ours, or a parser of tool calls or reasoning doesn't exist.
    """
    try:
        return setup_server(args, reuse_port=False)
    except (OSError, OverflowError) as error:
        where = f"--uds {args.uds}" if args.uds else f"--host {args.host} --port {args.port}"
        why = getattr(error, "strerror", None) or error
        text = f"can't listen: {where}: {why}. End what listens there, or choose another"
        raise StartError(text, Exit.ADDRESS) from error
    except KeyError as error:
        raise StartError(one_line(error)) from error


def _start_engine(args: Namespace, default: dict[str, Any], platform: Platform) -> LongreachLLM:
    """Load the model.

    Raises:
        StartError: it can't be loaded, or not with compression.
    """
    check_checkpoint(args)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    try:
        config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    except (ValueError, OSError, NotImplementedError) as error:
        raise StartError(f"{args.model} can't be served: {one_line(error)}", Exit.MODEL) from error
    if platform.unavailable is None:
        refuse_config(config, platform.name)
        choose_scheduler(config)
    desks = _desks(args, default, platform, config)
    try:
        with StartWatch(config.instance_id) as watch:
            engine = LongreachLLM.from_vllm_config(
                vllm_config=config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                enable_log_requests=engine_args.enable_log_requests,
                aggregate_engine_logging=engine_args.aggregate_engine_logging,
                disable_log_stats=engine_args.disable_log_stats,
                stat_loggers=None if engine_args.disable_log_stats else [PoolLogger],
            )
    except (ValueError, OSError) as error:
        raise StartError(f"{args.model} can't be served: {one_line(error)}", Exit.MODEL) from error
    except RuntimeError as error:
        if "Engine core initialization failed" not in str(error):
            raise
        if watch.error:
            raise watch.error from error
        raise StartError("the engine didn't start; its own messages above say why", Exit.ENGINE) from error
    try:
        desks.policies.resize(config.cache_config.block_size)  # beside layers with a state, vLLM makes pages larger
    except PolicyError as error:
        engine.shutdown()
        raise StartError(in_flags(error)) from None
    engine.door = Door(asyncio.get_running_loop())
    engine.desks = desks
    engine.metrics = CompressionMetrics(config.model_config.served_model_name)
    engine.audit_metrics = AuditMetrics(config.model_config.served_model_name)
    engine.decode_metrics = DecodeMetrics(config.model_config.served_model_name)
    engine.prefill_metrics = PrefillMetrics(config.model_config.served_model_name)
    return engine


def _desks(args: Namespace, default: dict[str, Any], platform: Platform, config: Any) -> Desks:
    """What checks requests, once vLLM's resolved configuration (`VllmConfig`) is known.

    Raises:
        StartError: the server's own policy, or a file that it was given, doesn't fit the model.
    """
    model = config.model_config
    shape = ModelShape(
        len(full_layers(config)),
        model.get_total_num_kv_heads(),
        config.parallel_config.tensor_parallel_size,
    )
    try:
        policies = PolicyDesk(default, config.cache_config.block_size, platform.unavailable, house_rules(args), shape)
    except PolicyError as error:
        raise StartError(in_flags(error)) from None
    if args.decode_calibration:
        cache = CacheShape(shape.num_layers, shape.num_kv_heads, model.get_head_size())
        read_calibration(args.decode_calibration, cache)
    if args.prefill_calibration:
        read_head_tables(
            args.prefill_calibration, (shape.num_layers, model.model_arch_config.total_num_attention_heads)
        )
    return Desks(policies, selector_desk(args, platform), pattern_desk(args, platform))
