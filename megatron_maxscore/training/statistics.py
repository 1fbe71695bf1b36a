"""Per-iteration statistics of the MoE layers, counted from dispatched tokens.

With ``--maxscore-stats-file`` every MoE layer, MaxScore's or stock, notes what its dispatcher hands
to the experts. Once per iteration three small all-reduces over the world sum it up, and rank 0
appends a JSON line. Without the flag nothing is wrapped and nothing communicated.

Shape letters: L layers, E experts.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch
import torch.distributed as dist

from megatron_maxscore._patches import PatchSet


def hook(patches: PatchSet) -> None:
    """Watch layers as they are built, if the parsed arguments ask for it, and training steps."""
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.training import training

    watch = _Watch()
    patches.wrap(MoELayer, "__init__", watch.building_layers)
    patches.wrap(training, "train_step", watch.taking_steps)


def _stats_file() -> str | None:
    from megatron.training import get_args

    try:
        return getattr(get_args(), "maxscore_stats_file", None)
    except AssertionError:
        # Layers can be built without Megatron's global arguments.
        return None


class _Watch:
    """Counts of one process since the last line was written."""

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.loads_LE: torch.Tensor | None = None
        self.expected_L: torch.Tensor | None = None
        self.maxvio_L: torch.Tensor | None = None

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
        from megatron.core.tensor_parallel.random import is_checkpointing

        def dispatch_postprocess(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            again = is_checkpointing() and torch.is_grad_enabled()
            # Expert-tensor-parallel ranks see the same tokens: the first one counts.
            if layer.training and not again:
                self._count(layer, dispatcher, result[1])
            return result

        return dispatch_postprocess

    def _allocate(self, layer: Any) -> None:
        config = layer.config
        num_layers = config.num_layers + (config.mtp_num_layers or 0)
        self.loads_LE = torch.zeros(num_layers, config.num_moe_experts, dtype=torch.int64)
        self.expected_L = torch.zeros(num_layers, dtype=torch.int64)
        self.maxvio_L = torch.full((num_layers,), -1.0, dtype=torch.float64)

    def _count(self, layer: Any, dispatcher: Any, tokens_per_expert: torch.Tensor) -> None:
        if self.loads_LE is None:
            self._allocate(layer)
        assert self.loads_LE is not None and self.expected_L is not None
        assert self.maxvio_L is not None
        config = layer.config
        index = layer.layer_number - 1 + (config.num_layers if layer.is_mtp_layer else 0)
        count = tokens_per_expert.detach().cpu().to(torch.int64)
        own = dispatcher.hidden_shape_before_permute[0] * config.moe_router_topk
        self.expected_L[index] += own
        ranks = dispatcher.ep_size * dispatcher.tp_size
        mean = own * ranks / config.num_moe_experts
        if mean > 0:
            violation = float(count.max()) / mean - 1.0
            self.maxvio_L[index] = max(float(self.maxvio_L[index]), violation)
        if dispatcher.tp_rank == 0:
            first = dispatcher.local_expert_indices[0]
            self.loads_LE[index, first : first + count.numel()] += count

    def _write(self, path: str, step_seconds: float) -> None:
        from megatron.training import get_args

        args = get_args()
        num_layers = args.num_layers + (args.mtp_num_layers or 0)
        if self.loads_LE is None:
            # A pipeline stage without MoE layers takes part with zeros.
            self.loads_LE = torch.zeros(num_layers, args.num_experts or 1, dtype=torch.int64)
            self.expected_L = torch.zeros(num_layers, dtype=torch.int64)
            self.maxvio_L = torch.full((num_layers,), -1.0, dtype=torch.float64)
        assert self.expected_L is not None and self.maxvio_L is not None
        statistics = [
            layer.router.statistics for layer in self.layers if hasattr(layer.router, "statistics")
        ]
        seconds = sum(s.seconds for s in statistics)
        solves = sum(s.solves for s in statistics)
        gap = max((float(s.largest_gap) for s in statistics), default=0.0)
        for s in statistics:
            s.forget_solves()
        counts = torch.cat([self.loads_LE.flatten(), self.expected_L, torch.tensor([solves])])
        sums = torch.tensor([seconds, step_seconds], dtype=torch.float64)
        maxima = torch.cat([self.maxvio_L, torch.tensor([gap], dtype=torch.float64)])
        if dist.get_backend() == "nccl":
            device = torch.device("cuda", torch.cuda.current_device())
            counts, sums, maxima = counts.to(device), sums.to(device), maxima.to(device)
        dist.all_reduce(counts)
        dist.all_reduce(sums)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        if dist.get_rank() == 0:
            loads_LE = counts[: self.loads_LE.numel()].reshape(self.loads_LE.shape).cpu()
            expected_L = counts[self.loads_LE.numel() : -1].cpu()
            line = {
                "iteration": getattr(args, "curr_iteration", 0) + 1,
                "loads": loads_LE.tolist(),
                "dropped": (expected_L - loads_LE.sum(1)).tolist(),
                "maxvio": maxima[:-1].cpu().tolist(),
                "largest_gap": float(maxima[-1]),
                "solves": int(counts[-1]),
                "solve_seconds": float(sums[0]) / dist.get_world_size(),
                "step_seconds": float(sums[1]) / dist.get_world_size(),
            }
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.loads_LE.zero_()
        self.expected_L.zero_()
        self.maxvio_L.fill_(-1.0)
