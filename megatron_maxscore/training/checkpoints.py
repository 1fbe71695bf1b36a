"""Distributed checkpoints: prices that stock runs lack, and numbers of experts that differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_maxscore._replacements import Replacements
from megatron_maxscore._run import is_rank_zero
from megatron_maxscore.errors import CollectiveError
from megatron_maxscore.moe.router import BIAS_NAME, PRICES_NAME


class OtherExpertsError(CollectiveError):
    """A checkpoint has another number of experts; raised on every rank."""


def hook(replacements: Replacements) -> None:
    """Wrap the function that loads a distributed checkpoint."""
    from megatron.core import dist_checkpointing

    replacements.wrap(dist_checkpointing, "load", _without_absent_prices)


def _price_entries(state: Any) -> Iterator[tuple[dict, str, Any]]:
    """Yield (containing dict, key, sharded tensor) of every price buffer in a nested state."""
    for key, value in list(state.items()) if isinstance(state, dict) else ():
        if isinstance(value, dict):
            yield from _price_entries(value)
        elif str(getattr(value, "key", "")).endswith(f".{PRICES_NAME}"):
            yield state, key, value


def _check_experts(entries: list[tuple[dict, str, Any]], metadata: Any, directory: Any) -> None:
    """Refuse a checkpoint of other experts; every rank reads the same metadata."""
    for _, _, value in entries:
        weight = value.key.removesuffix(PRICES_NAME) + "weight"
        saved = metadata.get(weight)
        if saved is None:
            continue
        own, there = int(value.global_shape[-1]), int(saved.global_shape[-2])
        if own != there:
            raise OtherExpertsError(
                f"the checkpoint {directory} has {there} experts, --num-experts is {own}; use "
                f"--num-experts {there}, or load another checkpoint"
            )


def _without_absent_prices(original: Any) -> Any:
    def load(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron.core import dist_checkpointing

        entries = list(_price_entries(sharded_state_dict))
        if entries:
            metadata = dist_checkpointing.load_tensors_metadata(str(checkpoint_dir))
            present = metadata.keys()
            absent = [(owner, key) for owner, key, value in entries if value.key not in present]
            # What an export has added is for stock routers; here prices say it.
            for owner, key, _ in entries:
                owner.pop(key.removesuffix(PRICES_NAME) + BIAS_NAME, None)
            _check_experts(entries, metadata, checkpoint_dir)
            for owner, key in absent:
                # The router fills what is missing with zeros when the state reaches it.
                del owner[key]
            if absent and is_rank_zero():
                print(
                    f"megatron_maxscore: {checkpoint_dir} has no expert prices; they start at zero",
                    flush=True,
                )
        return original(sharded_state_dict, checkpoint_dir, *args, **kwargs)

    return load
