"""Kept sets of our policies beside those of NVIDIA's kvpress, on the same keys, values and queries."""
