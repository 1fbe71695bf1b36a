"""Which rule routes tokens outside training: prices (causal) or the flow (as in training)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from megatron_maxscore.moe.context import RUN


def uses_flow(eval_routing: str) -> bool:
    """Return whether a module in evaluation mode routes by the flow now."""
    return (RUN.evaluation_rule or eval_routing) == "flow"


@contextmanager
def evaluation_routing(rule: Literal["price", "flow"]) -> Iterator[None]:
    """Make every MaxScore router in evaluation mode use ``rule`` inside the ``with`` block.

    It concerns the thread that enters the block.
    """
    before, RUN.evaluation_rule = RUN.evaluation_rule, rule
    try:
        yield
    finally:
        RUN.evaluation_rule = before


NO_FLOW_WITH_CACHE = (
    "flow routing (--maxscore-eval-routing flow) cannot decode with a key-value cache: the flow "
    "spreads the tokens of a whole batch, and a decoder routes them one by one; use "
    "--maxscore-eval-routing price"
)


def check_no_cache() -> None:
    """Refuse flow routing while one of Megatron's inference engines uses the model.

    Raises:
        ValueError: one does; names the option to change.
    """
    try:
        from megatron.core.inference.utils import InferenceMode
    except ImportError:  # before megatron-core 0.19
        return
    if InferenceMode.is_active():
        raise ValueError(NO_FLOW_WITH_CACHE)
