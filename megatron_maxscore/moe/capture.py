"""CUDA graphs: what a routing call may do while one is captured.

When a graph is replayed, the kernels of the captured call run again on new inputs, but its Python
code does not. So a captured call keeps its state (prices, their sums, statistics, the annealing
factor) in tensors whose memory stays where it is. Whatever Python decides in the call must follow
from the configuration alone.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_maxscore.releases import graph_of


def is_capturing() -> bool:
    """Return whether the current stream's work goes into a CUDA graph."""
    return torch.cuda.is_current_stream_capturing()


def holds_router(config: Any) -> bool:
    """Return whether CUDA graphs of this configuration hold the router in training.

    Args:
        config: a TransformerConfig, or Megatron's parsed arguments.
    """
    graph = graph_of(config)
    if graph.implementation == "full_iteration":
        return True
    return graph.implementation != "none" and "moe_router" in graph.modules


def holds_dispatch(config: Any) -> bool:
    """Return whether CUDA graphs hold the preparation of the dispatch, or the whole dispatch."""
    graph = graph_of(config)
    if graph.implementation == "full_iteration":
        return True
    # Megatron's own implementation (local) treats moe_router and moe_preprocess alike.
    names = {"moe_preprocess"} | ({"moe_router"} if graph.implementation == "local" else set())
    return graph.implementation != "none" and bool(names & graph.modules)
