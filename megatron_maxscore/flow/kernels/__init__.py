"""Kernels compiled with numba, on arrays and numbers only; :mod:`fused` calls them."""
