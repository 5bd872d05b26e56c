"""`python -m benchmarks.crosscheck`: our kept sets beside kvpress' on the embedded model; docs/crosscheck.md.

Makes an environment of its own for kvpress the first time (about two minutes and 1.4 GB), so it is no part of CI.
Exit code 0 when every method agrees as far as `cases.py` says.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import AutoTokenizer

from benchmarks.crosscheck.agreement import Agreement
from benchmarks.crosscheck.cases import CASES, Case
from benchmarks.crosscheck.ours import Ours, Prompt
from benchmarks.quality.passkeys import make_suite, render
from server.embedded import EMBEDDED_MODEL_NAME, ensure_embedded_model

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent


def environment(folder: Path) -> Path:
    """The Python of kvpress' environment, made when it is missing or made from other requirements."""
    python, stamp = folder / "bin" / "python", folder / "longreach-requirements.txt"
    wanted = (HERE / "requirements.txt").read_text(encoding="utf-8")
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        print(f"making {folder} with kvpress", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        requirements = str(HERE / "requirements.txt")
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", requirements], check=True)
        stamp.write_text(wanted, encoding="utf-8")
    return python


def prompts(model: Path, documents: int, tokens: int) -> list[list[int]]:
    """Passkey documents with their questions, as a server renders them."""
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    suite = make_suite(tokenizer, tokens, documents, documents, seed=4)
    texts = [render(tokenizer, case.content) for case in suite]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def compare(dumps: list[Path]) -> dict[str, Agreement]:
    """Our choices beside the dumped ones, by case."""
    found = {case.name: Agreement() for case in CASES}
    for file in dumps:
        tensors = load_file(file)
        prompt = Prompt(*(tensors[name] for name in ("keys", "values", "queries", "rotary")))
        for case in CASES:
            budget = max(1, int(prompt.shape[2] * case.keep))
            found[case.name].add(Ours(case.words, prompt, budget), tensors[case.name])
        print(f"ours: {file.stem}", file=sys.stderr, flush=True)
    return found


def failures(case: Case, summary: dict[str, Any]) -> list[str]:
    """What is below the case's least values."""
    least = {"identical": case.identical, "overlap": case.overlap, "same_counts": float(case.same_counts)}
    found = [f"{key} is {summary[key]}, not {value}" for key, value in least.items() if summary[key] < value]
    if summary["score_gap"] > case.gap:
        found.append(f"tokens are exchanged whose scores differ by {summary['score_gap']}")
    return [f"{case.name}: {problem}" for problem in found]


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| method @share kept | identical sets | tokens both keep | lowest of a set | score gap | same counts |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, summary in summaries.items():
        lines.append(
            f"| {name} | {summary['identical']:.2%} | {summary['overlap']:.3%} | {summary['lowest_overlap']:.1%} "
            f"| {summary['score_gap']:.0e} | {summary['same_counts']:.0%} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=REPOSITORY / "results-local" / "crosscheck" / "venv")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1800, help="length of each prompt")
    parser.add_argument("--dumps", type=Path, help="keep kvpress' side there, 1.6 GB, and use it if it is there")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    model, python = ensure_embedded_model(), environment(args.venv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.dumps or Path(temporary)
        if not (folder / "versions.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / "prompts.json"
            file.write_text(json.dumps(prompts(model, args.documents, args.tokens)), encoding="utf-8")
            subprocess.run(
                [str(python), "-m", "benchmarks.crosscheck.dump", str(model), str(file), str(folder)],
                check=True, cwd=REPOSITORY, env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
        versions = json.loads((folder / "versions.json").read_text(encoding="utf-8"))
        found = compare([folder / f"{index}.safetensors" for index in range(args.documents)])
    summaries = {name: agreement.summary() for name, agreement in found.items()}
    print(table(summaries))
    problems = [problem for case in CASES for problem in failures(case, summaries[case.name])]
    print("\n".join(problems) or "all methods agree as far as cases.py says")
    if args.out:
        content = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": "python -m benchmarks.crosscheck",
            "model": EMBEDDED_MODEL_NAME,
            "dtype": "float32",
            "documents": args.documents,
            "tokens": args.tokens,
            "versions": versions,
            "cases": [
                {"name": c.name, "kvpress": c.press, "longreach": c.words, "kept": c.keep, **summaries[c.name]}
                for c in CASES
            ],
        }
        args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
