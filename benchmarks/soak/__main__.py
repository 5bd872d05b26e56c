"""Hours of everything at once: does a server stay whole? Any two requests at the same time, streams that clients cut,
aborts, preemptions in a small pool; and canaries whose answers never change.

python -m benchmarks.soak --minutes 30 --output soak.json [--model FOLDER] [--stock] [-- FLAGS OF longreach serve]

The server checks itself after every step (`--kv-audit 1`): blocks used are blocks owned, page tables have owned pages
alone, none twice, compacted lengths are the planned ones. Exit code 1 where anything is wrong. `--stock` asks vLLM's
own server, to tell what is ours from what is vLLM's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.loadtest.systems import runnable
from benchmarks.serving import longreach_command, running_command
from benchmarks.soak.adapter import write_adapter
from benchmarks.soak.report import plot, problems, summary
from benchmarks.soak.run import features_of, soak
from server.embedded import EMBEDDED_MODEL_NAME, ensure_embedded_model

LONG_ENOUGH = 8.0
"""Minutes from which memory's growth counts: before, caches of all kinds still fill."""
SELECTORS = ("recycled", "quest", "tidal", "lessismore")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="how long requests are begun (30)")
    parser.add_argument("--model", help="a folder; left out, the embedded model")
    parser.add_argument("--clients", type=int, default=16, help="that ask at the same time (16)")
    parser.add_argument("--longest", type=int, default=1500, help="tokens of a prompt, at most (1500)")
    parser.add_argument("--answer", type=int, default=120, help="tokens of an answer, at most (120)")
    parser.add_argument("--vocabulary", type=int, help="ids of random prompts; left out, the model's")
    parser.add_argument("--pause", type=float, default=5.0, help="seconds between two canaries (5)")
    parser.add_argument("--audit", type=int, default=1, metavar="N", help="steps between two checks of the engine (1)")
    parser.add_argument("--seed", type=int, default=0)
    # FlashAttention 3 has another kernel for rows that decode beside a prompt, unless heads are of 128
    # (benchmarks.gpu.invariance).
    parser.add_argument("--flash-attention", type=int, choices=(2, 3), default=2, help="version on GPUs; with 3 and "
                        "heads not of 128, canaries that answer otherwise are counted and not held against it "
                        "(2)")  # fmt: skip
    parser.add_argument("--stock", action="store_true", help="vLLM's own server instead: no fields, flags and audit of "
                        "ours, and, as its CPU build fails at these, no LoRA, seeds and prompt_logprobs")  # fmt: skip
    parser.add_argument("--no-adapters", dest="adapters", action="store_false", help="no LoRA")
    parser.add_argument("--output", type=Path, help="JSON; a picture of the same name is drawn where matplotlib is")
    parser.add_argument("--log", type=Path, help="where the server prints")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="more of longreach serve's")
    args = parser.parse_args()
    raise SystemExit(run(args))


def run(args: argparse.Namespace) -> int:
    cuda = torch.cuda.is_available()
    if cuda:  # vLLM's own switch: the same numbers in any batch
        os.environ.setdefault("VLLM_BATCH_INVARIANT", "1")
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or str(ensure_embedded_model())
        config = json.loads((Path(model) / "config.json").read_text())
        flags = ["--scheduling-policy", "priority"]
        attention = ["--attention-config", json.dumps({"flash_attn_version": args.flash_attention})]
        flags += attention if cuda else ["--dtype", "float32"]
        if not args.stock:
            flags += ["--kv-audit", str(args.audit), "--decode-selectors", *SELECTORS]
        elif not cuda:  # as ours are where nothing is said
            flags += ["--enforce-eager", "--block-size", "32"]
        if args.adapters and not args.stock:
            folders = {f"soak-{seed}": write_adapter(config, Path(scratch) / f"lora-{seed}", seed) for seed in (1, 2)}
            flags += ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--lora-modules"]
            flags += [f"{name}={folder}" for name, folder in folders.items()]
        log = args.log or Path(scratch) / "log"
        flags += ["--served-model-name", Path(args.model).name if args.model else EMBEDDED_MODEL_NAME]
        command = runnable(("vllm", "serve", model)) if args.stock else [*longreach_command(), "serve", model]
        with running_command(log, [*command, *flags, *args.flags], limit=600) as server:
            known: dict[str, Any] = {"longest": args.longest, "answer": args.answer, "stock": args.stock}
            features = features_of(server, vocabulary=args.vocabulary or config["vocab_size"], **known)
            print(f"{features}\n{' '.join([*flags, *args.flags])}", flush=True)
            result = soak(
                server, features, seconds=args.minutes * 60, clients=args.clients, seed=args.seed, pause=args.pause,
                progress=lambda line: print(line, flush=True),
            )  # fmt: skip
        errors = _errors(log)
    result = {
        "date": str(date.today()), "stock": args.stock, "model": features.model, "device": _device(cuda),
        "dtype": "auto" if cuda else "float32",
        "batch_invariant": os.environ.get("VLLM_BATCH_INVARIANT") == "1" if cuda else None,
        "flags": args.flags, "longest": features.longest, **result, "errors_in_log": errors,
    }  # fmt: skip
    result["failures"] += [f"the server's log: {line}" for line in errors]
    alike = bool(result["batch_invariant"]) and (args.flash_attention == 2 or config.get("head_dim") == 128)
    bad = problems(result, memory=args.minutes >= LONG_ENOUGH, canaries=not cuda or alike)
    result["problems"], result["summary"] = bad, summary(result, bad)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        try:
            plot(result, args.output.with_suffix(".png"))
        except ImportError:
            print("no picture: matplotlib isn't installed")
    print(*bad, result["summary"], sep="\n", flush=True)
    return 1 if bad else 0


def _device(cuda: bool) -> str:
    return torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} cores, {platform.machine()}"


def _errors(log: Path) -> list[str]:
    """Lines that tell of an error, the first few."""
    lines = log.read_text(errors="replace").splitlines()
    found = [line for line in lines if "Traceback" in line or "AuditError" in line or " ERROR " in line]
    return [line[:300] for line in found[:10]]


if __name__ == "__main__":
    main()
