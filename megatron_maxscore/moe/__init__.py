"""MaxScore routing on megatron-core's MoE layer."""

from megatron_maxscore.moe.config import MaxScoreConfig
from megatron_maxscore.moe.dispatcher import MaxScoreTokenDispatcher
from megatron_maxscore.moe.layer import install_layer_hook, with_maxscore
from megatron_maxscore.moe.router import MaxScoreRouter

__all__ = [
    "MaxScoreConfig",
    "MaxScoreRouter",
    "MaxScoreTokenDispatcher",
    "install_layer_hook",
    "with_maxscore",
]
