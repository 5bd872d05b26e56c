"""Refusals against vLLM's own configurations, made from tiny `config.json` files without loading a model."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from server import rules
from server.errors import StartError
from server.model_layers import CHUNKED, FULL, SLIDING, full_layers, layer_kinds
from server.refusals import Unsupported, refuse_args, refuse_config
from tests.models.zoo import COMMON, MAX_LEN, ZOO

TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 256, "max_position_embeddings": 512, "dtype": "bfloat16",
}  # fmt: skip
LLAMA = {**TINY, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
MISTRAL = {**TINY, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 128}
GRANITE = {
    **TINY, "model_type": "granite", "architectures": ["GraniteForCausalLM"], "layer_types": ["full_attention"] * 2,
}  # fmt: skip
GEMMA = {
    **TINY, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "sliding_window": 128, "head_dim": 32,
}  # fmt: skip
LLAMA4 = {
    **TINY, "model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"], "attention_chunk_size": 128,
    "num_local_experts": 2, "head_dim": 32,
}  # fmt: skip
FALCON_H1 = {
    **TINY, "model_type": "falcon_h1", "architectures": ["FalconH1ForCausalLM"], "mamba_d_ssm": 64, "mamba_n_heads": 2,
    "mamba_d_head": 32,
}  # fmt: skip
Configure = Callable[..., Any]
RUNNERS = {"cpu": "0", "cuda": "1"}
"""Whether vLLM runs its Model Runner V2 there."""


@pytest.fixture(scope="module")
def configure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Configure]:
    """Make vLLM's configuration for a model's `config.json` and engine arguments."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.model_executor.models import registry

    with pytest.MonkeyPatch.context() as patch:
        # vLLM asks each model class for its features in a process of its own (10 s each).
        patch.setattr(registry, "_run_in_subprocess", lambda ask: ask())

        def run(content: dict[str, Any], **engine_args: Any) -> Any:
            folder = tmp_path_factory.mktemp("model")
            (folder / "config.json").write_text(json.dumps(content))
            return AsyncEngineArgs(
                model=str(folder), load_format="dummy", skip_tokenizer_init=True, enforce_eager=True, block_size=32,
                **engine_args,
            ).create_engine_config()  # fmt: skip

        yield run


def refuse(config: Any, platform: str, runner: str | None = None) -> None:
    """As on this platform, with its model runner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner or RUNNERS[platform])
        refuse_config(config, platform)


def refused(config: Any, platform: str, runner: str | None = None) -> str:
    with pytest.raises(Unsupported) as caught:
        refuse(config, platform, runner)
    message = str(caught.value)
    assert "\n" not in message and "vllm serve" in message
    return message.split(": ", 1)[1].rsplit(". Leave", 1)[0]


def cache(platform: str, dtype: str) -> str:
    """What is said of a KV cache that this platform doesn't take."""
    taken = {"cpu": "auto, float16, bfloat16", "cuda": "auto, float16, bfloat16, fp8, fp8_e4m3"}
    return f"this KV cache on this platform (--kv-cache-dtype {dtype}; {taken[platform]})"


