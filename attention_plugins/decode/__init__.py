"""Selectors: what a step of decoding reads of a cache that stays whole."""
