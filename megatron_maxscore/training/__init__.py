"""Hooks into ``megatron.training``: arguments, end of a batch, evaluation, statistics."""

from __future__ import annotations

from typing import Any

from megatron_maxscore._replacements import Replacements
from megatron_maxscore._run import exit_with_error
from megatron_maxscore._wheel import answer_dataset_helpers

_replacements = Replacements("MaxScore training hooks")


def install() -> None:
    """Install every hook; a second call does nothing.

    Call it before the training script is run. CPU mode, if wanted, comes first.
    """
    if _replacements:
        return
    from megatron_maxscore.moe.fields import install_config_fields
    from megatron_maxscore.releases import warn_if_untested

    warn_if_untested()
    # Before megatron.training is imported: its argument parser reads these fields.
    install_config_fields(_replacements)
    from megatron_maxscore.moe.layer import install_layer_hook
    from megatron_maxscore.training import (
        arguments,
        checkpoints,
        evaluation,
        logging,
        statistics,
        steps,
    )

    install_layer_hook()
    answer_dataset_helpers(_replacements)
    for part in (arguments, checkpoints, steps, evaluation, logging, statistics):
        part.hook(_replacements)


def begin(args: Any, *, is_validated: bool = False) -> None:
    """Install every hook, if that is still to do, set our defaults and check arguments.

    Called by a patched fork's ``validate_args``, and by the specs for stock scripts.

    Args:
        args: Megatron's parsed arguments.
        is_validated: whether Megatron has validated them. Then the auxiliary loss stays as it is.

    Raises:
        SystemExit: on every rank, after one line on rank 0, if the arguments cannot work.
    """
    install()
    from megatron_maxscore.training.arguments import check_arguments, say_once, set_defaults

    try:
        if not is_validated:
            set_defaults(args)
        check_arguments(args)
        if args.moe_router_type == "maxscore":
            say_once(args)
    except ValueError as error:
        exit_with_error(str(error))


def uninstall() -> None:
    """Undo :func:`install`, for tests."""
    from megatron_maxscore.moe.layer import remove_layer_hook

    _replacements.undo()
    remove_layer_hook()
