"""What a person is told of a mistake on the command line: before vLLM is imported, in one line, with the remedy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from server.early import check_early
from server.errors import StartError

ROOT = Path(__file__).resolve().parents[2]
FILES = {"text.txt": "hello", "gates.json": '{"a": 1}', "ragged.tsv": "1 2\n3\n", "empty.tsv": "",
         "nope.yaml": "kv-policy: nope\n", "list.yaml": "- kv-policy\n", "torn.yaml": "kv-policy: [",
         "budget.yaml": "kv_budget: 25%\n", "server.toml": "a = 1"}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where these mistakes are made."""
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "bare").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--kv-policy nope", ("--kv-policy: unknown policy 'nope'", "snapkv")),
        ("--kv_policy=nope", ("--kv-policy: unknown policy 'nope'",)),
        ("--kv-budget 25%", ("--kv-budget without a policy", "--kv-policy NAME")),
        ("--kv-policy snapkv --kv-budget 0", ("--kv-budget", ">= 1", "25%")),
        ("--kv-policy snapkv --kv-budget 150%", ("--kv-budget", "up to 100%")),
        ("--kv-policy snapkv --kv-budget lots", ("--kv-budget", "'lots'")),
        ("--kv-policy snapkv --kv-budget 9", ("--kv-budget: 9 is too small", ">= ")),
        ("--kv-policy snapkv --kv-window big", ("--kv-window", "'big'", "integer >= 1")),
        ("--kv-policy snapkv --kv-kernel 4", ("--kv-kernel", "odd")),
        ("--kv-policy snapkv --kv-pooling min", ("--kv-pooling", "'avg', 'max', 'none'")),
        ("--kv-policy snapkv --kv-recent 4", ("--kv-recent", "snapkv takes --kv-budget")),
        ("--kv-policy snapkv --kv-layers flat", ("--kv-layers", "'flat'", "pyramid")),
        ("--kv-policy adakv --kv-interval 128", ("--kv-interval", "heads differ in length")),
        ("--kv-policy duoattention", ("--kv-gates", "--kv-head-gates FILE")),
        ("--kv-policy namm", ("--kv-policy", "--kv-namm-weights FILE")),
        ("--kv-namm-weights text.txt", ("--kv-namm-weights", "text.txt", "safetensors")),
        ("--kv-namm-weights none.safetensors", ("--kv-namm-weights", "none.safetensors")),
        ("--kv-always-keep 5000", ("--kv-always-keep: 5000", "0 to 1024")),
        ("--kv-head-gates none.tsv", ("--kv-head-gates none.tsv", "No such file")),
        ("--kv-head-gates gates.json", ("--kv-head-gates gates.json", "a row of numbers a layer")),
        ("--kv-head-gates ragged.tsv", ("--kv-head-gates ragged.tsv: layer 2 has 1 gates, the first 2",)),
        ("--kv-head-gates empty.tsv", ("--kv-head-gates empty.tsv", "no numbers")),
        ("--decode-attention nope", ("--decode-attention", "'nope'", "quest")),
        ("--decode-attention loki", ("--decode-attention", "loki", "--decode-calibration FILE")),
        ("--decode-tokens 64", ("--decode-tokens without a selector", "--decode-attention NAME")),
        ("--decode-attention quest --decode-tokens 0", ("--decode-tokens", ">= ")),
        ("--decode-attention quest --decode-stride 5", ("--decode-stride", "quest takes --decode-tokens")),
        ("--decode-attention tidal --kv-policy snapkv", ("--decode-attention: tidal needs a whole cache", "quest")),
        ("--decode-selectors tide", ("--decode-selectors: tide", "tidal")),
        ("--decode-states 0", ("--decode-states: 0", "1 or more")),
        ("--decode-calibration text.txt", ("--decode-calibration", "text.txt", "`longreach calibrate`")),
        ("--decode-calibration none.safetensors", ("--decode-calibration", "none.safetensors")),
        ("--prefill-attention nope", ("--prefill-attention", "'nope'", "flexprefill")),
        ("--prefill-gamma 0.9", ("--prefill-gamma without a pattern", "--prefill-attention NAME")),
        ("--prefill-attention delta --prefill-base streaming", ("--prefill-base", '{"pattern": "streaming"}')),
        ("--prefill-warm-up nope", ("--prefill-warm-up: nope", "flexprefill")),
        ("--prefill-calibration text.txt", ("--prefill-calibration", "text.txt", "`longreach calibrate --prefill`")),
        ("--config", ("--config takes one file",)),
        ("--config none.yaml", ("--config none.yaml", "No such file")),
        ("--config=server.toml", ("server.toml", ".yaml or .yml")),
        ("--config list.yaml", ("list.yaml", "kv-policy: snapkv")),
        ("--config torn.yaml", ("--config torn.yaml",)),
        ("--config nope.yaml", ("--kv-policy: unknown policy 'nope'",)),
        ("--config budget.yaml", ("--kv-budget without a policy",)),
        ("/no/such/model", ("/no/such/model doesn't exist", "OWNER/NAME")),
        ("./bare --port 80", ("./bare holds no model", "config.json")),
        ("bare", ("bare holds no model", "config.json")),
    ],
)
@pytest.mark.usefixtures("folder")
def test_mistakes_are_told_with_the_remedy(line: str, words: tuple[str, ...]) -> None:
    with pytest.raises(StartError) as caught:
        check_early(line.split())
    told = str(caught.value)
    assert "\n" not in told and all(word in told for word in words), told


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--help --kv-policy nope",
        "--kv-policy snapkv --kv-budget 25% --decode-selectors quest tidal --prefill-attention streaming --port 8000",
        "OWNER/NAME --kv-policy l2norm --tensor-parallel-size 2 --decode-selectors lessismore",
        "--kv-cache-dtype fp8 --kv-transfer-config {} --decode-context-parallel-size 2",
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_is_right_or_not_ours_passes(line: str) -> None:
    check_early(line.split())


@pytest.mark.parametrize("command", ["serve", "explain text.txt", "doctor"])
def test_nothing_slow_is_imported_before(command: str, folder: Path) -> None:
    code = """import atexit, sys
from server.cli import main
atexit.register(lambda: print("vllm" in sys.modules))
main(sys.argv[1:])"""
    argv = [*command.split(), "--kv-policy", "nope"]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=folder, env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr.startswith("longreach: --kv-policy: unknown policy 'nope'.") and done.stderr.count("\n") == 1
