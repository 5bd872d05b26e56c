"""Asking, checking and storing, against a fake endpoint."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.evaluation.endpoint import Endpoint, Gone
from benchmarks.evaluation.haystack import Haystack
from benchmarks.evaluation.runner import Runner, check_lengths
from benchmarks.evaluation.store import Row, Store
from benchmarks.evaluation.suite import Suite
from benchmarks.evaluation.suites.agreement import Agreement
from benchmarks.evaluation.suites.needle import Needle
from benchmarks.evaluation.suites.perplexity import Perplexity
from benchmarks.evaluation.suites.speed import Speed
from benchmarks.evaluation.sweep import check
from benchmarks.evaluation.tokens import Prompter
from benchmarks.evaluation.variants import Variant, not_run
from tests.benchmarks.evaluation.fake import Fake

LENGTH = 2200
"""Longer than the short request that tries a variant out, which the fake never troubles."""


class Setting:
    """Runs suites against a fake, into a folder."""

    def __init__(self, fake: Fake, prompter: Prompter, haystack: Haystack, folder: Path) -> None:
        self.fake, self.prompter, self.haystack, self.folder = fake, prompter, haystack, folder

    def variants(self, *policies: str, neutral: bool = True) -> list[Variant]:
        content = {"suites": {"needle": {"lengths": [LENGTH]}}, "policies": list(policies), "budgets": ["50%"]}
        fields = {"kv_cache": {"policy": "none"}} if neutral else {}
        return check(content).dense_and_others(fields)

    def store(self) -> Store:
        return Store(self.folder, {"model": "tiny", "variants": {}})

    def run(self, suites: list[Suite], *policies: str, limit: float = 60.0, **settings: Any) -> list[Row]:
        store = settings.pop("store", None) or self.store()
        variants = settings.pop("variants", None) or self.variants(*policies)

        async def go() -> None:
            endpoint = Endpoint(self.fake.url)
            endpoint.client.timeout = httpx.Timeout(limit)
            try:
                runner = Runner(endpoint, self.prompter, self.haystack, store, variants, **settings)
                await runner.run(suites, [0])
            finally:
                await endpoint.close()

        try:
            asyncio.run(go())
        finally:
            store.close()
        return list(store.rows.values())

    def refused(self, *policies: str) -> dict[str, str]:
        async def go() -> dict[str, str]:
            endpoint = Endpoint(self.fake.url)
            store = self.store()
            try:
                return await Runner(endpoint, self.prompter, self.haystack, store, self.variants(*policies)).refused()
            finally:
                await endpoint.close()
                store.close()

        return asyncio.run(go())


@pytest.fixture
def setting(fake: Fake, prompter: Prompter, haystack: Haystack, tmp_path: Path) -> Setting:
    return Setting(fake, prompter, haystack, tmp_path / "out")


def needles(samples: int = 1, depths: int = 2) -> Needle:
    return Needle(lengths=[LENGTH], samples=samples, depths=depths)


def test_answers_are_rated_and_described(setting: Setting) -> None:
    rows = setting.run([needles()], "keeps", "forgets")
    assert Counter((row.variant, row.status, row.score) for row in rows) == {
        ("dense", "ok", 1.0): 2, ("keeps 50%", "ok", 1.0): 2, ("forgets 50%", "ok", 0.0): 2,
    }  # fmt: skip
    kept = next(row for row in rows if (row.variant, row.index) == ("keeps 50%", 0))
    assert (kept.kept, kept.finish_reason, kept.info["depth"]) == (0.5, "stop", 0.03)
    assert kept.bytes_held == 1024 * (kept.sent_tokens // 2) and kept.prompt_tokens == kept.sent_tokens
    assert all(0.99 * LENGTH <= row.sent_tokens + 32 <= LENGTH for row in rows)
    bodies = setting.fake.bodies
    assert {(body["temperature"], body["max_tokens"], body["model"]) for body in bodies} == {(0.0, 32, "tiny")}
    prompts = [body["prompt"] for body in bodies]
    assert len({tuple(prompt) for prompt in prompts}) == 2
    assert [body["kv_cache"]["policy"] for body in bodies[:2]] == ["none", "none"]  # dense comes first


def test_what_is_no_answer_is_never_a_wrong_one(setting: Setting) -> None:
    rows = setting.run([needles(depths=1)], "keeps", "broken", "unknown", "slow", "cuts", "ignored", limit=0.8)
    found = {row.variant.split()[0]: row for row in rows}
    assert {name: row.status for name, row in found.items()} == {
        "dense": "ok", "keeps": "ok", "broken": "error", "unknown": "error", "slow": "timeout", "cuts": "truncated",
        "ignored": "error",
    }  # fmt: skip
    assert all((row.score is None) == (row.status != "ok") for row in rows)
    told = {name: row.error or "" for name, row in found.items()}
    assert told["broken"] == "status 500: out of memory" and told["unknown"] == "status 400: no such policy"
    assert "the server cut the prompt" in told["cuts"] and "the server ignored kv_cache" in told["ignored"]
    assert told["slow"].startswith("no answer in")


def test_prompts_that_do_not_fit_are_not_sent(setting: Setting) -> None:
    setting.fake.max_model_len = 2100
    rows = setting.run([needles(depths=1)])
    assert [row.status for row in rows] == ["truncated"] and "don't fit the model" in (rows[0].error or "")
    assert not setting.fake.bodies
    with pytest.raises(ValueError, match=r"needle: length 2200 doesn't fit the model's 2100"):
        check_lengths([needles()], 2100)


def test_a_sample_that_cannot_be_made_is_an_error_of_its_own(setting: Setting) -> None:
    rows = setting.run([Needle(lengths=[60], samples=1, depths=1)])
    assert [row.status for row in rows] == ["error"] and "the sample can't be made: 28 tokens" in (rows[0].error or "")


class Killed(BaseException):
    pass


class DyingStore(Store):
    """Dies as a killed process does: in the middle of a line."""

    left = 5

    def add(self, row: Row) -> None:
        self.left -= 1
        if self.left < 0:
            self.file.write(row.line().encode()[:30])
            self.file.flush()
            raise Killed
        super().add(row)


def test_killed_half_way_and_started_again_nothing_is_lost_or_repeated(setting: Setting) -> None:
    suites: list[Suite] = [needles(samples=2, depths=3)]
    dying = DyingStore(setting.folder, {"model": "tiny", "variants": {}})
    with pytest.raises(Killed):
        setting.run(suites, "keeps", "forgets", store=dying, concurrency=1)
    path = setting.folder / "results.jsonl"
    first = path.read_bytes()
    whole = first[: first.rfind(b"\n") + 1]
    assert whole.count(b"\n") == 5 and len(first) > len(whole)
    asked = len(setting.fake.bodies)
    rows = setting.run(suites, "keeps", "forgets", concurrency=4)
    assert len(rows) == 18 == path.read_bytes().count(b"\n")
    assert path.read_bytes().startswith(whole)
    assert len(setting.fake.bodies) - asked == 18 - 5
    assert setting.run(suites, "keeps", "forgets") == rows
    assert len(setting.fake.bodies) - asked == 18 - 5


def test_failures_are_asked_again_on_demand(setting: Setting) -> None:
    setting.run([needles(depths=1)], "broken")
    assert len(setting.run([needles(depths=1)], "broken")) == 2 == len(setting.fake.bodies)
    setting.fake.well = True
    mended = setting.run([needles(depths=1)], "broken", again=True)
    assert len(setting.fake.bodies) == 3 and [row.status for row in mended] == ["ok", "ok"]


def test_an_endpoint_that_goes_away_ends_the_run(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(self: Endpoint) -> bool:
        return False

    def drop(self: Fake, body: dict[str, Any]) -> Any:
        raise ConnectionAbortedError

    monkeypatch.setattr(Endpoint, "alive", gone)
    monkeypatch.setattr(Fake, "complete", drop)
    monkeypatch.setattr("socketserver.BaseServer.handle_error", lambda *args: None)
    with pytest.raises(Gone, match="is gone"):
        setting.run([needles()], "keeps")
    assert not (setting.folder / "results.jsonl").read_bytes()


def test_variants_are_tried_out_first(setting: Setting) -> None:
    found = setting.refused("keeps", "unknown", "ignored")
    assert list(found) == ["unknown 50%", "ignored 50%"]
    assert found["unknown 50%"] == "status 400: no such policy"


def test_agreement_and_perplexity_are_rated_by_the_dense_answer(setting: Setting) -> None:
    suites: list[Suite] = [Agreement(lengths=[600], samples=1), Perplexity(lengths=[600], samples=1, continuation=9)]
    content = {"suites": {"agreement": {"lengths": [600]}}, "policies": ["forgets"], "budgets": ["50%"],
               "questions": ["known", "unknown"]}  # fmt: skip
    variants = check(content).dense_and_others({"kv_cache": {"policy": "none"}})
    rows = {(row.suite, row.variant): row for row in setting.run(suites, variants=variants)}
    assert ("perplexity", "forgets 50%") not in rows  # the continuation is always hidden
    agrees = rows["agreement", "forgets 50%"]
    assert agrees.score == pytest.approx(0.4) and agrees.measures["first_difference"] == 2
    assert 0 < agrees.measures["kl"] < 0.1 and rows["agreement", "dense"].score == 1.0
    dense = rows["perplexity", "dense"]
    worse = rows["perplexity", "forgets 50%, question unknown"]
    assert (dense.score, dense.measures["nll"]) == (1.0, 1.0)
    assert worse.measures["nll"] == 2.0 and worse.score == pytest.approx(0.36788, abs=1e-5)  # e^-1
    echoed = [body for body in setting.fake.bodies if body.get("echo")]
    assert all(len(body["prompt"]) == 599 and body["max_tokens"] == 1 for body in echoed)
    assert echoed[-1]["kv_cache"]["suffix"] == 9


def test_without_a_dense_answer_there_is_nothing_to_compare_with(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fake, "logprobs", lambda self, body: None)
    rows = setting.run([Agreement(lengths=[600], samples=1)], "keeps")
    assert [row.status for row in rows] == ["error", "error"]
    assert "no log probabilities" in (rows[0].error or "") and "no dense answer" in (rows[1].error or "")


def test_speed_is_measured_alone_with_fresh_prompts(setting: Setting) -> None:
    rows = setting.run([Speed(lengths=[600], samples=2)], "keeps", concurrency=8)
    assert len(rows) == 4 and all(row.ttft and row.measures["tpot"] >= 0 and row.score is None for row in rows)
    prompts = [tuple(body["prompt"]) for body in setting.fake.bodies]
    assert len(prompts) == 6 == len({prompt[:30] for prompt in prompts})  # two warm-ups, which are not stored
    assert all(body["stream"] and len(body["prompt"]) == 568 for body in setting.fake.bodies)


@pytest.mark.parametrize(
    ("fields", "usage", "problem"),
    [
        ({}, {}, None),
        ({"kv_cache": {"policy": "none"}}, {}, None),
        ({"kv_cache": {"policy": "snapkv"}}, {"kv_cache": {"policy": "snapkv"}}, None),
        ({"kv_cache": {"policy": "snapkv"}}, {}, "ignored kv_cache"),
        ({"kv_cache": {"policy": "none"}}, {"kv_cache": {"policy": "snapkv"}}, "'none' was asked for"),
        ({"decode_attention": {"selector": "quest"}}, {"decode_attention": {"selector": "dense"}}, "decode_attention"),
        ({"prefill_attention": {"pattern": "xattention"}}, {"kv_cache": {}}, "ignored prefill_attention"),
        ({"kv_cache": {"policy": "tova"}}, {"kv_cache": {"policy": "tova", "not_compressed": "no room"}}, "no room"),
        ({"temperature": 1, "kv_cache": "text"}, {}, None),
    ],
)
def test_what_ran_is_compared_with_what_was_asked(
    fields: dict[str, Any], usage: dict[str, Any], problem: str | None
) -> None:
    why = not_run(fields, usage)
    assert (why is None) == (problem is None) and (problem or "") in (why or "")
