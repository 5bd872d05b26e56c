"""The command `longreach`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path



def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {"serve": _serve, "policies": _policies, "doctor": _doctor}
    if argv and argv[0] in commands:
        commands[argv[0]](argv)
        return
    if argv[:1] in (["--version"], ["-V"]):
        from importlib.metadata import version

        print(version("longreach"))
        return
    print(USAGE)
    if argv[:1] not in ([], ["-h"], ["--help"], ["help"]):
        raise SystemExit(f"longreach: unknown command {argv[0]!r}; there are {', '.join(commands)}")


USAGE = """usage: longreach COMMAND ...

  serve [MODEL] [--kv-policy NAME] [--kv-budget TOKENS|RATIO%] [--kv-...] [--config FILE] [any vllm serve flag]
        serve MODEL (left out: a small embedded one) over the OpenAI API; --help lists all flags
  policies [--json]
        the KV-cache policies with their arguments, defaults, needs and papers
  doctor
        what this machine can run, and why not"""


def _serve(argv: list[str]) -> None:
    from server.refusals import Unsupported, refuse_args

    model = _named_model(argv)
    argv = argv if model else _with_embedded(argv)

    from kvcache.registry import PolicyError
    from kvcache.vllm_adapter.compat import IncompatibleVLLM, check
    from server.platforms import detect, prepare
    from server.settings import add_flags, default_policy

    try:
        platform = detect()
        check(cpu=platform.name == "cpu")
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
        from vllm.logger import configure_logging_from_args
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        cli_env_setup()
        parser = FlexibleArgumentParser(prog="longreach", description="vLLM's server with KV-cache compression.")
        serve_parser = parser.add_subparsers(dest="command").add_parser("serve")
        make_arg_parser(serve_parser)
        add_flags(serve_parser)
        serve_parser.set_defaults(host="127.0.0.1", **({"enforce_eager": True} if platform.name == "cpu" else {}))
        args = parser.parse_args(argv)
        args.model = args.model_tag or args.model
        args.subparser = "serve"
        refuse_args(args)
        configure_logging_from_args(args)
        validate_parsed_serve_args(args)
        default = default_policy(args)
        prepare(args, platform)

        import uvloop

        from server.app import serve

        uvloop.run(serve(args, default, platform))
    except (Unsupported, IncompatibleVLLM, PolicyError) as error:
        raise SystemExit(f"longreach: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _named_model(argv: list[str]) -> bool:
    """Whether the command line or its config file names a model."""
    if len(argv) > 1 and not argv[1].startswith("-"):
        return True
    if any(arg == "--model" or arg.startswith("--model=") for arg in argv) or {"-h", "--help"} & set(argv):
        return True
    if any(arg.startswith("--help=") for arg in argv):
        return True
    if "--config" in argv[:-1]:
        import yaml

        content = yaml.safe_load(Path(argv[argv.index("--config") + 1]).read_text())
        return isinstance(content, dict) and "model" in content
    return False


def _with_embedded(argv: list[str]) -> list[str]:
    """The command line for the embedded model: its folder, its name, and a small KV cache of 1 GiB."""
    from server.embedded import EMBEDDED_MODEL_NAME, EmbeddedModelError, ensure_embedded_model

    try:
        folder = ensure_embedded_model()
    except EmbeddedModelError as error:
        raise SystemExit(f"longreach: {error}") from None
    extra = ["--served-model-name", EMBEDDED_MODEL_NAME] if "--served-model-name" not in argv else []
    sized = {"--kv-cache-memory-bytes", "--gpu-memory-utilization", "--num-gpu-blocks-override"}
    if not sized & {arg.partition("=")[0] for arg in argv}:
        extra += ["--kv-cache-memory-bytes", str(1 << 30)]
    return ["serve", str(folder), *extra, *argv[1:]]


def _policies(argv: list[str]) -> None:
    from kvcache.registry import policies

    if "--json" in argv:
        print(json.dumps([policy.describe() for policy in policies().values()], indent=2))
        return
    print("none\n    Keep everything: stock vLLM.")
    for policy in policies().values():
        description = policy.describe()
        print(f"\n{policy.name}\n    {description['title']} ({policy.paper})")
        needs = f"needs: {description['evidence']}"
        needs += ", looks at the question" if policy.query_aware else ""
        print(f"    {needs}{', layers differ in length' if policy.layer_lengths_differ else ''}")
        for name, schema in description["arguments"]["properties"].items():
            print(f"      {name} = {schema['default']!r:12} {schema.get('description', '')}")


def _doctor(argv: list[str]) -> None:
    from server.doctor import examine

    argparse.ArgumentParser(prog="longreach doctor").parse_args(argv[1:])
    findings = examine()
    for finding in findings:
        print(f"{'ok ' if finding.ok else 'NO '} {finding.text}")
    raise SystemExit(0 if all(finding.ok or not finding.needed for finding in findings) else 1)



if __name__ == "__main__":
    main()
