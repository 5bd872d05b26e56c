"""`longreach serve`."""

from __future__ import annotations

import argparse

from server.commands.ending import start_errors

SUPERVISE = "--supervise"


def parser() -> argparse.ArgumentParser:
    from server.arguments import make_parser
    from server.platforms import detect

    return make_parser(detect())


def run(argv: list[str]) -> None:
    if SUPERVISE in argv and not {"-h", "--help"} & {*argv}:
        from server.supervisor import supervise

        raise SystemExit(supervise([word for word in argv if word != SUPERVISE]))
    from kvcache.vllm_adapter.compat import check
    from server.errors import StartError
    from server.platforms import NO_DEVICE, detect, prepare

    with start_errors():
        from server.early import check_early

        check_early(argv)
        check()
        platform = detect()
        check(platform.name)
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
        from vllm.logger import configure_logging_from_args

        from server.arguments import parse, resolve_model
        from server.decode_settings import pass_selectors
        from server.prefill_settings import pass_patterns
        from server.refusals import refuse_args
        from server.settings import default_policy, pass_audit, pass_weights

        cli_env_setup()
        args = parse(argv, platform)
        if platform.name == NO_DEVICE:
            raise StartError(f"{platform.unavailable}")
        configure_logging_from_args(args)
        refuse_args(args, compresses=platform.unavailable is None)
        prepare(args, platform)
        default = default_policy(args, platform)
        pass_weights(args)
        pass_audit(args)
        pass_selectors(args, platform, default)
        pass_patterns(args, platform)
        resolve_model(args)

        import uvloop

        from server.app import serve

        uvloop.run(serve(args, default, platform))
