"""Allocators: how a request's budget is shared over its layers, and over a layer's KV heads. One file, one paper."""
