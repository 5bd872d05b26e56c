"""Load on an endpoint: vLLM's benchmark library sends, times and sums up; when to send and when to end is ours.

The parts of `vllm bench serve` are used, not its command: that one has no limit for the time that a load takes and
no requests that follow each other, and tells of an error only its status.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import aiohttp
from tqdm import tqdm
from vllm.benchmarks.datasets import SampleRequest
from vllm.benchmarks.lib.endpoint_request_func import (
    RequestFuncInput,
    RequestFuncOutput,
    async_request_openai_completions,
)
from vllm.benchmarks.serve import calculate_metrics, get_request

from benchmarks.evaluation.endpoint import Endpoint
from benchmarks.loadtest.prompts import Conversation, Turn, Writer
from benchmarks.loadtest.records import DONE, FAILED, UNFINISHED, Goals, Record

PERCENTILES = (50.0, 90.0, 95.0, 99.0)
LET_GO = 10.0
"""Seconds that requests have to end themselves when their time is up."""


@dataclass(frozen=True)
class Limits:
    """What a load may take.

    Attributes:
        seconds: after which nothing is sent any more.
        drain: seconds for what is under way then, and after the last arrival.
        concurrency: requests in flight at most; others wait here, which counts as time to the first token.
    """

    seconds: float
    drain: float
    concurrency: int


class Load:
    """One load: conversations and when each begins, sent to an endpoint with some fields."""

    def __init__(
        self, endpoint: Endpoint, writer: Writer, conversations: Sequence[Conversation], starts: Sequence[float],
        fields: Mapping[str, Any], limits: Limits, label: str = "",
    ) -> None:  # fmt: skip
        """
        Args:
            starts: seconds, one for each conversation.
            fields: more of the request's body.
        """
        self.endpoint, self.writer, self.conversations, self.starts = endpoint, writer, conversations, starts
        self.fields, self.limits = dict(fields), limits
        self.records = {
            (number, step): Record(number, step, turn.tokens, turn.output, start)
            for number, (conversation, start) in enumerate(zip(conversations, starts, strict=True))
            for step, turn in enumerate(conversation.turns)
        }
        self.outputs: list[RequestFuncOutput] = []
        self.duration = 0.0
        self.in_flight = self.most_in_flight = 0
        self.ending = False
        self.open: dict[str, aiohttp.ClientResponse] = {}
        self.errors: dict[str, str] = {}
        self.bar = tqdm(total=len(self.records), desc=label, unit="request", leave=False, dynamic_ncols=True)

    async def run(self) -> list[Record]:
        """Send everything that there is time for, and say what became of each request."""
        timeout = aiohttp.ClientTimeout(total=self.limits.seconds + self.limits.drain + LET_GO)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=1.0)
        self.places = asyncio.Semaphore(self.limits.concurrency)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, trace_configs=[self._trace()], read_bufsize=1 << 20
        ) as self.session:
            self.began = time.perf_counter()
            tasks: list[asyncio.Task[None]] = []
            sending = asyncio.create_task(self._send(tasks))
            await asyncio.wait([sending], timeout=self.limits.seconds)
            sending.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=self.limits.drain)
            self.duration = time.perf_counter() - self.began
            await self._end(tasks)
        self.bar.close()
        return list(self.records.values())

    async def _send(self, tasks: list[asyncio.Task[None]]) -> None:
        timed = [SampleRequest([], 0, timestamp=start) for start in self.starts]
        number = 0
        async for _ in get_request(timed, 0.0, self_timed=True):
            tasks.append(asyncio.create_task(self._converse(number)))
            number += 1

    async def _converse(self, number: int) -> None:
        conversation = self.conversations[number]
        for step, turn in enumerate(conversation.turns):
            if step:
                await asyncio.sleep(conversation.pause)
            record = self.records[number, step]
            if self.ending or not await self._ask(record, turn):
                return

    async def _ask(self, record: Record, turn: Turn) -> bool:
        """Send one request; whether it was answered."""
        record.arrival = time.perf_counter() - self.began
        name = f"{record.conversation}-{record.turn}"
        async with self.places:
            if self.ending:
                return False
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            record.sent, record.status = time.perf_counter() - self.began, UNFINISHED
            try:
                output = await async_request_openai_completions(self._input(turn, name), self.session)
            finally:
                self.in_flight -= 1
                self.open.pop(name, None)
        self._note(record, output, self.errors.get(name))
        self.bar.update()
        self.bar.set_postfix_str(f"{self.in_flight} in flight")
        return record.status == DONE

    def _input(self, turn: Turn, name: str) -> RequestFuncInput:
        return RequestFuncInput(
            prompt=self.writer.ids(turn), api_url=f"{self.endpoint.root}/v1/completions", prompt_len=turn.tokens,
            output_len=turn.output, model=self.endpoint.model, extra_headers=dict(self.endpoint.headers),
            extra_body={"temperature": 0.0, **self.fields}, ignore_eos=True, request_id=name,
        )  # fmt: skip

    def _note(self, record: Record, output: RequestFuncOutput, error: str | None) -> None:
        """Put into the record what vLLM's library measured, from the arrival on."""
        assert record.sent is not None
        waited = record.sent - record.arrival
        if output.ttft:
            output.ttft += waited
            record.ttft = output.ttft
        if output.success:
            output.latency += waited
            output.start_time -= waited
            record.status, record.seconds = DONE, output.latency
            record.prompt_tokens, record.output_tokens = output.prompt_len, output.output_tokens
            if output.output_tokens > 1:
                record.tpot = (output.latency - output.ttft) / (output.output_tokens - 1)
            error = _miscounted(record)
        elif not self.ending:
            error = error or (output.error.strip().splitlines() or ["no answer"])[-1]
        if error and not (self.ending and not output.success):
            record.status, record.error, output.success = FAILED, error, False
        self.outputs.append(output)

    def _trace(self) -> aiohttp.TraceConfig:
        """Keep hold of responses, to end them, and of what errors say."""
        trace = aiohttp.TraceConfig()

        async def keep(_: aiohttp.ClientSession, __: SimpleNamespace, told: aiohttp.TraceRequestEndParams) -> None:
            name = told.headers.get("x-request-id", "")
            self.open[name] = told.response
            if told.response.status != 200:
                text = await told.response.text()
                self.errors[name] = f"status {told.response.status}: {text[:500]}"

        trace.on_request_end.append(keep)
        return trace

    async def _end(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """End what still runs. Closing a response ends its request with what has come until then."""
        self.ending = True
        for response in list(self.open.values()):
            response.close()
        left = [task for task in tasks if not task.done()]
        if left:
            _, left_over = await asyncio.wait(left, timeout=LET_GO if self.open else 0.1)
            for task in left_over:  # they wait for a response, a place or their turn
                task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    def metrics(self, goals: Goals) -> dict[str, Any]:
        """vLLM's figures of the requests that are done; seconds there are ours, its milliseconds stay in the names."""
        limits = {"ttft": goals.ttft * 1e3, "tpot": goals.tpot * 1e3}
        done = [output for output in self.outputs if output.success]
        if not done:
            return {}
        with contextlib.redirect_stdout(io.StringIO()):  # it prints advice
            told, _ = calculate_metrics([], done, self.duration, None, list(PERCENTILES), limits)
        return {
            name: {f"p{p:g}": round(float(value), 3) for p, value in figure} if isinstance(figure, list)
            else round(float(figure), 4)
            for name, figure in asdict(told).items()
        }  # fmt: skip


def _miscounted(record: Record) -> str | None:
    """Why an answer isn't one to this request."""
    if record.prompt_tokens != record.asked_prompt:
        return f"{record.asked_prompt} tokens were sent, the server counted {record.prompt_tokens}"
    if record.output_tokens != record.asked_output:
        return f"{record.asked_output} tokens were asked for, {record.output_tokens} came"
    return None
