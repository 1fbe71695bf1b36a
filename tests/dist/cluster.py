"""The ranks that torchrun has started, as the pool of the distributed tests.

Every rank runs pytest. A case runs on all of them, and every rank then checks the results of all,
so outcomes agree. Cases for another number of ranks are skipped. Only rank 0 prints.
"""

from __future__ import annotations

import datetime
import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.dist.pool import RankError

# How long ranks wait for each other in a case, and for the results of a case.
CASE_SECONDS = 90.0
RESULT_SECONDS = 2 * CASE_SECONDS


def is_launched() -> bool:
    """Return whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


class Cluster:
    """All ranks of this torchrun job.

    Args:
        backend: "gloo" runs on CPUs, "nccl" on one GPU per rank.
    """

    def __init__(self, backend: str) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.backend = backend
        if backend == "gloo":
            torch.set_num_threads(1)
        else:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # A store outlives failing groups. Where torchrun's agent does not serve it, rank 0 does.
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=self.rank == 0 and not served,
            timeout=datetime.timedelta(seconds=RESULT_SECONDS),
        )
        self.cases = 0
        self._start_group()

    def _start_group(self) -> None:
        dist.init_process_group(
            self.backend,
            store=dist.PrefixStore(f"maxscore/group{self.cases}", self.store),
            rank=self.rank,
            world_size=self.size,
            timeout=datetime.timedelta(seconds=CASE_SECONDS),
        )

    def run(self, size: int, case: Callable[..., Any], **arguments: Any) -> list[Any]:
        """Run a case on every rank and return the results in rank order.

        Raises:
            RankError: a rank raised; names it, with its traceback.
        """
        if size != self.size:
            pytest.skip(f"for {size} ranks, this job has {self.size}")
        self.cases += 1
        torch.manual_seed(1234)
        try:
            answer = "done", on_host(case(self.rank, size, **arguments))
        except Exception:
            answer = "failed", traceback.format_exc()
        key = f"maxscore/case{self.cases}/rank"
        self.store.set(f"{key}{self.rank}", pickle.dumps(answer))
        answers = [pickle.loads(self.store.get(f"{key}{rank}")) for rank in range(size)]
        report = [
            f"rank {rank} failed:\n{text}"
            for rank, (kind, text) in enumerate(answers)
            if kind == "failed"
        ]
        if report:
            # A collective that only some ranks have joined spoils the group.
            dist.destroy_process_group()
            self._start_group()
            raise RankError("\n".join(report))
        return [result for _, result in answers]

    def close(self) -> None:
        """End the process group, all ranks together."""
        dist.barrier()
        dist.destroy_process_group()


def on_host(result: Any) -> Any:
    """Return a result with its tensors on the CPU."""
    if isinstance(result, torch.Tensor):
        return result.detach().cpu()
    if isinstance(result, dict):
        return {name: on_host(value) for name, value in result.items()}
    if isinstance(result, (list, tuple)):
        return type(result)(on_host(value) for value in result)
    return result
