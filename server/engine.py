"""vLLM's engine client, giving requests their policy, selector and pattern, and taking note of what these did."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm.exceptions import RetryableRequestError, VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from attention_plugins.decode.registry import FIELD as DECODE_FIELD
from attention_plugins.prefill.registry import FIELD as PREFILL_FIELD
from kvcache.registry import make_policy
from kvcache.vllm_adapter.scheduler import EXTRA_ARG
from server.access.middleware import Visitor, current_visitor
from server.desks import Desks, Words
from server.draining import Door
from server.metrics import AuditMetrics, CompressionMetrics, DecodeMetrics, PrefillMetrics
from server.scope import KV_FIELD, RequestScope, current_scope

_DEAD = "The engine died while it worked on this request. Send it again: the server, once restarted, will answer."
_CUT = "The server is stopping, and this request didn't finish in time. Send it again to another server."


class LongreachLLM(AsyncLLM):
    """The one place that all generation passes: chat, completions, responses, tool calls."""

    desks: Desks
    metrics: CompressionMetrics
    audit_metrics: AuditMetrics
    decode_metrics: DecodeMetrics
    prefill_metrics: PrefillMetrics
    door: Door | None = None
    """There once the engine has started."""
    drained: bool | None = None
    """Whether all requests finished before the engine was told to stop; None before that."""

    def shutdown(self, timeout: float | None = None) -> None:
        """As vLLM's, which calls this in a thread when the server is told to stop, after a drain of `timeout` s."""
        if self.door and self.drained is None and not self.errored:
            self.drained = self.door.drain(timeout or 0, self._cut)
            if handler := self.output_handler:  # nothing comes any more; it would report that the engine has died
                handler.get_loop().call_soon_threadsafe(handler.cancel)
        super().shutdown(timeout=0)

    def _cut(self) -> None:
        """Tell all clients that their requests won't finish."""
        if self.door and self.door.loop:
            self.door.loop.call_soon_threadsafe(self.output_processor.propagate_error, EngineDeadError())

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any) -> AsyncGenerator[Any, None]:
        """As vLLM's. Not a coroutine, so that a refusal comes before an answer, also a streamed one, has begun.

        Raises:
            VLLMValidationError: the prompt's compression never fits the KV cache, or the request would end the engine.
        """
        self._check_prompt_logprobs(sampling_params)
        scope = current_scope.get()
        words = self.desks.completed(scope.words if scope else {})
        if self._ours:
            self._check_pool(prompt, words[KV_FIELD])
            sampling_params.extra_args = self._extra_args(sampling_params.extra_args or {}, words)
        visitor = current_visitor.get()
        if visitor:
            prompt = _received(visitor, prompt)
        outputs = self._noting(super().generate(prompt, sampling_params, request_id, **kwargs), words, scope)
        return _charging(outputs, visitor, sampling_params.output_kind) if visitor else outputs

    @property
    def _ours(self) -> bool:
        """Whether scheduler and workers are ours, not vLLM's own."""
        return self.desks.policies.unavailable is None

    def _extra_args(self, others: dict[str, Any], words: dict[str, Words]) -> dict[str, Any]:
        """What the scheduler looks at, beside others' entries; what reads everything is vLLM's business alone."""
        others = {name: value for name, value in others.items() if name not in words}
        off = {desk.field: desk.off for desk in (self.desks.selectors, self.desks.patterns)}
        return {**others, **{field: told for field, told in words.items() if told != off.get(field)}}

    async def _noting(
        self, outputs: AsyncGenerator[Any, None], words: dict[str, Words], scope: RequestScope | None
    ) -> AsyncGenerator[Any, None]:
        """Take our usage out of the dictionary of KV connectors, in which it travels."""
        async with aclosing(_clear(outputs, self.door)) as clear:
            async for output in clear:
                params = output.kv_transfer_params or {}
                told = params.pop(EXTRA_ARG, None)
                if told:
                    output.kv_transfer_params = params or None
                    self.metrics.update(told["totals"])
                    if audits := told.get("audits"):
                        self.audit_metrics.update(audits)
                    self.decode_metrics.update(told.get("decode_totals") or {})
                    self.prefill_metrics.update(told.get("prefill_totals") or {})
                if output.finished and scope:
                    if not self._ours:  # vLLM's own scheduler, which tells nothing
                        told = {"usage": _all_kept(words[KV_FIELD], output)}
                    if told:
                        self._tell(scope, told)
                yield output

    def _tell(self, scope: RequestScope, told: dict[str, Any]) -> None:
        """Take note for the answer's usage. Reading everything is worth a word only where it was asked for."""
        scope.tell(KV_FIELD, told["usage"])
        for field, name, off in (
            (DECODE_FIELD, "decode_usage", self.desks.selectors.off),
            (PREFILL_FIELD, "prefill_usage", self.desks.patterns.off),
        ):
            if usage := told.get(name):
                scope.tell(field, usage)
            elif scope.words.get(field) == off:
                scope.tell(field, off)

    def _check_prompt_logprobs(self, sampling_params: Any) -> None:
        """vLLM's LoRA on CPUs takes a prompt's rows for those that are sampled, and the engine ends with an error.

        Raises:
            VLLMValidationError: log-probabilities of a prompt are asked for where this is so.
        """
        asked = getattr(sampling_params, "prompt_logprobs", None) is not None
        if asked and current_platform.is_cpu() and self.vllm_config.lora_config:
            raise VLLMValidationError(
                "prompt_logprobs can't be had on CPUs beside LoRA adapters: leave the field out, or start the server "
                "without --enable-lora.",
                parameter="prompt_logprobs",
            )

    def _check_pool(self, prompt: Any, words: Words) -> None:
        """A prompt and its target blocks have to fit the pool at the same time, once.

        Raises:
            VLLMValidationError: they never will.
        """
        tokens = (isinstance(prompt, dict) and prompt.get("prompt_token_ids")) or ()
        policy = make_policy(words)
        page_size = self.desks.policies.page_size
        plan = policy.plan(len(tokens), page_size) if policy and tokens else None
        if plan is None or plan.prompt_len > len(tokens):  # where the answer grows first, the scheduler looks
            return
        needed = len(tokens) // page_size + 1 + plan.kept_pages
        blocks = self.vllm_config.cache_config.num_gpu_blocks - 1  # one is vLLM's null block
        if needed > blocks:
            raise VLLMValidationError(
                f"A prompt of {len(tokens)} tokens and its compressed copy need {needed} blocks "
                f"of {page_size} tokens at once, the KV cache has {blocks}. Lower kv_cache.budget, use the "
                "policy 'none', or start the server with more KV cache memory (--kv-cache-memory-bytes).",
                parameter="kv_cache.budget",
            )


