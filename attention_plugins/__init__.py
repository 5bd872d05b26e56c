"""What is read: attention over compressed caches, and its vLLM backends (`vllm_adapter`)."""
