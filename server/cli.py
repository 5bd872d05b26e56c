"""The command `longreach`.

Exit codes: 0 done; 1 something failed; 2 the command line, the configuration or the model can't be served as asked;
130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

USAGE = """usage: longreach COMMAND ...

  serve [MODEL] [--kv-policy NAME] [--kv-...] [--decode-attention NAME] [--decode-...] [--config FILE]
        [any vllm serve flag]
        serve MODEL (left out: a small embedded one) over the OpenAI API; --help lists all flags
  policies [--json]
        the KV-cache policies with their arguments, defaults, needs and papers
  selectors [--json]
        the selectors of what decoding reads, likewise
  patterns [--json]
        the patterns of what is computed of a prompt's attention, likewise
  explain PROMPT_FILE|- [--output FILE.png|FILE.html] [--kv-policy NAME] [--kv-...] [--model MODEL]
        which tokens of a prompt a policy keeps, by layer, head and position
  head-gates PROMPT_FILE... --output FILE [--model MODEL]
        measure which KV heads look far, for the policy duoattention
  calibrate PROMPT_FILE... --output FILE.safetensors [--model MODEL] [--rank N]
            [--selection-layers N] [--progress]
        measure what some selectors have to know of a model
  eval run [SWEEP.yaml] --out DIR [--url URL | --model MODEL] | report DIR | docs SUMMARY.json
        measure what policies, selectors and patterns lose, on this or any other OpenAI endpoint
  doctor [MODEL] [any flag of serve]
        what this machine can run, or what a model can use on it, and why not"""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script.

    Raises:
        SystemExit: with the exit code, except after success.
    """
    argv = sys.argv[1:] if argv is None else argv
    commands = {
        "serve": _serve,
        "policies": _policies,
        "selectors": _selectors,
        "patterns": _patterns,
        "explain": _explain,
        "head-gates": _head_gates,
        "calibrate": _calibrate,
        "eval": _eval,
        "doctor": _doctor,
    }
    if argv and argv[0] in commands:
        commands[argv[0]](argv[1:])
    elif argv[:1] in (["--version"], ["-V"]):
        from importlib.metadata import version

        print(version("longreach"))
    else:
        print(USAGE)
        if argv[:1] not in ([], ["-h"], ["--help"], ["help"]):
            _fail(f"unknown command {argv[0]!r}; there are {', '.join(commands)}")


