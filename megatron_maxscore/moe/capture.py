"""CUDA graphs: what a routing call may do while one is captured.

A graph repeats the kernels of a call with other inputs, and nothing that Python did. So a captured
call reads and writes tensors that keep their place (prices, their sums, statistics, the annealing
factor), and whatever Python decides must follow from the configuration alone.
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
    """Return whether they hold the preparation of the dispatch, or all of it."""
    graph = graph_of(config)
    if graph.implementation == "full_iteration":
        return True
    # Megatron's own implementation does not tell the two apart.
    names = {"moe_preprocess"} | ({"moe_router"} if graph.implementation == "local" else set())
    return graph.implementation != "none" and bool(names & graph.modules)
