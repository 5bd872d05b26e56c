"""What stays in memory: policies, budgets, evidence, pages, compaction. Torch only; vLLM is known to `vllm_adapter`."""
