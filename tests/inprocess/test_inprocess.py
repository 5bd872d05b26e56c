"""The engine inside the process, and what the quality table takes from it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from vllm import SamplingParams

from benchmarks.quality.measure import Case, distributions, nll, sampling
from server.errors import StartError
from server.inprocess import InProcessEngine, Job, build_engine
from tests.tiny_model import VOCABULARY

pytestmark = pytest.mark.engine

SNAPKV = {"policy": "snapkv", "budget": "30%"}


@pytest.fixture(scope="module")
def small(tiny_model: Path) -> InProcessEngine:
    flags = ["--dtype", "float32", "--skip-tokenizer-init", "--max-model-len", "2048", "--kv-cache-memory-bytes", "64M"]
    return build_engine([str(tiny_model), *flags], keep_positions=True, max_logprobs=20)


def tokens_of(length: int) -> list[int]:
    generator = random.Random(length)
    return [generator.randrange(VOCABULARY) for _ in range(length)]


def test_kept_positions_and_usage_are_told(small: InProcessEngine) -> None:
    params = {"max_tokens": 3, "temperature": 0.0, "detokenize": False, "ignore_eos": True}
    jobs = [Job(tokens_of(600), SamplingParams(**params), words) for words in (SNAPKV, {"policy": "none"})]
    done: list[Job] = []
    compressed, dense = small.run(jobs, done.append)
    assert len(done) == 2
    assert dense.kept == []
    assert (len(compressed.kept), len(compressed.kept[0])) == (3, 2)
    kept = len(compressed.kept[0][0])
    assert compressed.usage["kept_tokens"]["mean"] == kept + 600 % small.page_size
    assert len(compressed.tokens) == len(dense.tokens) == 3


def test_a_forced_continuation_reads_the_compacted_cache_as_an_answer_does(small: InProcessEngine) -> None:
    """The log probabilities of an answer, and those of a prompt that has this answer for a suffix, are equal."""
    document, length = tokens_of(700), 24
    params = SamplingParams(max_tokens=length, temperature=0, logprobs=5, detokenize=False, ignore_eos=True)
    (answer,) = small.run([Job(document, params, SNAPKV)])
    case = Case("continuation", document + answer.tokens, length)
    forced = Job(case.prompt, sampling(case, 5), {**SNAPKV, "suffix": length})
    dense = Job(case.prompt, sampling(case, 5), {"policy": "none"})
    small.run([forced, dense])
    found = distributions(case, forced)
    assert len(found) == length - 1
    for own, row in zip(found, answer.output.outputs[0].logprobs[1:], strict=True):
        assert own == pytest.approx({token: entry.logprob for token, entry in row.items()}, abs=1e-3)
    assert forced.kept and forced.usage["kept_tokens"]["mean"] == answer.usage["kept_tokens"]["mean"] + length
    assert nll(case, found) < nll(case, distributions(case, dense)) - 0.01


@pytest.mark.parametrize("flag", [["--tensor-parallel-size", "2"], ["--max-model-len", "100000"]])
def test_what_cannot_be_started_is_a_start_error(tiny_model: Path, flag: list[str]) -> None:
    with pytest.raises(StartError):
        build_engine([str(tiny_model), "--skip-tokenizer-init", *flag])


def test_a_job_names_its_policy_and_its_selector() -> None:
    job = Job([1], SamplingParams(), SNAPKV)
    assert job.extra_args == {"kv_cache": SNAPKV}
    job.selector = {"selector": "tidal"}
    assert job.extra_args == {"kv_cache": SNAPKV, "decode_attention": {"selector": "tidal"}}