def _fail(message: object) -> NoReturn:
    print(f"longreach: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def _start_errors() -> Iterator[None]:
    """What may be wrong with a command line, a model or this machine ends in one line and exit code 2."""
    from attention_plugins.decode.registry import selectors
    from attention_plugins.prefill.registry import patterns
    from kvcache.registry import policies
    from kvcache.vllm_adapter.compat import IncompatibleVLLM, check
    from server.embedded import EmbeddedModelError
    from server.errors import StartError, one_line

    try:
        policies()
        selectors()
        patterns()
    except (ValueError, ImportError, AttributeError) as error:
        _fail(f"a package with a KV-cache policy, a selector or a pattern can't be used: {one_line(error)}")
    try:
        check()
        yield
    except (StartError, IncompatibleVLLM, EmbeddedModelError) as error:
        logging.getLogger("vllm").debug("why:", exc_info=True)
        _fail(one_line(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _serve(argv: list[str]) -> None:
    from kvcache.vllm_adapter.compat import check
    from server.errors import StartError
    from server.platforms import NO_DEVICE, detect, prepare

    with _start_errors():
        platform = detect()
        check(platform.name)
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
        from vllm.logger import configure_logging_from_args

        from server.arguments import parse, resolve_model
        from server.decode_settings import pass_selectors
        from server.prefill_settings import pass_patterns
        from server.refusals import refuse_args
        from server.settings import default_policy, pass_weights

        cli_env_setup()
        args = parse(argv, platform)
        if platform.name == NO_DEVICE:
            raise StartError(f"{platform.unavailable}")
        configure_logging_from_args(args)
        refuse_args(args, compresses=platform.unavailable is None)
        prepare(args, platform)
        default = default_policy(args, platform)
        pass_weights(args)
        pass_selectors(args, platform, default)
        pass_patterns(args, platform)
        resolve_model(args)

        import uvloop

        from server.app import serve

        uvloop.run(serve(args, default, platform))


def _explain(argv: list[str]) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # the answer is what is printed, not how vLLM starts
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    with _start_errors():
        from server.explain import explain

        text = explain(argv)
    with _reader_may_leave():
        print(text)


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    """End quietly when the output goes to a program, such as head, that has read enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer would fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _policies(argv: list[str]) -> None:
    as_json = _asks_for_json(argv, "policies", "List the KV-cache policies.")

    from kvcache.registry import NONE, policies

    def needs(policy: dict[str, Any]) -> str:
        asks = f"{policy['evidence']}{', looks at the question' if policy['query_aware'] else ''}"
        return f"{asks}{', layers differ in length' if policy['layer_lengths_differ'] else ''}"

    _list(policies(), as_json, f"{NONE}\n    Keep everything: stock vLLM.", needs)


def _selectors(argv: list[str]) -> None:
    as_json = _asks_for_json(argv, "selectors", "List the selectors: what each step of decoding reads of the cache.")

    from attention_plugins.decode.registry import DENSE, selectors
    from server.selectors import needs_of

    def needs(selector: dict[str, Any]) -> str:
        return ", ".join(needs_of(selector)) or "nothing"

    _list(selectors(), as_json, f"{DENSE}\n    Read everything: stock vLLM.", needs)


def _patterns(argv: list[str]) -> None:
    as_json = _asks_for_json(argv, "patterns", "List the patterns: what is computed of a prompt's attention.")

    from attention_plugins.prefill.registry import DENSE, patterns
    from server.patterns import needs_of

    def needs(pattern: dict[str, Any]) -> str:
        return ", ".join(needs_of(pattern)) or "nothing"

    _list(patterns(), as_json, f"{DENSE}\n    Attend to everything: stock vLLM.", needs)


def _asks_for_json(argv: list[str], command: str, description: str) -> bool:
    parser = argparse.ArgumentParser(prog=f"longreach {command}", description=description)
    parser.add_argument("--json", action="store_true", help="as JSON, with every argument's schema")
    return bool(parser.parse_args(argv).json)


def _list(known: Mapping[str, Any], as_json: bool, first: str, needs: Callable[[dict[str, Any]], str]) -> None:
    """Print methods with their arguments, behind what stands for none of them."""
    described = [method.describe() for method in known.values()]
    with _reader_may_leave():
        if as_json:
            print(json.dumps(described, indent=2))
            return
        print(first)
        for method in described:
            print(f"\n{method['name']}\n    {method['title']} ({method['paper']})")
            print(f"    needs: {needs(method)}")
            for name, schema in method["arguments"]["properties"].items():
                value = repr(schema["default"]) if "default" in schema else "(needed)"
                print(f"      {name} = {value:12} {schema.get('description', '')}")


def _head_gates(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="longreach head-gates",
        description="Measure, without training, which KV heads of a model look beyond the first and the last tokens, "
        "and write a table for `longreach serve --kv-head-gates`.",
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT_FILE", help="a long text, sent as a user's message")
    parser.add_argument("--output", required=True, metavar="FILE", help="table of numbers, a row a layer (TSV)")
    parser.add_argument("--model", help="folder or repository; left out, the embedded model")
    parser.add_argument("--sinks", type=int, default=64, help="first tokens that count as near (64)")
    parser.add_argument("--recent", type=int, default=256, help="last tokens that count as near (256)")
    parser.add_argument("--window", type=int, default=32, help="last queries that are looked at (32)")
    parser.add_argument("--progress", action="store_true", help="show how far it is")
    args = parser.parse_args(argv)

    from server.embedded import EmbeddedModelError, ensure_embedded_model
    from server.errors import StartError, one_line
    from server.gates import write_gates
    from server.head_gates import Reach, gates_of_texts
    from server.watching import read_texts

    if args.sinks < 0 or args.recent < 0 or args.window < 1:
        parser.error("--sinks and --recent can't be negative, --window is at least 1")
    try:
        texts = read_texts(args.prompts)
        model = args.model or str(ensure_embedded_model())
        reach = Reach(args.sinks, args.recent, args.window)
        write_gates(args.output, gates_of_texts(model, texts, reach, bar=args.progress))
    except (StartError, EmbeddedModelError, OSError) as error:
        _fail(one_line(error))


def _calibrate(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="longreach calibrate",
        description="Measure, without training, what the selectors loki, tidal and lessismore have to know of a model, "
        "and write a file for `longreach serve --decode-calibration`. (--prefill: what minference has to know.)",
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT_FILE", help="a long text, sent as a user's message")
    parser.add_argument("--output", required=True, metavar="FILE", help="where to write it (.safetensors)")
    parser.add_argument("--model", help="folder or repository; left out, the embedded model")
    parser.add_argument("--rank", type=int, default=32, help="directions of each KV head's keys, for loki (32)")
    parser.add_argument(
        "--selection-layers", type=int, default=2, help="layers that select for others, for tidal and lessismore (2)"
    )
    parser.add_argument(
        "--prefill",
        action="store_true",
        help="measure, on one text, what the prefill pattern minference has to know instead: a file for "
        "`longreach serve --prefill-calibration`",
    )
    parser.add_argument(
        "--density", type=float, default=0.1, help="with --prefill: most that a head may compute of its attention (0.1)"
    )
    parser.add_argument("--progress", action="store_true", help="show how far it is")
    args = parser.parse_args(argv)
    if args.prefill and len(args.prompts) > 1:
        parser.error("--prefill takes one text")

    from server.calibrate import calibrate
    from server.embedded import EmbeddedModelError, ensure_embedded_model
    from server.errors import StartError, one_line
    from server.head_tables import calibrate_heads, summary
    from server.watching import read_texts

    try:
        texts = read_texts(args.prompts)
        model = args.model or str(ensure_embedded_model())
        if args.prefill:
            told = summary(calibrate_heads(model, texts[0], args.output, args.density, bar=args.progress))
        else:
            layers = args.selection_layers
            told = calibrate(model, texts, args.output, args.rank, selection_layers=layers, bar=args.progress).summary()
    except (StartError, EmbeddedModelError) as error:
        _fail(one_line(error))
    with _reader_may_leave():
        print(told)


def _eval(argv: list[str]) -> None:
    from benchmarks.evaluation.cli import main as evaluate

    with _reader_may_leave():
        code = evaluate(argv)
    if code:
        raise SystemExit(code)


def _doctor(argv: list[str]) -> None:
    """Without a model, look at this machine; with one, at what it can use here."""
    if argv in (["-h"], ["--help"]):
        print("usage: longreach doctor [MODEL [flags of longreach serve]]\n\nSay what this machine can run, or what a "
              "model can use on it, from its configuration alone.")  # fmt: skip
        return
    from server.doctor import examine, examine_model

    if argv:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        with _start_errors():
            findings = examine_model(argv)
    else:
        findings = examine()
    with _reader_may_leave():
        for finding in findings:
            print(f"{'ok ' if finding.ok else 'NO '} {finding.text}")
    if any(finding.needed and not finding.ok for finding in findings):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