@pytest.mark.parametrize(
    ("content", "engine_args"),
    [
        (LLAMA, {}),
        (LLAMA, {"kv_cache_dtype": "bfloat16"}),
        ({**TINY, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "sliding_window": 128,
          "use_sliding_window": False}, {}),
        (MISTRAL, {"disable_sliding_window": True}),
        (GEMMA, {"disable_sliding_window": True}),
        ({**MISTRAL, "sliding_window": None}, {}),
        (GRANITE, {}),
        (GEMMA, {}),
        ({**TINY, "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "num_local_experts": 4,
          "sliding_window": 128, "head_dim": 32}, {}),
        ({**LLAMA4, "layer_types": ["chunked_attention", "full_attention"]}, {}),
    ],
    ids=["llama", "bfloat16-cache", "qwen2", "mistral-no-window", "gemma-no-window", "mistral-v0.3", "granite",
         "gemma2", "gpt-oss", "llama4"],
)  # fmt: skip
def test_decoders_with_full_attention_are_served(configure: Configure, content: Any, engine_args: Any) -> None:
    config = configure(content, **engine_args)
    for platform in RUNNERS:
        refuse(config, platform)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (MISTRAL, "models without a full-attention layer"),
        (LLAMA4, "models without a full-attention layer"),
        ({**GEMMA, "num_hidden_layers": 3, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
         "more full-attention layers than others, in several KV cache groups"),
        ({**TINY, "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "kv_lora_rank": 32,
          "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "n_routed_experts": 4,
          "num_experts_per_tok": 2, "moe_intermediate_size": 32, "q_lora_rank": None, "n_group": 1, "topk_group": 1,
          "num_key_value_heads": 2}, "multi-head latent attention (MLA)"),
        ({"model_type": "bloom", "architectures": ["BloomForCausalLM"], "hidden_size": 64, "n_head": 2, "n_layer": 2,
          "vocab_size": 256}, "ALiBi"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
          "vocab_size": 256, "state_size": 16, "intermediate_size": 128, "time_step_rank": 4, "conv_kernel": 4},
         "models without a full-attention layer"),
        ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], "d_model": 64,
          "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
          "vocab_size": 256, "max_target_positions": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
          "decoder_start_token_id": 1},
         "encoder-decoder models; multi-modal models (a checkpoint of its text model is served)"),
    ],
    ids=["mistral", "llama4", "several-groups", "deepseek", "bloom", "mamba", "whisper"],
)  # fmt: skip
def test_models_are_refused_by_name(configure: Configure, content: Any, what: str) -> None:
    config = configure(content)
    for platform in RUNNERS:
        assert refused(config, platform) == what


