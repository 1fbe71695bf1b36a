"""Ranks for distributed tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.dist.pool import Pool


# Before xdist reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share the pools run in one xdist worker."""
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("ranks"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., list[Any]]]:
    """Return ``run(size, case, **arguments)``; pools live until the session ends."""
    pools: dict[int, Pool] = {}

    def run(size: int, case: Callable[..., Any], **arguments: Any) -> list[Any]:
        if size not in pools or not pools[size].is_alive:
            pools[size] = Pool(size)
        return pools[size].run(case, **arguments)

    yield run
    for pool in pools.values():
        pool.close()
