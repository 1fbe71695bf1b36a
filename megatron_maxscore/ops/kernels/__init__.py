"""Triton kernels, each beside its reference of the same name in :mod:`megatron_maxscore.ops`."""
