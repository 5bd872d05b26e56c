"""How many long requests a server takes, measured over HTTP on any OpenAI-compatible endpoint: `longreach loadtest`."""
