"""The only part of `kvcache` that knows vLLM: cache spec, block manager, scheduler."""
