"""Quality benchmarks that talk to any OpenAI-compatible endpoint."""
