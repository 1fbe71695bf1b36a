"""What happens once per global batch: bad scores become an error, prices are averaged.

Two all-reduces per global batch: four int64 over the world, and layers times E + 1 float32 over
the ranks that hold replicas of the routers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_maxscore.errors import CollectiveError
from megatron_maxscore.moe.router import MaxScoreRouter


class BadScoresError(CollectiveError):
    """Router scores were NaN or infinite; raised on every rank together.

    Attributes:
        where: what was met, in which iteration, layer and rank.
    """

    def __init__(self, where: str) -> None:
        super().__init__(
            f"{where}; the optimizer step was not taken. Lower the learning rate, raise "
            "--moe-z-loss-coeff, or set --moe-router-dtype fp32, and resume from the last "
            "checkpoint"
        )
        self.where = where


def maxscore_routers(model: Iterable[torch.nn.Module]) -> list[MaxScoreRouter]:
    """Return the routers of a list of model chunks, in module order."""
    return [m for chunk in model for m in chunk.modules() if isinstance(m, MaxScoreRouter)]


def raise_on_bad_scores(routers: Sequence[MaxScoreRouter], iteration: int) -> None:
    """Raise one error on all ranks if any router met NaN or infinite scores since the last call.

    Every rank must call it, also one without routers. Communicates one all-reduce of one int64
    over the world, and an object all-gather when there is something to report.

    Args:
        routers: this rank's routers.
        iteration: for the message.

    Raises:
        BadScoresError: names iteration, layer, rank and count.
    """
    device = routers[0].expert_prices.device if routers else _default_device()
    total = torch.zeros(1, dtype=torch.int64, device=device)
    for router in routers:
        total += router.statistics.bad_tokens
    if dist.is_initialized():
        dist.all_reduce(total)
    if int(total) == 0:
        return
    own = [(router.layer_number, int(router.statistics.bad_tokens)) for router in routers]
    everyone: list = [own]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
    for router in routers:
        router.statistics.forget_bad()
    where = "; ".join(
        f"layer {layer} on rank {rank}: {count} tokens"
        for rank, found in enumerate(everyone)
        for layer, count in found
        if count
    )
    raise BadScoresError(f"router scores were NaN or infinite in iteration {iteration} ({where})")


def _default_device() -> torch.device:
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def average_prices(routers: Sequence[MaxScoreRouter]) -> None:
    """Fold this global batch's mean prices into the running averages.

    The mean is over microbatches and over the ranks that hold replicas (tensor, data and context
    parallel), so every replica stays equal. One all-reduce of ``len(routers) * (E + 1)`` float32.
    """
    if not routers:
        return
    packed: Tensor = torch.stack(
        [torch.cat([r.price_sum, r.price_sum.new_tensor([float(r.price_count)])]) for r in routers]
    )
    if dist.is_initialized():
        dist.all_reduce(packed, group=routers[0].tp_dp_cp_group)
    for router, row in zip(routers, packed, strict=True):
        mean_E = row[:-1] / row[-1].clamp(min=1.0)
        decay = router.options.price_decay
        # A buffer of zeros has no history: the first average is the first batch's.
        started = (router.expert_prices != 0).any()
        averaged_E = torch.where(
            started, decay * router.expert_prices + (1.0 - decay) * mean_E, mean_E
        )
        router.expert_prices.copy_(torch.where(row[-1] > 0, averaged_E, router.expert_prices))
        router.price_sum.zero_()
        router.price_count = 0
        router.begin_batch()
