"""The command line of `longreach serve`: vLLM's flags and ours, from argv and a config file."""

from __future__ import annotations

import difflib
from argparse import Namespace
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser

from server.access.settings import add_access_flags
from server.commands.parsers import epilog
from server.config_file import read_config, split_config
from server.console import add_console_flags
from server.decode_settings import add_decode_flags
from server.early import check_folder
from server.embedded import EMBEDDED_MODEL_NAME, ensure_embedded_model
from server.embedded_models import NAMED, SMOLLM2
from server.errors import StartError, one_line
from server.flags import On, add_setting
from server.limits import add_limit_flags
from server.platforms import NO_DEVICE, Platform, stand_in
from server.prefill_settings import add_prefill_flags
from server.settings import add_flags

EMBEDDED_CACHE_BYTES = 1 << 30
"""KV cache of the embedded model: 46 000 tokens, five prompts of its full length."""

DRAIN_SECONDS = 25
"""What a server that is told to stop gives the requests under way: 5 s are left of the 30 of Kubernetes."""

_SUPERVISE = (
    "Start the server again when it ends without being told to, such as when its engine dies. Leave it out where "
    "something else does: Kubernetes, systemd, docker run --restart. On the command line only."
)


class _Parser(FlexibleArgumentParser):
    """vLLM's parser, with a proposal for a flag that doesn't exist."""

    def error(self, message: str) -> None:
        unknown, found, rest = message.partition("unrecognized arguments: ")
        if found and not unknown:
            flag = rest.split()[0].partition("=")[0].replace("_", "-")
            if near := difflib.get_close_matches(flag, self._option_string_actions, n=1):
                message += f" (did you mean {near[0]}?)"
        super().error(message)


def make_parser(platform: Platform, command: str = "serve") -> FlexibleArgumentParser:
    """vLLM's `serve` parser with our flags and defaults: local host, and eager mode on CPUs.

    Args:
        command: ours that takes these flags, for messages.
    """
    if platform.name == NO_DEVICE:
        stand_in()
    # Not a subcommand "serve": for one of that name vLLM's parser insists on a model before it reads the rest.
    parser = _Parser(
        prog=f"longreach {command}",
        usage=f"longreach {command} {'[MODEL]' if command == 'serve' else '...'} [flags]",
        description="vLLM's OpenAI server, with policies, selectors and patterns chosen per\nrequest. Serves "
        f"{EMBEDDED_MODEL_NAME} when no model is named.\n\n--help=Policies  a group's flags    --help=kv-budget  "
        "flags by name    --help=all",
        epilog=epilog(
            "longreach serve --port 8123",
            "longreach serve ./models/llama --kv-policy snapkv --kv-budget 25% --decode-selectors quest recycled",
            "longreach serve --config server.yaml",
        ),
    )
    add_flags(parser)  # before vLLM's, since help lists groups in their order
    add_decode_flags(parser)
    add_prefill_flags(parser)
    add_limit_flags(parser)
    add_console_flags(parser)
    add_access_flags(parser)
    group = parser.add_argument_group("Supervision", "Who starts the server again when its engine has died.")
    add_setting(group, "--supervise", _SUPERVISE, On)
    make_arg_parser(parser)
    eager = {"enforce_eager": True} if platform.name == "cpu" else {}
    parser.set_defaults(model=None, host="127.0.0.1", shutdown_timeout=DRAIN_SECONDS, **eager)
    return parser


def parse(argv: list[str], platform: Platform, command: str = "serve") -> Namespace:
    """Read the command line and its config file; `model` is None when neither names one.

    Raises:
        StartError: the config file can't be read, or flags contradict each other.
        SystemExit: an unknown flag or a value of the wrong type, by argparse; and after `--help`.
    """
    argv = split_config(argv)
    read_config(argv)
    args: Namespace = make_parser(platform, command).parse_args(argv)
    if args.supervise:  # the command takes it out before it gets here
        raise StartError("--supervise goes on the command line of `longreach serve`, not in a config file")
    args.model = args.model_tag or args.model
    args.subparser = "serve"  # some of vLLM's checks ask for it
    try:
        validate_parsed_serve_args(args)
    except (ValueError, TypeError, KeyError, OSError, VLLMValidationError) as error:
        raise StartError(one_line(error)) from error
    return args


def resolve_model(args: Namespace) -> None:
    """Put an embedded model where it, or none, is named, with its name and a small KV cache; unpacks it the first time.

    Raises:
        StartError: the model is a folder that doesn't exist or holds none.
        EmbeddedModelError: the embedded model can't be provided.
    """
    if args.model is None or (args.model in NAMED and not Path(args.model).exists()):
        model = SMOLLM2 if args.model is None else NAMED[args.model]
        args.model = str(ensure_embedded_model() if model is SMOLLM2 else ensure_embedded_model(model=model))
        args.served_model_name = args.served_model_name or [model.name]
        sized: list[Any] = [args.kv_cache_memory_bytes, args.num_gpu_blocks_override]
        if sized == [None, None] and args.gpu_memory_utilization == AsyncEngineArgs.gpu_memory_utilization:
            args.kv_cache_memory_bytes = EMBEDDED_CACHE_BYTES
        return
    check_folder(args.model)
