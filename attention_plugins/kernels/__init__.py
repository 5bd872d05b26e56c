"""Triton kernels; each computes what a naive twin in torch computes, which runs where there is no GPU."""
