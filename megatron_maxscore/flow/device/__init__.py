"""Bounded mode on the device: Triton kernels without a copy to the host."""
