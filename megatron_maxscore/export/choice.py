"""Which formats can hold a model."""

from __future__ import annotations

from typing import Any

from megatron_maxscore.export.ernie4_5_moe import ERNIE4_5_MOE
from megatron_maxscore.export.formats import Format, common_reasons
from megatron_maxscore.export.glm4_moe import GLM4_MOE

FORMATS = {format_.name: format_ for format_ in (GLM4_MOE, ERNIE4_5_MOE)}
AUTO = "auto"


def refusals(args: Any) -> dict[str, list[str]]:
    """Return what would have to change for each format to hold a model; empty for one that can.

    Args:
        args: Megatron's, as they are parsed or later.

    Returns:
        For each format, what is asked of it and what is asked of any.
    """
    common = common_reasons(args)
    return {name: [*format_.reasons(args), *common] for name, format_ in FORMATS.items()}


def choose(args: Any, name: str = AUTO) -> Format:
    """Return the format of a model.

    Args:
        args: Megatron's, as they are parsed or later.
        name: of a format, or auto: the first that can hold it.

    Raises:
        ValueError: the format cannot hold it, or none can; says what mends it, the nearest first.
    """
    found = refusals(args)
    if name != AUTO:
        found = {name: found[name]}
    for candidate, reasons in found.items():
        if not reasons:
            return FORMATS[candidate]
    raise ValueError(f"no format can hold this model exactly; {described(found)}")


def described(found: dict[str, list[str]]) -> str:
    """Return reasons as one line: those of any format, then the format that lacks least first."""
    first, *others = found.values()
    common = [reason for reason in first if all(reason in other for other in others)]
    own = {name: [r for r in reasons if r not in common] for name, reasons in found.items()}
    nearest = sorted(own.items(), key=lambda item: len(item[1]))
    parts = [", ".join(common)] if common else []
    parts += [f"for {name} {', '.join(reasons)}" for name, reasons in nearest if reasons]
    return "; ".join(parts)
