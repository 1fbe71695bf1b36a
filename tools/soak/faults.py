"""Part faults: a rank dies, stalls or comes with other arguments, at each exchange of a solve.

Three ranks solve one problem over gloo with a short timeout. The surviving ranks must end with one
error of ours, which names what was being exchanged, soon after the timeout.
"""

from __future__ import annotations

import datetime
import os
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from megatron_maxscore.errors import LostRankError
from megatron_maxscore.flow import exchange, solve

RANKS, FAULTY, TIMEOUT = 3, 1, 4.0
# How long after the timeout an error counts as told.
SLACK = 6.0
HOW = ("dies", "stalls", "has other arguments")
# Scopes that exchange, as problems: sequence has several at once.
SCOPES = ("group", "sequence")


def scores_of(scope: str, rank: int) -> torch.Tensor:
    """Return scores that take every kind of exchange: many rows, of scales that differ."""
    generator = torch.Generator().manual_seed(rank)
    shape = (1500, 32) if scope == "group" else (2, 750, 32)
    logits = 4 * torch.randn(shape, generator=generator)
    logits += 2 * torch.randn(32, generator=torch.Generator().manual_seed(9))
    return logits.softmax(-1)


def _work(
    rank: int, store: str, scope: str, how: str, faulty_round: int, answer: Connection
) -> None:
    """Solve on one rank; the faulty one misbehaves when it comes to a round."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )  # fmt: skip
    scores, topk = scores_of(scope, rank), 4
    solve(torch.randn(8, 4), 2, group=dist.group.WORLD)  # everybody is there
    phases: list[str] = []
    make_round = exchange.GroupExchange._round

    def faulty(self: Any, phase: str, size: int) -> Any:
        phases.append(phase)
        if rank == FAULTY and len(phases) == faulty_round:
            if how == "dies":
                os._exit(17)
            if how == "stalls":
                time.sleep(TIMEOUT + SLACK + 2)
        return make_round(self, phase, size)

    exchange.GroupExchange._round = faulty  # type: ignore[method-assign]
    if how == "has other arguments" and rank == FAULTY:
        topk = 5
    started = time.monotonic()
    error = ""
    try:
        solve(scores, topk, group=dist.group.WORLD)
    except (LostRankError, ValueError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    answer.send((error, time.monotonic() - started, phases))
    answer.close()
    os._exit(0)


def run_case(scope: str, how: str, faulty_round: int) -> dict[str, Any]:
    """Run three ranks with one fault; return its line of results.

    Args:
        scope: group or sequence.
        how: what the faulty rank does, one of :data:`HOW`, or nothing.
        faulty_round: the collective at which it does it, from 1.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        store = str(Path(scratch) / "store")
        ends = [context.Pipe(duplex=False) for _ in range(RANKS)]
        processes = [
            context.Process(target=_work, args=(rank, store, scope, how, faulty_round, end[1]))
            for rank, end in enumerate(ends)
        ]
        for process in processes:
            process.start()
        for _, sending in ends:
            sending.close()
        answers: list[Any] = []
        for receiving, _ in ends:
            try:
                answers.append(receiving.recv() if receiving.poll(120) else None)
            except EOFError:
                answers.append(None)
        for process in processes:
            process.kill()
            process.join()
    failures = []
    others = [rank for rank in range(RANKS) if rank != FAULTY or how == "has other arguments"]
    phases: list[str] = answers[0][2] if answers[0] else []
    for rank in others if how != "nothing" else ():
        if answers[rank] is None:
            failures.append(f"rank {rank} ended without an answer, or gave none in 120 s")
            continue
        error, seconds, _ = answers[rank]
        wanted = "topk differs between the ranks" if how == HOW[2] else "lost contact"
        if wanted not in error:
            failures.append(f"rank {rank} has {error or 'no error'}")
        if seconds > TIMEOUT + SLACK:
            failures.append(f"rank {rank} was told after {seconds:.1f} s")
    seconds = max((answers[rank][1] for rank in others if answers[rank]), default=0.0)
    return {
        "part": "faults", "scope": scope, "how": how, "round": faulty_round,
        "phase": phases[-1] if phases else "", "phases": phases, "told_after": round(seconds, 1),
        "failures": failures,
    }  # fmt: skip


def cases() -> list[tuple[str, str, int]]:
    """Return every case: each fault at each round that a solve without one has."""
    found = []
    for scope in SCOPES:
        phases = run_case(scope, "nothing", 0)["phases"]
        # Sweeps repeat one phase: its first and its last.
        places = {phase: place for place, phase in reversed([*enumerate(phases, 1)])}
        last = {phase: place for place, phase in enumerate(phases, 1)}
        for place in sorted({*places.values(), *last.values()}):
            found += [(scope, how, place) for how in HOW[:2]]
        found.append((scope, HOW[2], 1))
    return found
