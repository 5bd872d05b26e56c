"""What a client touches: command line, settings, vLLM's OpenAI app with our routes, metrics and console."""
