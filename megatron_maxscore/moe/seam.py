"""Where our choice of experts enters Megatron's router, and in what state logits go there.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_maxscore.flow.places import is_device
from megatron_maxscore.ops import finite


def seen_with(config: Any, values: dict[str, Any]) -> Any:
    """Return a view of a config in which some attributes have other values.

    All layers share the config, and its attributes may change later (an annealed loss coefficient,
    padding in decoding). A copy would miss such changes. The view shares the config's attributes.
    """

    def seen(name: str) -> property:
        # A property comes before the attribute of the same name.
        return property(
            lambda self: values[name], lambda self, value: self.__dict__.update({name: value})
        )

    # Copies and pickles are views again, of the copied config.
    again = lambda self: (seen_with, (config, values))  # noqa: E731
    members: dict[str, Any] = {name: seen(name) for name in values}
    members |= {"__reduce__": again, "__reduce_ex__": lambda self, _: again(self)}
    view_class = type(type(config).__name__, (type(config),), members)
    view: Any = object.__new__(view_class)
    view.__dict__ = config.__dict__
    return view


class Selector:
    """Stands in ``router_replay``'s place and answers Megatron's question for the top k.

    Args:
        select: returns gates (T, K) and experts (T, K) int64 for scores (T, E) and the replay.
        replay: the genuine replay, None if none is configured. It is asked first.
    """

    def __init__(self, select: Callable[[Tensor, Any], tuple[Tensor, Tensor]], replay: Any) -> None:
        self._select, self.replay = select, replay
        self._layer_number: int | None = None

    @property
    def layer_number(self) -> int | None:
        """Number of the layer, which Megatron sets and a replay needs."""
        return self._layer_number

    @layer_number.setter
    def layer_number(self, value: int) -> None:
        self._layer_number = value
        if self.replay is not None:
            self.replay.layer_number = value

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the gates (T, K) and the experts (T, K) int64 for Megatron's scores (T, E)."""
        return self._select(scores, self.replay)


def without_bad_scores(logits: Tensor, padding_T: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Replace logits that are not finite by 0, so that experts can be chosen.

    Raising here would leave the other ranks waiting in the all-to-all.

    Args:
        logits: (S, B, E).
        padding_T: (T,) bool, padding, which may hold anything.

    Returns:
        The logits, and (T,) bool, tokens of which a logit was replaced; None if it is known that
        there are none.
    """
    # On a device the answer stays there: waiting for it would hold up every layer.
    if not is_device(logits) and bool(torch.isfinite(logits.detach()).all()):
        return logits, None
    clean, is_bad = finite(logits)
    bad_T = is_bad.reshape(-1)
    return clean, bad_T if padding_T is None else bad_T & ~padding_T
