"""Ask everything that isn't answered yet: dense first, then variant by variant, so that prompts are found cached."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from benchmarks.evaluation.endpoint import Endpoint, Refused, TimedOut
from benchmarks.evaluation.haystack import Haystack, noise
from benchmarks.evaluation.store import ERROR, OK, TIMEOUT, TRUNCATED, Row, Store
from benchmarks.evaluation.suite import UNKNOWN, Place, Reply, Sample, Suite, Unscored
from benchmarks.evaluation.tokens import Prompter
from benchmarks.evaluation.variants import DENSE, Variant, not_run

TRIAL_SENTENCES = 120
Job = tuple[Suite, Place, Variant]


class Runner:
    """One run of suites and variants against an endpoint, into a store."""

    def __init__(
        self, endpoint: Endpoint, prompter: Prompter, haystack: Haystack, store: Store,
        variants: Sequence[Variant], concurrency: int = 8, again: bool = False,
    ) -> None:  # fmt: skip
        """
        Args:
            variants: the first is the dense one.
            concurrency: requests in flight at most.
            again: ask those again whose row isn't `ok`.
        """
        assert variants[0].name == DENSE
        self.endpoint, self.prompter, self.haystack, self.store = endpoint, prompter, haystack, store
        self.variants, self.concurrency, self.again = list(variants), concurrency, again

    def done(self, place: Place, variant: Variant) -> bool:
        row = self.store.rows.get((place, variant.name))
        return row is not None and (row.status == OK or not self.again)

    def jobs(self, suites: Sequence[Suite], seeds: list[int]) -> list[Job]:
        """All that belong to the run, in order, whether done or not."""
        return [
            (suite, place, variant)
            for suite in sorted(suites, key=lambda suite: suite.alone)
            for place in suite.places(seeds)
            for variant in self.variants
            if variant.goes_with(suite)
        ]

    async def refused(self) -> dict[str, str]:
        """Variants that the server doesn't run, and why: found out by one short request each."""
        prompt = self.prompter.prompt(" ".join(noise(TRIAL_SENTENCES)), "\n\nWhat lies in the sun?")
        found: dict[str, str] = {}

        async def try_out(variant: Variant) -> None:
            fields = variant.body(prompt.hidden)
            try:
                reply = await self.endpoint.complete(prompt.ids, 3, fields, stream=False)
            except (Refused, TimedOut) as error:
                found[variant.name] = str(error)
                return
            told = {k: {w: v for w, v in u.items() if w != "not_compressed"} for k, u in _dicts(reply.usage)}
            if why := not_run(fields, told):
                found[variant.name] = why

        limit = asyncio.Semaphore(self.concurrency)

        async def one(variant: Variant) -> None:
            async with limit:
                await try_out(variant)

        await asyncio.gather(*map(one, self.variants))
        return {variant.name: found[variant.name] for variant in self.variants if variant.name in found}

    async def run(self, suites: Sequence[Suite], seeds: list[int]) -> None:
        """
        Raises:
            Gone: the endpoint went away; what was answered until then is stored.
        """
        jobs = self.jobs(suites, seeds)
        left = [job for job in jobs if not self.done(job[1], job[2])]
        with tqdm(total=len(jobs), initial=len(jobs) - len(left), unit="request", smoothing=0.05) as self.bar:
            together = list(_chunks([job for job in left if not job[0].alone], self.concurrency))
            following = self._make(together[0]) if together else None
            for number, chunk in enumerate(together):
                assert following is not None
                samples = await following
                # The next samples are made while these are asked for.
                following = self._make(together[number + 1]) if number + 1 < len(together) else None
                await self._ask_all([job for job in chunk if job[2].name == DENSE], samples)
                rest = [job for job in chunk if job[2].name != DENSE]
                await self._ask_all(sorted(rest, key=lambda job: self.variants.index(job[2])), samples)
            await self._alone([job for job in left if job[0].alone])

    def _make(self, jobs: Sequence[Job]) -> asyncio.Future[Mapping[Any, Sample | str]]:
        """Samples of these jobs, made in a thread; or why one can't be made."""

        def make() -> dict[Any, Sample | str]:
            found: dict[Any, Sample | str] = {}
            for suite, place, variant in jobs:
                key = (place, variant.name if suite.fresh else None)
                if key not in found:
                    try:
                        found[key] = suite.make(self.prompter, self.haystack, place, variant.name)
                    except ValueError as error:
                        found[key] = f"the sample can't be made: {error}"
            return found

        return asyncio.ensure_future(asyncio.to_thread(make))

    async def _ask_all(self, jobs: Sequence[Job], samples: Mapping[Any, Sample | str]) -> None:
        limit = asyncio.Semaphore(self.concurrency)

        async def one(job: Job) -> None:
            async with limit:
                await self._answer(job, samples)

        tasks = [asyncio.ensure_future(one(job)) for job in jobs]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _alone(self, jobs: Sequence[Job]) -> None:
        """One after another, variant by variant, after a first request that isn't measured."""
        ordered = sorted(jobs, key=lambda job: (job[1].length, self.variants.index(job[2])))
        warm: tuple[int, str] | None = None
        for job in ordered:
            suite, place, variant = job
            if warm != (place.length, variant.name):
                warm = (place.length, variant.name)
                samples = await self._make([(suite, _before(place), variant)])
                if isinstance(sample := next(iter(samples.values())), Sample):
                    await self._row(suite, sample, variant)
            await self._answer(job, await self._make([job]))

    async def _answer(self, job: Job, samples: Mapping[Any, Sample | str]) -> None:
        suite, place, variant = job
        sample = samples[place, variant.name if suite.fresh else None]
        if isinstance(sample, Sample):
            row = await self._row(suite, sample, variant)
        else:
            row = _row(place, variant, ERROR, error=sample)
        self.store.add(row)
        self.bar.set_description(f"{suite.name} {place.length} {place.task}, {variant.name}"[:60])
        self.bar.update()

    async def _row(self, suite: Suite, sample: Sample, variant: Variant) -> Row:
        """Ask, check that the answer is one to this prompt and by this variant, and rate it."""
        place, prompt = sample.place, sample.prompt
        info: dict[str, Any] = dict(sample.info)
        room = (self.endpoint.max_model_len or 1 << 62) - sample.max_tokens
        if len(prompt.ids) > room:
            cut = suite.cut(prompt, room)
            if cut is None:
                why = f"not sent: {len(prompt.ids)} tokens and an answer of {sample.max_tokens} don't fit the model"
                return _row(place, variant, TRUNCATED, error=why, sent_tokens=len(prompt.ids), info=info)
            info["cut_tokens"] = len(prompt.ids) - len(cut.ids)
            prompt = cut
            sample = Sample(place, cut, sample.max_tokens, sample.answers, sample.request, info)
        dense = self.store.rows.get((place, DENSE)) if variant.name != DENSE else None
        if suite.needs_dense and variant.name != DENSE and (dense is None or dense.status != OK):
            return _row(place, variant, ERROR, error="there is no dense answer to compare with", info=info)
        fields = variant.body(prompt.hidden)
        common: dict[str, Any] = {"sent_tokens": len(prompt.ids), "info": info}
        try:
            reply = await self.endpoint.complete(
                prompt.ids, sample.max_tokens, {**sample.request, **fields}, stream=suite.alone
            )
        except TimedOut as error:
            return _row(place, variant, TIMEOUT, error=str(error), **common)
        except Refused as error:
            return _row(place, variant, ERROR, error=str(error), **common)
        common |= told(reply, len(prompt.ids), prompt.hidden if variant.question == UNKNOWN else 0)
        if sample.request.get("echo"):
            del common["text"]  # the prompt itself
        if reply.usage.get("prompt_tokens") != len(prompt.ids):
            seen = reply.usage.get("prompt_tokens")
            why = f"usage.prompt_tokens is {seen} of {len(prompt.ids)} sent: the server cut the prompt, or doesn't tell"
            return _row(place, variant, TRUNCATED, error=why, **common)
        if ignored := not_run(fields, reply.usage):
            return _row(place, variant, ERROR, error=ignored, **common)
        if reply.finish_reason == "length" and not suite.complete(sample, reply):
            return _row(place, variant, TRUNCATED, error="the answer was cut before it was complete", **common)
        try:
            scored = suite.rate(sample, reply, dense.keep if dense else None)
        except Unscored as error:
            return _row(place, variant, ERROR, error=f"can't be rated: {error}", **common)
        keep = scored.keep if variant.name == DENSE else None
        return _row(place, variant, OK, score=scored.score, measures=dict(scored.measures), keep=keep, **common)


