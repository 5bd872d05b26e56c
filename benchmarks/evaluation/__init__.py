"""What compression and sparsity lose, measured over HTTP on any OpenAI-compatible endpoint: `longreach eval`."""
