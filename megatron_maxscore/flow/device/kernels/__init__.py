"""Triton kernels of bounded mode; :mod:`megatron_maxscore.flow.device.solver` launches them."""
