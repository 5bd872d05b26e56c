"""Patterns: what a prompt's attention computes of a cache that stays whole."""
