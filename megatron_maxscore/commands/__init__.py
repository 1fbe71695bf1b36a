"""The product's commands: ``python -m megatron_maxscore COMMAND``."""
