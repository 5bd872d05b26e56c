"""The only part of `attention_plugins` that knows vLLM: backends and workers."""
