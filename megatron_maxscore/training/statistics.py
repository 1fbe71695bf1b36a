"""Per-iteration statistics of the MoE layers, counted from dispatched tokens.

With ``--maxscore-stats-file`` every MoE layer, MaxScore's or stock, counts the tokens that its
dispatcher hands to the experts. They count when their backward pass runs, so scoring passes do not
count, and recomputed passes count once. A global batch that is run again counts once too. In each
iteration three small all-reduces over the world add up the counts, and rank 0 appends a JSON line.
Without the flag no layer is watched and nothing is communicated.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

import functools
import json
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization

from megatron_maxscore._replacements import Replacements


def hook(replacements: Replacements) -> None:
    """Watch layers as they are built, if the parsed arguments ask for it, and training steps."""
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.training import training

    watch = _Watch()
    replacements.wrap(MoELayer, "__init__", watch.building_layers)
    replacements.wrap(training, "finalize_model_grads", watch.ending_attempts)
    replacements.wrap(training, "train_step", watch.taking_steps)


def _stats_file() -> str | None:
    from megatron.training import get_args

    try:
        return getattr(get_args(), "maxscore_stats_file", None)
    except AssertionError:
        # Layers can be built without Megatron's global arguments.
        return None


@dataclass
class _Counts:
    """What the layers' experts got in an attempt at a global batch.

    Attributes:
        loads_LE: (L, E) int64 tokens of each expert.
        expected_L: (L,) int64 assignments that the routers made.
        maxvio_L: (L,) float64 the largest of all passes, -1 without one.
    """

    loads_LE: torch.Tensor
    expected_L: torch.Tensor
    maxvio_L: torch.Tensor

    @classmethod
    def zeros(cls, num_layers: int, num_experts: int) -> _Counts:
        return cls(
            torch.zeros(num_layers, num_experts, dtype=torch.int64),
            torch.zeros(num_layers, dtype=torch.int64),
            torch.full((num_layers,), -1.0, dtype=torch.float64),
        )


class _Watch:
    """Counts of one process: of the attempt that is under way, and of the last one that ended."""

    def __init__(self) -> None:
        self.layers: list[Any] = []
        # The most experts of a layer on any rank; stages may have layers of different sizes.
        self.most_experts: int | None = None
        self.counts: _Counts | None = None
        self.ended: _Counts | None = None

    def building_layers(self, original: Any) -> Any:
        def init(layer: Any, *args: Any, **kwargs: Any) -> None:
            original(layer, *args, **kwargs)
            if _stats_file() is not None:
                self.layers.append(layer)
                dispatcher = layer.token_dispatcher
                dispatcher.dispatch_postprocess = self._counting(
                    layer, dispatcher, dispatcher.dispatch_postprocess
                )

        return init

    def ending_attempts(self, original: Any) -> Any:
        def finalize_model_grads(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.ended, self.counts = self.counts, None
            return result

        return finalize_model_grads

    def taking_steps(self, original: Any) -> Any:
        def train_step(*args: Any, **kwargs: Any) -> Any:
            path = _stats_file()
            if path is None:
                return original(*args, **kwargs)
            started = time.perf_counter()
            result = original(*args, **kwargs)
            self._write(path, time.perf_counter() - started)
            return result

        return train_step

    def _counting(self, layer: Any, dispatcher: Any, original: Any) -> Any:
        def dispatch_postprocess(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            tokens_TH, tokens_per_expert, gates_T = result
            if layer.training and torch.is_grad_enabled() and tokens_TH.requires_grad:
                count_E = tokens_per_expert.detach().cpu().to(torch.int64)
                is_padded = get_align_size_for_quantization(layer.config) > 1
                if is_padded:
                    count_E = _without_padding(count_E, gates_T.detach().cpu())
                noted = _Dispatched(count_E, _assignments(dispatcher, is_padded))
                tokens_TH.register_hook(functools.partial(self._count, layer, dispatcher, noted))
            return result

        return dispatch_postprocess

    def _count(
        self, layer: Any, dispatcher: Any, noted: _Dispatched, gradient: torch.Tensor
    ) -> None:
        """Count a pass, whose backward pass runs, once."""
        if noted.has_counted:
            return
        noted.has_counted = True
        config = layer.config
        if self.counts is None:
            num_layers = config.num_layers + (config.mtp_num_layers or 0)
            self.counts = _Counts.zeros(num_layers, _most_experts(self.layers))
        counts = self.counts
        index = layer.layer_number - 1 + (config.num_layers if layer.is_mtp_layer else 0)
        counts.expected_L[index] += noted.assignments
        ranks = dispatcher.ep_size * dispatcher.tp_size
        mean = noted.assignments * ranks / config.num_moe_experts
        if mean > 0:
            violation = float(noted.count_E.max()) / mean - 1.0
            counts.maxvio_L[index] = max(float(counts.maxvio_L[index]), violation)
        # Expert-tensor-parallel ranks see the same tokens: the first one counts.
        if dispatcher.tp_rank == 0:
            first = dispatcher.local_expert_indices[0]
            counts.loads_LE[index, first : first + noted.count_E.numel()] += noted.count_E

    def _widened(self, loads_LE: torch.Tensor) -> torch.Tensor:
        """Return loads with as many columns as on every other rank; asks them the first time."""
        if self.most_experts is None:
            most = torch.tensor([loads_LE.shape[1]])
            if dist.get_backend() == "nccl":
                most = most.to(torch.device("cuda", torch.cuda.current_device()))
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            self.most_experts = int(most)
        return torch.nn.functional.pad(loads_LE, (0, self.most_experts - loads_LE.shape[1]))

    def _write(self, path: str, step_seconds: float) -> None:
        from megatron.training import get_args

        args = get_args()
        counts = self.ended
        if counts is None:
            # A pipeline stage without MoE layers takes part with zeros.
            num_layers = args.num_layers + (args.mtp_num_layers or 0)
            counts = _Counts.zeros(num_layers, _most_experts(self.layers) or args.num_experts or 1)
        statistics = [
            layer.router.last_statistics
            for layer in self.layers
            if hasattr(layer.router, "last_statistics")
        ]
        seconds = sum(s.seconds for s in statistics)
        solves = sum(s.solves for s in statistics)
        gap = max((float(s.largest_gap) for s in statistics), default=0.0)
        loads_LE = self._widened(counts.loads_LE)
        size = loads_LE.numel()
        integers = torch.cat([loads_LE.flatten(), counts.expected_L, torch.tensor([solves])])
        sums = torch.tensor([seconds, step_seconds], dtype=torch.float64)
        maxima = torch.cat([counts.maxvio_L, torch.tensor([gap], dtype=torch.float64)])
        if dist.get_backend() == "nccl":
            device = torch.device("cuda", torch.cuda.current_device())
            integers, sums, maxima = integers.to(device), sums.to(device), maxima.to(device)
        dist.all_reduce(integers)
        dist.all_reduce(sums)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        if dist.get_rank() == 0:
            loads_LE = integers[:size].reshape(loads_LE.shape).cpu()
            expected_L = integers[size:-1].cpu()
            line = {
                "iteration": getattr(args, "curr_iteration", 0) + 1,
                "loads": loads_LE.tolist(),
                "dropped": (expected_L - loads_LE.sum(1)).tolist(),
                "maxvio": maxima[:-1].cpu().tolist(),
                "largest_gap": float(maxima[-1]),
                "solves": int(integers[-1]),
                "solve_seconds": float(sums[0]) / dist.get_world_size(),
                "step_seconds": float(sums[1]) / dist.get_world_size(),
            }
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.ended = None


@dataclass
class _Dispatched:
    """One pass's tokens of each local expert, and how many assignments this rank made."""

    count_E: torch.Tensor
    assignments: int
    has_counted: bool = False


