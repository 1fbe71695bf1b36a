"""Kernels compiled with numba, on arrays and numbers only; ``passes`` calls them."""
