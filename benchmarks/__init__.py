"""Benchmarks: quality over HTTP, speed on a GPU, load over HTTP."""
