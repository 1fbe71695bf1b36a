"""What happens once per global batch: bad scores become an error, prices are averaged.

Two all-reduces per global batch: two int64 over the world, and for every router E + 1 float32 over
the ranks that hold replicas of the routers.

Megatron's training loop can run a step's forward and backward passes several times. Each of these
attempts ends with :func:`end_attempt`. :func:`end_batch` is called once, after the optimizer step.
Your own training loop calls :func:`average_prices`, which does both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

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


class LengthError(CollectiveError):
    """Microbatches have other shapes than was declared; raised on every rank together."""


def maxscore_routers(model: Iterable[torch.nn.Module]) -> list[MaxScoreRouter]:
    """Return the routers of a list of model chunks, in module order."""
    return [m for chunk in model for m in chunk.modules() if isinstance(m, MaxScoreRouter)]


def raise_on_bad_scores(
    routers: Sequence[MaxScoreRouter], iteration: int, has_ended: bool = False
) -> None:
    """Raise one error on all ranks if any router met NaN or infinite scores since the last call.

    It also raises an error if a microbatch had more tokens than the declared fixed shape. Passes
    count when their backward pass has run. Every rank must call this function, also a rank without
    routers. It communicates one all-reduce of two int64 over the world, and an object all-gather
    if there is something to report.

    Args:
        routers: this rank's routers.
        iteration: for the message.
        has_ended: whether the attempt at the batch has ended already (:func:`end_attempt`).

    Raises:
        BadScoresError: scores were NaN or infinite; names iteration, layer, rank and count.
        LengthError: a microbatch had more tokens than was declared; names the same.
    """
    device = device_of(routers)
    totals = torch.zeros(2, dtype=torch.int64, device=device)
    counts = [router.last_statistics if has_ended else router.statistics for router in routers]
    for own in counts:
        totals[0] += own.bad_tokens
        totals[1] += own.lost_tokens
    if dist.is_initialized():
        dist.all_reduce(totals)
    bad, lost = totals.tolist()
    if bad == lost == 0:
        return
    found_here = [
        (router.layer_number, int(own.bad_tokens), int(own.lost_tokens))
        for router, own in zip(routers, counts, strict=True)
    ]
    everyone: list = [found_here]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found_here)
    for own in counts:
        own.forget_bad()
    column = 1 if bad else 2
    where = "; ".join(
        f"layer {found[0]} on rank {rank}: {found[column]} tokens"
        for rank, all_found in enumerate(everyone)
        for found in all_found
        if found[column]
    )
    if not bad:
        raise LengthError(
            f"a microbatch of iteration {iteration} has another shape than every microbatch was "
            f"said to have ({where}); the optimizer step was not taken. Add "
            "--maxscore-fixed-shape 0 0, or leave fixed_shape out: ranks then tell each other how "
            "many tokens they have"
        )
    raise BadScoresError(f"router scores were NaN or infinite in iteration {iteration} ({where})")


def evaluated_bad_tokens(routers: Sequence[MaxScoreRouter]) -> int:
    """Return how many tokens in evaluation had NaN or infinite router scores, and begin anew.

    Of all ranks and layers since the last call. Every rank must call it; one all-reduce of an int64
    over the world.

    Args:
        routers: this rank's routers.
    """
    device = device_of(routers)
    total = torch.zeros((), dtype=torch.int64, device=device)
    for router in routers:
        total += router.evaluated_bad_tokens
        router.evaluated_bad_tokens = 0
    if dist.is_initialized():
        dist.all_reduce(total)
    return int(total)


def device_of(routers: Sequence[MaxScoreRouter]) -> torch.device:
    """Return the device of the routers' counts; without routers, the one that collectives need."""
    if routers:
        return routers[0].prices.device
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def begin_batch(routers: Sequence[MaxScoreRouter]) -> None:
    """Begin a global batch, for training loops with CUDA graphs: forget what their warm-up counted.

    Args:
        routers: this rank's routers.
    """
    for router in routers:
        router.begin_batch()


def average_prices(routers: Sequence[MaxScoreRouter]) -> None:
    """Fold this global batch's mean prices into the running averages, for own training loops.

    Call it once per global batch on all ranks, before or after the optimizer step. It is
    :func:`end_attempt` and :func:`end_batch`.
    """
    end_attempt(routers)
    end_batch(routers)


def end_attempt(routers: Sequence[MaxScoreRouter]) -> None:
    """End an attempt at a global batch: its mean prices wait for the optimizer step.

    The mean is over counted passes and over the ranks that hold replicas (tensor, data and context
    parallel), so every replica stays equal. One all-reduce of E + 1 float32 for each router. What
    an earlier attempt at the same batch has left is replaced.

    Args:
        routers: this rank's routers, which may have different numbers of experts.
    """
    if not routers:
        return
    parts = [
        part for r in routers for part in (r.price_sum, r.price_count.to(r.price_sum).reshape(1))
    ]
    packed = torch.cat(parts)
    if dist.is_initialized():
        dist.all_reduce(packed, group=routers[0].tp_dp_cp_group)
    rows = packed.split([r.price_sum.numel() + 1 for r in routers])
    for router, row in zip(routers, rows, strict=True):
        mean_E = row[:-1] / row[-1].clamp(min=1.0)
        decay = router.options.price_decay
        # A buffer of zeros has no history: the first average is the first batch's.
        prices_E = router.prices
        started = (prices_E != 0).any()
        averaged_E = torch.where(started, decay * prices_E + (1.0 - decay) * mean_E, mean_E)
        router.end_attempt(torch.where(row[-1] > 0, averaged_E, prices_E))


def end_batch(routers: Sequence[MaxScoreRouter], has_stepped: bool = True) -> None:
    """End a global batch: prices that wait become the routers' prices.

    Args:
        routers: this rank's routers.
        has_stepped: whether the optimizer has taken its step; otherwise prices stay.
    """
    for router in routers:
        router.end_batch(has_stepped)
