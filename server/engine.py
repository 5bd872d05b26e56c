"""vLLM's engine client, giving every request its policy and taking note of what was kept."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM

from kvcache.registry import make_policy
from kvcache.vllm_adapter.scheduler import EXTRA_ARG
from server.metrics import CompressionMetrics
from server.policies import PolicyDesk
from server.scope import current_scope


class LongreachLLM(AsyncLLM):
    """The one place that all generation passes: chat, completions, responses, tool calls."""

    desk: PolicyDesk
    metrics: CompressionMetrics

    async def generate(  # type: ignore[override]
        self, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        scope = current_scope.get()
        words = (scope.kv_cache if scope else None) or self.desk.default
        self._check_pool(prompt, words)
        sampling_params.extra_args = {**(sampling_params.extra_args or {}), EXTRA_ARG: words}
        async for output in super().generate(prompt, sampling_params, request_id, **kwargs):
            # Our usage travels in the dictionary of KV connectors, which we refuse at start-up.
            if params := output.kv_transfer_params:
                output.kv_transfer_params = None
                self.metrics.update(params[EXTRA_ARG]["totals"])
                if scope:
                    scope.usage.append(params[EXTRA_ARG]["usage"])
            yield output

    def _check_pool(self, prompt: Any, words: dict[str, Any]) -> None:
        """A prompt and its target blocks have to fit the pool at the same time, once.

        Raises:
            VLLMValidationError: they never will.
        """
        tokens = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
        policy = make_policy(words)
        if not tokens or policy is None:
            return
        page_size = self.desk.page_size
        plan = policy.plan(len(tokens), page_size)
        blocks = (self.vllm_config.cache_config.num_gpu_blocks or 0) - 1  # one is vLLM's null block
        if plan and plan.full_pages + 1 + plan.kept_pages > blocks:
            raise VLLMValidationError(
                f"A prompt of {len(tokens)} tokens and its compressed copy need {plan.full_pages + 1 + plan.kept_pages} "
                f"blocks of {page_size} tokens at once, the KV cache has {blocks}. Lower kv_cache.budget, use the "
                "policy 'none', or start the server with more KV cache memory (--kv-cache-memory-bytes).",
                parameter="kv_cache.budget",
            )