def _without_padding(count_E: torch.Tensor, gates_N: torch.Tensor) -> torch.Tensor:
    """Return (Z,) int64 how many of each expert's rows are no padding, whose gates are 0.

    Args:
        count_E: (Z,) int64 rows of each local expert.
        gates_N: (N,) gates of the rows, in order of the experts.
    """
    parts = gates_N[: int(count_E.sum())].split(count_E.tolist())
    return torch.stack([part.count_nonzero() for part in parts])


def _assignments(dispatcher: Any, is_padded: bool) -> int:
    """Return how many assignments this rank's router has made, dropped ones included.

    Args:
        dispatcher: whose tokens count.
        is_padded: whether rows of zeros do not count.
    """
    from megatron_maxscore.moe.dispatcher import MaxScoreTokenDispatcher

    is_ours = isinstance(dispatcher, MaxScoreTokenDispatcher)
    if is_ours and dispatcher.real_rows is not None:
        if is_padded:
            return int(dispatcher.real_rows * dispatcher.config.moe_router_topk)
        return int(dispatcher.num_out_tokens)
    # The one attribute that all of Megatron's dispatchers have; (S, B, H) of this rank.
    tokens = math.prod(dispatcher.hidden_shape[:-1])
    return int(tokens * dispatcher.config.moe_router_topk)


def _most_experts(layers: list[Any]) -> int:
    """Return the largest number of experts of these layers; 0 without layers."""
    return max((layer.config.num_moe_experts for layer in layers), default=0)
