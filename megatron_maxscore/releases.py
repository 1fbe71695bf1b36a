"""What the installed megatron-core can do: the one place that knows of releases.

Each function names a capability and finds it by the symbol it needs, so that forks and releases in
between are judged by what they have.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from dataclasses import dataclass
from typing import Any

# The newest release that the tests have run with.
NEWEST = (0, 19)


def version() -> tuple[int, int]:
    """Return (major, minor) of the installed megatron-core."""
    from megatron.core import package_info

    return int(package_info.MAJOR), int(package_info.MINOR)


def warn_if_untested() -> None:
    """Warn, once per process, of a release newer than those that were tested."""
    if version() > NEWEST:
        newest, own = (".".join(map(str, pair)) for pair in (NEWEST, version()))
        warnings.warn(
            f"megatron-core {own} is newer than {newest}, the newest release that this version of "
            "megatron_maxscore was tested with; a symbol that is missing will be named",
            stacklevel=2,
        )


def has_callable_specs() -> bool:
    """Return whether ``--spec`` may name a function of the model's config (from 0.19)."""
    from megatron.training import argument_utils

    return hasattr(argument_utils, "gpt_config_from_args")


@functools.cache
def has_metrics_tracker() -> bool:
    """Return whether MoE metrics have a tracker object (from 0.18)."""
    return importlib.util.find_spec("megatron.core.transformer.moe.moe_logging") is not None


def pads_for_operators() -> bool:
    """Return whether HybridEP pads rows for fused operators in bfloat16 too (from 0.20)."""
    return version() >= (0, 20)


@dataclass(frozen=True)
class Graph:
    """CUDA graphs of training.

    Attributes:
        implementation: none, local, transformer_engine or full_iteration.
        modules: names of what is captured of each layer; empty for whole layers.
    """

    implementation: str
    modules: frozenset[str]


def graph_of(config: Any) -> Graph:
    """Return the CUDA graphs of a configuration, by whatever name its release has for them.

    Args:
        config: a TransformerConfig, or Megatron's parsed arguments, which keep the flag's older
            name (to 0.17 the only one) apart.
    """
    implementation = getattr(config, "cuda_graph_impl", None) or "none"
    # Older flags, which Megatron's own configuration has turned into the new ones.
    if getattr(config, "external_cuda_graph", False):
        implementation = "transformer_engine"
    elif getattr(config, "enable_cuda_graph", False):
        implementation = "local"
    names = ("cuda_graph_scope_deprecated", "cuda_graph_scope", "cuda_graph_modules")
    given: Any = next((found for name in names if (found := getattr(config, name, None))), [])
    if isinstance(given, str):
        given = given.replace(",", " ").split()
    modules = {str(getattr(module, "name", module)) for module in given} - {"full"}
    if "full_iteration" in modules:
        implementation, modules = "full_iteration", set()
    return Graph(implementation, frozenset(modules))


def names_bound_early(name: str) -> list[Any]:
    """Return modules of ``megatron.training`` that bind an argument function by name (to 0.17)."""
    from megatron.training import initialize

    return [initialize] if hasattr(initialize, name) else []