def told(reply: Reply, tokens: int, hidden: int) -> dict[str, Any]:
    """What a row holds of a reply, whatever its worth.

    Args:
        hidden: the prompt's last tokens that compaction didn't see, and that all stay.
    """
    cache = reply.usage.get("kv_cache") or {}
    kept = (cache.get("kept_tokens") or {}).get("mean")
    seen = cache.get("compacted_tokens", tokens)
    share = None if kept is None else round((kept - hidden) / (seen - hidden), 4)
    details = reply.usage.get("prompt_tokens_details") or {}
    return {
        "text": reply.text[:1000], "finish_reason": reply.finish_reason, "ttft": _rounded(reply.ttft),
        "prompt_tokens": reply.usage.get("prompt_tokens"), "completion_tokens": reply.usage.get("completion_tokens"),
        "cached_tokens": details.get("cached_tokens"), "seconds": _rounded(reply.seconds),
        "kept": share, "bytes_held": cache.get("bytes_held"),
        "steps": (reply.usage.get("decode_attention") or {}).get("steps"),
    }  # fmt: skip


def _row(place: Place, variant: Variant, status: str, **rest: Any) -> Row:
    return Row(place.suite, place.task, place.length, place.seed, place.index, variant.name, status, **rest)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def _before(place: Place) -> Place:
    """A place that is never measured, for a first request."""
    return Place(place.suite, place.task, place.length, place.seed, -1)


def _dicts(usage: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in usage.items():
        if isinstance(value, dict):
            yield name, value


def _chunks(jobs: Sequence[Job], places: int) -> Iterator[list[Job]]:
    """Jobs of so many places at a time, at least 16, so that a place's variants are near to each other."""
    chunk: list[Job] = []
    seen: set[Place] = set()
    for job in jobs:
        if job[1] not in seen and len(seen) >= max(16, places):
            yield chunk
            chunk, seen = [], set()
        seen.add(job[1])
        chunk.append(job)
    if chunk:
        yield chunk


def check_lengths(suites: Sequence[Suite], max_model_len: int | None) -> None:
    """Refuse, before anything is asked, lengths that the model has no room for.

    Raises:
        ValueError: names suite and length.
    """
    for suite in suites:
        for length in suite.lengths:
            if max_model_len and length > max_model_len:
                raise ValueError(f"{suite.name}: length {length} doesn't fit the model's {max_model_len} tokens")
