"""Start vLLM's OpenAI application with our engine client and plug-in."""

from __future__ import annotations

import os
import signal
from argparse import Namespace
from importlib.metadata import entry_points
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.entry import build_and_serve
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.usage.usage_lib import UsageContext

from server.engine import LongreachLLM
from server.metrics import CompressionMetrics
from server.platforms import Platform
from server.policies import PolicyDesk
from server.refusals import refuse_config

_PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.platform_plugins", "vllm.io_processor_plugins",
                  "vllm.stat_logger_plugins")  # fmt: skip


def allow_plugin() -> None:
    """Put our endpoint plug-in on vLLM's list of allowed plug-ins, which it reads from the environment.

    vLLM loads all other kinds of plug-ins when there is no list, so a list of ours has to name those too.
    """
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None:
        names = {entry.name for group in _PLUGIN_GROUPS for entry in entry_points(group=group)}
    else:
        names = {name for name in allowed.split(",") if name}
    os.environ["VLLM_PLUGINS"] = ",".join(sorted(names | {"longreach"}))


async def serve(args: Namespace, default: dict[str, Any], platform: Platform) -> None:
    """Run the server until it is told to stop.

    Args:
        args: vLLM's arguments.
        default: policy of requests that name none.
        platform: where we run.

    Raises:
        Unsupported: the configuration can't be combined with compression.
        PolicyError: the default policy doesn't fit the engine.
    """

    def interrupt(*_: Any) -> None:  # until uvicorn installs its own handler
        raise KeyboardInterrupt("terminated")

    signal.signal(signal.SIGTERM, interrupt)
    if args.tool_parser_plugin and len(args.tool_parser_plugin) > 3:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin and len(args.reasoning_parser_plugin) > 3:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    allow_plugin()
    address, sock = setup_server(args, reuse_port=False)
    engine = None
    try:
        engine_args = AsyncEngineArgs.from_cli_args(args)
        config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        if platform.unavailable is None:
            refuse_config(config)
        desk = PolicyDesk(default, config.cache_config.block_size, platform.unavailable)
        engine = LongreachLLM.from_vllm_config(
            vllm_config=config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            enable_log_requests=engine_args.enable_log_requests,
            aggregate_engine_logging=engine_args.aggregate_engine_logging,
            disable_log_stats=engine_args.disable_log_stats,
        )
        engine.desk = desk
        engine.metrics = CompressionMetrics((args.served_model_name or [config.model_config.model])[0])
        shutdown = await build_and_serve(engine, address, sock, args)
        await shutdown
    finally:
        if engine is not None:
            engine.shutdown(timeout=config.shutdown_timeout)
        sock.close()
