"""No code comes with data unless asked for, and what faces requests and files has no hole that we know of."""

from __future__ import annotations

import pickle
from argparse import Namespace
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from kvcache.namm import Network
from server.calibration import CacheShape, read_calibration, read_head_tables
from server.errors import StartError

FIXED = {
    "aiohttp": ("3.12.14", "CVE-2025-53643, smuggled requests"),
    "h11": ("0.16.0", "CVE-2025-43859, smuggled requests"),
    "jinja2": ("3.1.6", "CVE-2025-27516, templates leave their sandbox"),
    "pillow": ("11.3.0", "CVE-2025-48379, a buffer overflow"),
    "protobuf": ("6.31.1", "CVE-2025-4565, recursion without an end"),
    "python-multipart": ("0.0.18", "CVE-2024-53981, time for broken forms"),
    "requests": ("2.32.4", "CVE-2024-47081, passwords sent to others"),
    "setuptools": ("78.1.1", "CVE-2025-47273, files outside a folder"),
    "starlette": ("0.49.1", "CVE-2025-62727, time for range headers"),
    "torch": ("2.6.0", "CVE-2025-32434, code from weights_only files"),
    "transformers": ("4.53.0", "CVE-2025-6921 and others, time for regular expressions"),
    "urllib3": ("2.6.0", "CVE-2025-66418, chains of compressions"),
}
"""By distribution, the first version without a hole that was published; by hand. `make audit` asks a database."""


@pytest.mark.parametrize("name", FIXED)
def test_known_holes_are_fixed(name: str) -> None:
    first, hole = FIXED[name]
    try:
        assert Version(version(name)) >= Version(first), hole
    except PackageNotFoundError:
        assert name == "aiohttp"  # vLLM's two builds don't both bring it


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_weights_run_no_code(name: str, tmp_path: Path) -> None:
    from vllm.model_executor.model_loader.weight_utils import pt_weights_iterator

    mark, file = tmp_path / "it ran", tmp_path / name
    torch.save({"weight": torch.ones(1), "evil": Evil(mark)}, file)
    torch.load(file, weights_only=False)
    assert mark.exists()  # the pickle works
    mark.unlink()
    with pytest.raises(pickle.UnpicklingError):
        list(pt_weights_iterator([str(file)], use_tqdm_on_load=False))
    assert not mark.exists()


def test_our_own_files_are_no_pickles(tmp_path: Path) -> None:
    mark, file = tmp_path / "it ran", tmp_path / "file"
    torch.save(Evil(mark), file)
    with pytest.raises(StartError):
        read_calibration(str(file), CacheShape(2, 2, 32))
    with pytest.raises(StartError):
        read_head_tables(str(file), (2, 4))
    with pytest.raises(ValueError):
        Network.load(str(file))
    assert not mark.exists()


def test_what_runs_code_is_off(parse: Callable[..., Namespace], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs

    for name in ("VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_SERVER_DEV_MODE"):
        monkeypatch.delenv(name, raising=False)
        assert not getattr(envs, name)
    args = parse("m")
    assert not args.trust_remote_code and not args.trust_request_chat_template and not args.enable_prompt_embeds
    assert args.host == "127.0.0.1"
