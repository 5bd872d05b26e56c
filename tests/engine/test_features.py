"""Features of the engine together with compression: each request gets what it gets without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.engine.harness import PAGE, Engine
from tests.engine.test_answers import prompt_of

pytestmark = pytest.mark.engine
SNAPKV = {"policy": "snapkv", "budget": 160}


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA of the tiny model's attention, large enough to change every answer."""
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(1)
    weights = {}
    for layer in range(3):
        for name, out in (("q_proj", 128), ("v_proj", 64)):
            part = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{part}.lora_A.weight"] = torch.randn(8, 64) / 4
            weights[f"{part}.lora_B.weight"] = torch.randn(out, 8) / 4
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def engine(tiny_model: Path) -> Engine:
    """For as long as the others' engine: vLLM tears the process groups of all down with the first that ends."""
    return Engine(str(tiny_model), blocks=400, max_model_len=2048, enable_lora=True, max_lora_rank=8,
                  scheduling_policy="priority")  # fmt: skip


def run(
    engine: Engine,
    requests: list[tuple[list[int], dict[str, Any]]],
    *,
    lora: Any = None,
    forget: bool = True,
    **params: Any,
) -> Any:
    """Last outputs of requests with these words, all at once; the pool is empty again."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    names = []
    for index, (prompt, more) in enumerate(requests):
        words = more.pop("words", SNAPKV)
        sampling = SamplingParams(**{
            "max_tokens": 16, "temperature": 0, "ignore_eos": True, "detokenize": False,
            "extra_args": {"kv_cache": words} if words else None, "output_kind": RequestOutputKind.FINAL_ONLY,
            **params,
        })  # fmt: skip
        names.append(f"feature-{index}")
        own = more.pop("lora", lora)
        engine.llm.llm_engine.add_request(names[-1], {"prompt_token_ids": prompt}, sampling, lora_request=own, **more)
    done, order = {}, []
    while engine.llm.llm_engine.has_unfinished_requests():
        for output in engine.llm.llm_engine.step():
            if output.finished:
                done[output.request_id] = output
                order.append(names.index(output.request_id))
    if forget:
        engine.forget_prefixes()
    assert engine.free == engine.all_free
    return [done[name] for name in names], order


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_lora(engine: Engine, adapter: Path) -> None:
    """Answers of adapter and model differ; each compacted one is that of its own keys, and they share no prefix."""
    from vllm.lora.request import LoRARequest

    lora, prompt = LoRARequest("a", 1, str(adapter)), prompt_of(650)
    (plain,), _ = run(engine, [(prompt, {})])
    (adapted,), _ = run(engine, [(prompt, {})], lora=lora)
    (whole,), _ = run(engine, [(prompt, {"words": {"policy": "snapkv", "budget": 1000}})], lora=lora)
    (dense,), _ = run(engine, [(prompt, {"words": None})], lora=lora)
    assert tokens([plain]) != tokens([adapted]) != tokens([dense])
    assert tokens([whole]) == tokens([dense])
    assert adapted.kv_transfer_params["kv_cache"]["usage"]["kept_tokens"]["mean"] == 138


def test_an_adapter_is_for_its_own_requests(engine: Engine, adapter: Path) -> None:
    """vLLM's CPU operators give the last adapter to all rows of its batch that have none."""
    from vllm.lora.request import LoRARequest

    lora, prompts = LoRARequest("a", 1, str(adapter)), [prompt_of(300 + i, i) for i in range(3)]
    words: list[dict[str, Any]] = [{"words": None}, {}, {"words": None, "lora": lora}]
    alone = [run(engine, [(prompt, {**more})])[0][0] for prompt, more in zip(prompts, words, strict=True)]
    together, _ = run(engine, [(prompt, {**more}) for prompt, more in zip(prompts, words, strict=True)])
    assert tokens(together) == tokens(alone)
    (other,), _ = run(engine, [(prompts[2], {"words": None})])
    assert tokens([other]) != tokens([alone[2]]), "the adapter changes nothing: the test tests nothing"


def test_logprobs(engine: Engine) -> None:
    """Of the compacted answer's own distribution, and of a prompt before it is compacted."""
    prompt = prompt_of(650)
    (plain,), _ = run(engine, [(prompt, {})])
    (told,), _ = run(engine, [(prompt, {})], logprobs=3, prompt_logprobs=1)
    assert tokens([told]) == tokens([plain])
    for token, most in zip(told.outputs[0].token_ids, told.outputs[0].logprobs, strict=True):
        assert most[token].rank == 1 and len(most) == 3
    (dense,), _ = run(engine, [(prompt, {"words": None})], prompt_logprobs=1)
    assert len(told.prompt_logprobs) == 650
    assert told.prompt_logprobs[1:] == dense.prompt_logprobs[1:]


def test_several_answers_to_one_prompt(engine: Engine) -> None:
    """Each is a request of its own, with the same prompt and a seed of its own, and each is compacted."""
    totals = engine.scheduler.compression_totals.by_policy
    sampled: dict[str, Any] = {"temperature": 2.0, "top_k": 50}
    before = totals["snapkv"]["compactions"]
    (output,), _ = run(engine, [(prompt_of(650), {})], n=3, seed=5, **sampled)
    assert totals["snapkv"]["compactions"] == before + 3
    alone = [run(engine, [(prompt_of(650), {})], seed=5 + index, **sampled)[0][0] for index in range(3)]
    assert [list(answer.token_ids) for answer in output.outputs] == tokens(alone)


@pytest.mark.parametrize("words", [None, SNAPKV], ids=["dense", "compacted"])
def test_a_seed_gives_the_same_however_the_prompt_is_cut(engine: Engine, words: dict[str, Any] | None) -> None:
    """vLLM's own CPU worker ends with the first chunk that isn't the last: one request would end them all."""
    sampled: dict[str, Any] = {"temperature": 2.0, "top_k": 50, "seed": 5}
    (whole,), _ = run(engine, [(prompt_of(650), {"words": words})], **sampled)
    engine.set_chunk(200)
    try:
        (chunked,), _ = run(engine, [(prompt_of(650), {"words": words})], **sampled)
    finally:
        engine.set_chunk(None)
    assert tokens([chunked]) == tokens([whole])


def test_priorities(engine: Engine) -> None:
    """In a pool for one prompt at a time, the later and more urgent request goes first; answers are the same."""
    alone = [run(engine, [(prompt_of(650 + i), {})])[0][0] for i in range(3)]
    taken = engine.pool.get_new_blocks(engine.free - 30)
    engine.all_free -= len(taken)
    try:
        outputs, order = run(engine, [(prompt_of(650 + i), {"priority": 3 - i}) for i in range(3)], forget=False)
    finally:
        engine.pool.free_blocks(taken)
        engine.all_free += len(taken)
    assert tokens(outputs) == tokens(alone)
    assert order == [2, 1, 0]
    assert len(prompt_of(650)) // PAGE + 5 < 30 < 2 * 650 // PAGE


def test_penalties_and_bad_words_count_the_whole_prompt(engine: Engine) -> None:
    """Sampling's state is of tokens, not of what the cache holds."""
    prompt = [*range(3, 103)] * 6 + prompt_of(50)
    (output,), _ = run(engine, [(prompt, {})], repetition_penalty=1e6)
    assert not set(output.outputs[0].token_ids) & set(prompt)
