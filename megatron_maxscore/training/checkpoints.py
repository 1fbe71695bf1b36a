"""Distributed checkpoints: prices that stock runs lack, and numbers of experts that differ."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from megatron_maxscore._replacements import Replacements
from megatron_maxscore._run import is_rank_zero
from megatron_maxscore.errors import CollectiveError
from megatron_maxscore.moe.state import BIAS_NAME, PRICES_NAME
from megatron_maxscore.training.steps import uses_maxscore


class OtherExpertsError(CollectiveError):
    """A checkpoint has another number of experts; raised on every rank."""


def hook(replacements: Replacements, has_our_bias: Callable[[], bool] = uses_maxscore) -> None:
    """Wrap the function that loads a distributed checkpoint.

    Args:
        replacements: to be undone together.
        has_our_bias: whether an expert bias is ours, and not a stock router's.
    """
    from megatron.core import dist_checkpointing

    replacements.wrap(
        dist_checkpointing, "load", functools.partial(_without_absent_prices, has_our_bias)
    )


def _price_entries(state: Any) -> Iterator[tuple[dict, str, Any]]:
    """Yield (containing dict, key, sharded tensor) of all prices and biases in a nested state."""
    for key, value in list(state.items()) if isinstance(state, dict) else ():
        if isinstance(value, dict):
            yield from _price_entries(value)
        elif _name_of(value) in (PRICES_NAME, BIAS_NAME):
            yield state, key, value


def _name_of(value: Any) -> str:
    return str(getattr(value, "key", "")).rpartition(".")[2]


def _check_experts(entries: list[tuple[dict, str, Any]], metadata: Any, directory: Any) -> None:
    """Refuse a checkpoint of other experts; every rank reads the same metadata."""
    for _, _, value in entries:
        weight = value.key.removesuffix(_name_of(value)) + "weight"
        saved = metadata.get(weight)
        if saved is None:
            continue
        own, there = int(value.global_shape[-1]), int(saved.global_shape[-2])
        if own != there:
            raise OtherExpertsError(
                f"the checkpoint {directory} has {there} experts, --num-experts is {own}; use "
                f"--num-experts {there}, or load another checkpoint"
            )


def _without_absent_prices(has_our_bias: Callable[[], bool], original: Any) -> Any:
    def load(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron.core import dist_checkpointing

        entries = [
            entry
            for entry in _price_entries(sharded_state_dict)
            if _name_of(entry[2]) == PRICES_NAME or has_our_bias()
        ]
        if entries:
            metadata = dist_checkpointing.load_tensors_metadata(str(checkpoint_dir))
            _check_experts(entries, metadata, checkpoint_dir)
            absent = [entry for entry in entries if entry[2].key not in metadata]
            for owner, key, _ in absent:
                # The router fills what is missing with zeros when the state reaches it.
                del owner[key]
            if absent and is_rank_zero():
                name = _name_of(absent[0][2]).replace("_", " ")
                print(
                    f"megatron_maxscore: {checkpoint_dir} has no {name}; prices start at zero",
                    flush=True,
                )
        return original(sharded_state_dict, checkpoint_dir, *args, **kwargs)

    return load