async def _clear(outputs: AsyncGenerator[Any, None], door: Door | None) -> AsyncGenerator[Any, None]:
    """With an error that tells a client what to do when the engine died, or stopped before a request had finished.

    Raises:
        RetryableRequestError: a 503, or the last event of a stream.
    """
    try:
        async with aclosing(outputs):
            async for output in outputs:
                yield output
    except EngineDeadError:
        raise RetryableRequestError(_CUT if door and door.closed else _DEAD) from None


def _all_kept(words: Words, output: Any) -> dict[str, Any]:
    length = len(output.prompt_token_ids or ())
    return {**words, "prompt_tokens": length, "kept_tokens": dict.fromkeys(("mean", "min", "max"), float(length))}


def _received(visitor: Visitor, prompt: Any) -> Any:
    """Charge a visitor for a prompt, which vLLM has tokenised, and keep its prefix apart where its key says so."""
    tokens = prompt.get("prompt_token_ids")
    visitor.charge("prompt", len(prompt["prompt_embeds"] if tokens is None else tokens))
    if not visitor.key.own_cache:
        return prompt
    # The digest, since no other client knows it: the salt of a request may be anything.
    return {**prompt, "cache_salt": f"{visitor.key.digest.hex()}/{prompt.get('cache_salt') or ''}"}


async def _charging(
    outputs: AsyncGenerator[Any, None], visitor: Visitor, kind: RequestOutputKind
) -> AsyncGenerator[Any, None]:
    """Charge a visitor for what comes, so also for the part of an answer that it waited for before it left."""
    async with aclosing(outputs):
        async for output in outputs:
            if kind is not RequestOutputKind.CUMULATIVE or output.finished:
                visitor.charge("generated", sum(len(answer.token_ids) for answer in output.outputs))
            yield output
