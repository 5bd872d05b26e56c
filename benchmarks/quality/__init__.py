"""Quality benchmarks: over HTTP at any OpenAI-compatible endpoint, and a table from an engine inside the process."""