@pytest.mark.parametrize(
    ("engine_args", "what"),
    [
        ({"runner": "pooling"}, "models that don't generate text"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
         "speculative decoding (--speculative-config)"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
         "KV connectors and offloading (--kv-transfer-config, --kv-offloading-size)"),
        ({"kv_offloading_size": 1.0}, "KV connectors and offloading (--kv-transfer-config, --kv-offloading-size)"),
        ({"pipeline_parallel_size": 2}, "pipeline parallel (--pipeline-parallel-size)"),
        ({"data_parallel_size": 2}, "data parallel (--data-parallel-size)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_features_are_refused_by_flag(configure: Configure, engine_args: Any, what: str) -> None:
    config = configure(LLAMA, **engine_args)
    for platform in RUNNERS:
        assert refused(config, platform) == what


@pytest.mark.parametrize(
    ("engine_args", "what"),
    [
        ({"kv_cache_dtype": "fp8"}, cache("cpu", "fp8")),
        ({"kv_cache_dtype": "fp8_e4m3"}, cache("cpu", "fp8_e4m3")),
        ({"tensor_parallel_size": 2}, "tensor parallel on this platform (--tensor-parallel-size)"),
    ],
)
def test_features_of_gpus_are_refused_on_cpus(configure: Configure, engine_args: Any, what: str) -> None:
    config = configure(LLAMA, **engine_args)
    assert refused(config, "cpu") == what
    refuse(config, "cuda")


@pytest.mark.parametrize(
    ("content", "what"),
    [(GEMMA, "soft caps on attention logits"), (GRANITE, "learned attention sinks")],
    ids=["gemma2", "granite"],
)
def test_selectors_do_not_know_all_that_policies_do(configure: Configure, content: Any, what: str) -> None:
    for selectors in ([], ["tidal"]):
        settings = {"longreach": {"decode": {"selectors": selectors}}}
        config = configure(content, additional_config=settings)
        for platform in RUNNERS:
            if selectors:
                found = refused(config, platform)
                assert found == f"decode selectors with {what} (--decode-selectors none does without)"
            else:
                refuse(config, platform)


def test_heads_that_cpus_have_no_kernel_for(configure: Configure) -> None:
    """Whatever the other layers are: Mamba 2 with heads of 32 is served, its engine died with heads of 16."""
    size = "full-attention heads of a size that vLLM's CPU kernel doesn't have"
    for model in (LLAMA, FALCON_H1):
        config = configure({**model, "head_dim": 16})
        assert size in refused(config, "cpu") and "32, 48, 64" in refused(config, "cpu")
        if model is LLAMA:
            refuse(config, "cuda")
        refuse(configure({**model, "head_dim": 32}), "cpu")


def test_the_sizes_are_the_kernels() -> None:
    """Its planner, which an engine calls at every step, refuses the others."""
    import torch
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    served = []
    for size in range(8, 520, 8):
        isa = _get_attn_isa(torch.bfloat16, 32, size)
        try:
            ops.cpu_attn_get_scheduler_metadata(
                num_reqs=1, num_heads=4, num_kv_heads=2, head_dim=size, seq_lens=torch.tensor([40], dtype=torch.int32),
                dtype=torch.bfloat16, query_start_loc=torch.tensor([0, 40], dtype=torch.int32), causal=True,
                sliding_window_size=-1, isa=isa, enable_kv_split=False,
            )  # fmt: skip
        except RuntimeError as error:
            assert "Unsupported CPU attention" in str(error)
        else:
            served.append(size)
    assert tuple(served) == rules.CPU_HEAD_SIZES


def test_linear_layers_are_served_on_cpus_alone(configure: Configure) -> None:
    config = configure(FALCON_H1)
    assert refused(config, "cuda") == "linear or Mamba layers on GPUs"
    refuse(config, "cpu")


def test_weights_that_cpus_have_no_kernel_for(configure: Configure) -> None:
    quantised = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}
    config = configure({**LLAMA, **quantised})
    assert refused(config, "cpu") == "FP8 weights on CPUs"
    refuse(config, "cuda")


@pytest.mark.parametrize("quantised", [
    {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
], ids=lambda quantised: quantised["quant_method"])  # fmt: skip
def test_four_bits_need_avx512_on_x86(
    configure: Configure, quantised: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure({**LLAMA, "quantization_config": quantised})
    monkeypatch.setattr(rules, "lacks_avx512", lambda: False)
    refuse(config, "cpu")
    monkeypatch.setattr(rules, "lacks_avx512", lambda: True)
    assert refused(config, "cpu") == "4-bit weights on x86 CPUs without AVX-512"
    refuse(config, "cuda")


def test_hybrid_models_need_vllms_hybrid_cache(configure: Configure) -> None:
    config = configure(GEMMA, disable_hybrid_kv_cache_manager=True)
    for platform in RUNNERS:
        found = refused(config, platform)
        assert found == "one KV cache for all kinds of layers (--disable-hybrid-kv-cache-manager)"


@pytest.mark.parametrize(
    ("content", "engine_args", "kinds"),
    [
        (LLAMA, {}, [FULL, FULL]),
        (MISTRAL, {}, [SLIDING, SLIDING]),
        (MISTRAL, {"disable_sliding_window": True}, [FULL, FULL]),
        (GEMMA, {}, [SLIDING, FULL]),
        (GEMMA, {"disable_sliding_window": True}, [FULL, FULL]),
        (LLAMA4, {}, [CHUNKED, CHUNKED]),
        (FALCON_H1, {}, [FULL, FULL]),
    ],
)
def test_kinds_of_layers(configure: Configure, content: Any, engine_args: Any, kinds: list[str]) -> None:
    config = configure(content, **engine_args)
    assert layer_kinds(config) == kinds
    assert full_layers(config) == [index for index, kind in enumerate(kinds) if kind == FULL]


@pytest.mark.parametrize("name", ZOO)
def test_the_zoos_layers_are_told_from_their_configurations(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The engine's own are looked at in tests/models."""
    specimen = ZOO[name]
    make = getattr(transformers, f"{specimen.kind}Config")
    content = make(**{**COMMON, **specimen.shape}, architectures=[f"{specimen.kind}ForCausalLM"]).to_dict()
    content["architectures"] = [content["architectures"][0].replace("Text", "")]
    config = configure(content, max_model_len=MAX_LEN, dtype="bfloat16")
    assert tuple(full_layers(config)) == specimen.full
    for platform, runner in RUNNERS.items():
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
        named = {rule.name for rule in rules.refused(config, platform, rules.POLICIES)}
        assert named == {*filter(None, [specimen.refusal(platform)])}
    found = [rule for rule in rules.refused(config, "cpu", rules.SELECTORS) if rules.POLICIES not in rule.refuses]
    assert bool(found) == (not specimen.selectors)


def test_each_platform_has_its_model_runner(configure: Configure) -> None:
    config = configure(LLAMA)
    assert refused(config, "cpu", runner="1") == "vLLM's other model runner (VLLM_USE_V2_MODEL_RUNNER)"
    assert refused(config, "cuda", runner="0") == "vLLM's other model runner (VLLM_USE_V2_MODEL_RUNNER)"


@pytest.mark.parametrize(
    ("part", "attribute", "value", "what"),
    [
        ("model_config", "enable_sleep_mode", True, "sleep mode (--enable-sleep-mode)"),
        ("parallel_config", "decode_context_parallel_size", 2, "decode context parallel"),
        ("parallel_config", "prefill_context_parallel_size", 2, "prefill context parallel"),
        ("parallel_config", "enable_dbo", True, "dual batch overlap (--enable-dbo)"),
        ("parallel_config", "ubatch_size", 2, "dual batch overlap (--enable-dbo)"),
        ("cache_config", "cache_dtype", "turboquant_k8v4", "turboquant_k8v4"),
        ("cache_config", "cache_dtype", "fp8_e5m2", "fp8_e5m2"),
    ],
)
def test_what_vllm_refuses_on_cpus_itself(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, part: str, attribute: str, value: Any, what: str
) -> None:
    """Such configurations can't be made here; the attribute has to be vLLM's all the same."""
    config = configure(LLAMA)
    monkeypatch.setattr(getattr(config, part), attribute, value, raising=True)
    for platform in RUNNERS:
        expected = cache(platform, value) if attribute == "cache_dtype" else what
        assert refused(config, platform).startswith(expected)


def test_everything_wrong_is_named_at_once(configure: Configure) -> None:
    config = configure(MISTRAL, pipeline_parallel_size=2)
    message = refused(config, "cuda")
    assert message == refused(config, "cpu")
    assert message == "models without a full-attention layer; pipeline parallel (--pipeline-parallel-size)"
    assert issubclass(Unsupported, StartError)


@pytest.mark.parametrize(
    ("argv", "flag", "always"),
    [
        (("--headless",), "--headless", True),
        (("--grpc",), "--grpc", True),
        (("--api-server-count", "2"), "--api-server-count above 1", True),
        (("--scheduler-cls", "my.Scheduler"), "--scheduler-cls", False),
        (("--worker-cls", "my.Worker"), "--worker-cls", False),
        (("--attention-backend", "TRITON_ATTN"), "--attention-backend TRITON_ATTN", False),
        (("--attention-backend", "FLASHINFER"), "--attention-backend FLASHINFER", False),
        (("--attention-config.backend", "TRITON_ATTN"), "--attention-backend TRITON_ATTN", False),
    ],
)
def test_flags_are_refused(parse: Callable[..., Namespace], argv: tuple[str, ...], flag: str, always: bool) -> None:
    args = parse("m", *argv)
    with pytest.raises(Unsupported, match=f"^{flag}: not supported"):
        refuse_args(args, compresses=True)
    if always:
        with pytest.raises(Unsupported, match=flag):
            refuse_args(args, compresses=False)
    else:
        refuse_args(args, compresses=False)


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("--attention-backend", "FLASH_ATTN"),
        ("--attention-config.backend", "FLASH_ATTN"),
        ("--attention-config.backend", "auto"),
        ("--attention-config.flash_attn_version", "2"),
        ("--attention-backend", "auto"),
        ("--attention-backend", "flash_attn"),
    ],
    ids=lambda argv: "-".join(argv) or "none",
)
def test_flash_attention_may_be_asked_for(parse: Callable[..., Namespace], argv: tuple[str, ...]) -> None:
    """In any way that vLLM takes."""
    args = parse("m", *argv)
    refuse_args(args, compresses=True)
    refuse_args(args, compresses=False)


def test_usual_flags_are_not_refused(parse: Callable[..., Namespace], tmp_path: Path) -> None:
    args = parse("m", "--api-server-count", "1", "--max-model-len", "4096", "--uds", str(tmp_path / "s"))
    refuse_args(args, compresses=True)
    args.data_parallel_multi_port_external_lb = True
    with pytest.raises(Unsupported, match="--data-parallel-multi-port-external-lb"):
        refuse_args(args, compresses=False)
