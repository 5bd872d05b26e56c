"""Without a policy the engine is stock vLLM, and its text is transformers'."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from server.embedded import ensure_embedded_model
from tests.engine.harness import PAGE, Engine, Job
from tests.reference import Reference

pytestmark = pytest.mark.engine

STOCK = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
work = json.load(sys.stdin)
llm = LLM(model=work["model"], dtype=work["dtype"], enforce_eager=True, compilation_config={"custom_ops": ["none"]},
          max_model_len=8192, block_size=work["page"], kv_cache_memory_bytes=2 << 30, max_num_batched_tokens=8192,
          max_num_seqs=64, skip_tokenizer_init=True)
params = SamplingParams(max_tokens=work["max_tokens"], temperature=0, ignore_eos=True, detokenize=False)
outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in work["prompts"]], params, use_tqdm=False)
json.dump([list(output.outputs[0].token_ids) for output in outputs], open(work["out"], "w"))
"""

SUBJECTS = ["a lighthouse", "the tax law", "bread", "prime numbers", "the Danube", "a lost cat", "chess", "snow"]
FORMS = ["Write about {}.", "List three facts about {}:", "def describe():\n    # {}\n", "Q: What is {}?\nA:"]


@pytest.fixture(scope="module")
def model() -> Path:
    return ensure_embedded_model()


@pytest.fixture(scope="module")
def prompts(model: Path) -> list[list[int]]:
    """24 prompts of 4 forms and many lengths."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    generator = random.Random(5)
    texts = []
    for i in range(24):
        filler = " ".join(generator.choice(SUBJECTS) for _ in range(i * i // 3))
        texts.append(f"{filler} {FORMS[i % 4].format(SUBJECTS[i % 8])}".strip())
    return [tokenizer(text)["input_ids"] for text in texts]


@pytest.fixture(scope="module")
def bfloat16_engine(model: Path) -> Iterator[Engine]:
    yield Engine(str(model), dtype="bfloat16", blocks=2400)


def stock(model: Path, dtype: str, prompts: list[list[int]], max_tokens: int, folder: Path) -> list[list[int]]:
    work = {"model": str(model), "dtype": dtype, "prompts": prompts, "max_tokens": max_tokens, "page": PAGE}
    out = folder / "tokens.json"
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", STOCK],
        input=json.dumps({**work, "out": str(out)}),
        text=True,
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
        timeout=1200,
    )
    return list(json.loads(out.read_text()))


def test_no_policy_is_token_identical_to_stock_vllm(
    model: Path, prompts: list[list[int]], bfloat16_engine: Engine, tmp_path: Path
) -> None:
    expected = stock(model, "bfloat16", prompts, 16, tmp_path)
    for words in (None, {"policy": "none"}, {"policy": "snapkv", "budget": 4000}):
        bfloat16_engine.forget_prefixes()
        jobs = bfloat16_engine.run([Job(prompt, words, max_tokens=16) for prompt in prompts])
        assert [job.tokens for job in jobs] == expected
    assert len({tuple(tokens) for tokens in expected}) > 12


def test_bfloat16_text_is_transformers_but_for_ties(
    model: Path, prompts: list[list[int]], bfloat16_engine: Engine
) -> None:
    """Where the texts part, transformers' two logits are within two steps of bfloat16."""
    reference = Reference(str(model), torch.bfloat16)
    jobs = bfloat16_engine.run([Job(prompt, max_tokens=24) for prompt in prompts[:16]])
    same = 0
    for job in jobs:
        tokens, logits = reference.greedy(job.prompt, 24)
        parted = next((i for i, (a, b) in enumerate(zip(tokens, job.tokens, strict=True)) if a != b), None)
        if parted is None:
            same += 1
            continue
        ours, theirs = logits[parted][job.tokens[parted]].float(), logits[parted][tokens[parted]].float()
        step = torch.finfo(torch.bfloat16).eps * theirs.abs()
        assert theirs - ours <= 2 * step, f"token {parted}: {theirs} against {ours}"
    assert same >= 4


def test_float32_text_is_transformers(model: Path, prompts: list[list[int]]) -> None:
    """The last test of this process's engines: vLLM tears its process groups down with the engine made here."""
    engine, reference = Engine(str(model), dtype="float32", blocks=1200), Reference(str(model))
    jobs = engine.run([Job(prompt, max_tokens=24) for prompt in prompts[:16]])
    for job in jobs:
        assert job.tokens == reference.greedy(job.prompt, 24)[0]
