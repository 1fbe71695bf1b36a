"""Ranks for distributed tests: spawned on this machine, or those that torchrun has started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.dist import cluster
from tests.dist.pool import Pool


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--backend`` of the process group of a torchrun job."""
    parser.addoption(
        "--backend",
        choices=("gloo", "nccl"),
        default="gloo",
        help="under torchrun: gloo on CPUs, or nccl with one GPU per rank",
    )


# After the terminal's plugin.
@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Rank 0 alone reports; CPU mode has to be on before any test module imports Megatron."""
    if cluster.is_launched() and os.environ["RANK"] != "0":
        config.get_terminal_writer()._file = open(os.devnull, "w")
    if cluster.is_launched() and config.getoption("--backend") == "gloo":
        from megatron_maxscore import cpu

        cpu.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Torchrun jobs run only tests of the job's ranks."""
    if cluster.is_launched():
        shared = [item for item in items if "ranks" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in shared])
        items[:] = shared


@pytest.fixture(scope="session")
def ranks(pytestconfig: pytest.Config) -> Iterator[Callable[..., list[Any]]]:
    """Return ``run(size, case, **arguments)``; the ranks live until the session ends."""
    if cluster.is_launched():
        job = cluster.Cluster(pytestconfig.getoption("--backend"))
        yield job.run
        job.close()
        return
    pools: dict[int, Pool] = {}

    def run(size: int, case: Callable[..., Any], **arguments: Any) -> list[Any]:
        if size not in pools or not pools[size].is_alive:
            pools[size] = Pool(size)
        return pools[size].run(case, **arguments)

    yield run
    for pool in pools.values():
        pool.close()
