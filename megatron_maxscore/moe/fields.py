"""Our options as fields of Megatron's ``TransformerConfig``.

:func:`install_config_fields` makes each option of :class:`MaxScoreConfig` a real field
``maxscore_<name>`` of ``TransformerConfig`` (next to ``moe_router_type``), from which Megatron's
own argument factory makes the command-line flags.
"""

from __future__ import annotations

import dataclasses
import functools
import textwrap
import typing
from dataclasses import dataclass
from typing import Any, Literal

from megatron_maxscore._replacements import Replacements
from megatron_maxscore.moe.config import PREFIX, MaxScoreConfig, option

# Set on a class whose __init__ takes our fields, so that it is extended once.
_MARK = "_maxscore_fields"


def config_fields() -> dict[str, dataclasses.Field]:
    """Return the fields added to ``TransformerConfig``, by name."""

    @dataclass
    class _Fields:
        moe_router_type: Literal["topk", "maxscore"] = option(
            "topk", "Router of MoE layers. topk: Megatron's own. maxscore: MaxScore routing."
        )

    fields = {f.name: f for f in dataclasses.fields(_Fields)}
    fields["moe_router_type"].type = Literal["topk", "maxscore"]
    hints = typing.get_type_hints(MaxScoreConfig)
    for own in dataclasses.fields(MaxScoreConfig):
        clone: Any = dataclasses.field(default=own.default, metadata=own.metadata)
        clone.name, clone.type = PREFIX + own.name, hints[own.name]
        clone._field_type = own._field_type  # type: ignore[attr-defined]
        clone.kw_only = False
        fields[clone.name] = clone
    return fields


def fork_fields() -> str:
    """Return the source text that declares the same fields in ``TransformerConfig`` itself."""
    parts = []
    for name, item in config_fields().items():
        hint = item.type
        shown = hint.__name__ if isinstance(hint, type) else str(hint)
        shown = shown.replace("typing.", "").replace("'", '"')
        default = f'"{item.default}"' if isinstance(item.default, str) else repr(item.default)
        help_text = textwrap.fill(
            f'"""{item.metadata["argparse_meta"]["help"]}"""', 94, break_on_hyphens=False
        )
        parts.append(f"{name}: {shown} = {default}\n{help_text}\n")
    return "\n".join(parts)


def _has_fields(cls: Any) -> bool:
    """Return whether a fork declares our fields itself.

    Raises:
        ImportError: it declares those of another release of ours.
    """
    present = vars(cls)["__dataclass_fields__"].keys()
    if "moe_router_type" not in present:
        return False
    absent = config_fields().keys() - present
    if absent:
        raise ImportError(
            f"the patched TransformerConfig lacks {', '.join(sorted(absent))}: it was patched by "
            "another release of megatron_maxscore; run python -m megatron_maxscore.patch apply on "
            "the tree again"
        )
    return True


def install_config_fields(replacements: Replacements) -> None:
    """Make our options fields of ``TransformerConfig`` and of its subclasses.

    Classes derived later inherit them. ``dataclasses.replace``, ``asdict`` and copies keep the
    values, since the fields are real ones. A fork that was patched has them already.
    """
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig
    from megatron.core.transformer.heterogeneous import heterogeneous_config

    fields = config_fields()
    for cls in (
        TransformerConfig,
        MLATransformerConfig,
        heterogeneous_config.HeterogeneousTransformerConfig,
    ):
        if _MARK in vars(cls) or _has_fields(cls):
            continue
        own = vars(cls)["__dataclass_fields__"]
        replacements.set(cls, "__dataclass_fields__", {**own, **fields})
        for name, item in fields.items():
            replacements.set(cls, name, item.default)
        replacements.wrap(cls, "__init__", functools.partial(_taking_fields, fields))
        replacements.set(cls, _MARK, True)


def _taking_fields(fields: dict[str, dataclasses.Field], original: Any) -> Any:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        # Set before the original runs, so that __post_init__ sees them.
        for name, item in fields.items():
            value = kwargs.pop(name, getattr(self, name, item.default))
            object.__setattr__(self, name, value)
        original(self, *args, **kwargs)

    return init
