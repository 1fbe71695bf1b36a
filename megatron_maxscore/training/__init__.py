"""Hooks into ``megatron.training``: arguments, end of a batch, evaluation, statistics."""

from __future__ import annotations

from megatron_maxscore._patches import PatchSet

_patches = PatchSet("MaxScore training hooks")


def install() -> None:
    """Install every hook; a second call does nothing.

    Call it before the training script is run. CPU mode, if wanted, comes first.
    """
    if _patches:
        return
    from megatron_maxscore.moe.config import install_config_fields

    # Before megatron.training is imported: its argument parser reads these fields.
    install_config_fields(_patches)
    from megatron_maxscore.moe.layer import install_layer_hook
    from megatron_maxscore.training import arguments, checkpoints, evaluation, statistics, steps

    install_layer_hook()
    for part in (arguments, checkpoints, steps, evaluation, statistics):
        part.hook(_patches)


def uninstall() -> None:
    """Undo :func:`install`, for tests."""
    from megatron_maxscore.moe.layer import remove_layer_hook

    _patches.undo()
    remove_layer_hook()
