"""MaxScore routing for Megatron: exactly k experts per token, no expert over its capacity."""

__version__ = "0.1.0"
