"""vLLM's engine client, giving every request its policy and taking note of what was kept."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM

from kvcache.registry import make_policy
from kvcache.vllm_adapter.scheduler import EXTRA_ARG
from server.metrics import CompressionMetrics
from server.policies import PolicyDesk
from server.scope import RequestScope, current_scope


class LongreachLLM(AsyncLLM):
    """The one place that all generation passes: chat, completions, responses, tool calls."""

    desk: PolicyDesk
    metrics: CompressionMetrics

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any) -> AsyncGenerator[Any, None]:
        """As vLLM's. Not a coroutine, so that a refusal comes before an answer, also a streamed one, has begun.

        Raises:
            VLLMValidationError: the prompt's compression never fits the KV cache.
        """
        scope = current_scope.get()
        words = (scope.kv_cache if scope else None) or self.desk.default
        if self.desk.unavailable is None:
            self._check_pool(prompt, words)
            sampling_params.extra_args = {**(sampling_params.extra_args or {}), EXTRA_ARG: words}
        return self._noting(super().generate(prompt, sampling_params, request_id, **kwargs), words, scope)

    async def _noting(
        self, outputs: AsyncGenerator[Any, None], words: dict[str, Any], scope: RequestScope | None
    ) -> AsyncGenerator[Any, None]:
        """Take our usage out of the dictionary of KV connectors, in which it travels."""
        async with aclosing(outputs):
            async for output in outputs:
                params = output.kv_transfer_params or {}
                told = params.pop(EXTRA_ARG, None)
                if told:
                    output.kv_transfer_params = params or None
                    self.metrics.update(told["totals"])
                if output.finished and scope:
                    if told:
                        scope.usage.append(told["usage"])
                    elif self.desk.unavailable:  # vLLM's own scheduler, which tells nothing
                        scope.usage.append(_all_kept(words, output))
                yield output

    def _check_pool(self, prompt: Any, words: dict[str, Any]) -> None:
        """A prompt and its target blocks have to fit the pool at the same time, once.

        Raises:
            VLLMValidationError: they never will.
        """
        tokens = (isinstance(prompt, dict) and prompt.get("prompt_token_ids")) or ()
        policy = make_policy(words)
        page_size = self.desk.page_size
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


def _all_kept(words: dict[str, Any], output: Any) -> dict[str, Any]:
    length = len(output.prompt_token_ids or ())
    return {**words, "prompt_tokens": length, "kept_tokens": dict.fromkeys(("mean", "min", "max"), float(length))}
