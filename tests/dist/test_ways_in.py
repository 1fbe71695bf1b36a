"""Launcher, patched fork and ``--spec``: the same training by each way, on every release."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from megatron_maxscore import patch
from tests.dist.training_runs import ROOT, TOPK, run, succeed
from tools.maintenance.releases import (
    NEWEST,
    RELEASES,
    copy_of_wheel,
    in_front,
    on_every_release,
    wheel,
)

EP2 = "--expert-model-parallel-size 2 --train-iters 4"
CPU = "megatron_maxscore.cpu"
OPTIONS = {"MEGATRON_MAXSCORE": json.dumps({"scope": "group"})}


# Older ones with --full.
@pytest.fixture(
    scope="module",
    params=[pytest.param(r, marks=() if r == NEWEST else pytest.mark.full) for r in RELEASES],
)
def release(request):
    return request.param


@pytest.fixture(scope="module")
def fork(release, tmp_path_factory):
    tree = copy_of_wheel(release, tmp_path_factory.mktemp("fork"))
    assert list(patch.run("apply", tree))
    return tree


def test_all_ways_in_train_alike(tmp_path, release, fork):
    stock = in_front(wheel(release))
    flags = f"--moe-router-type maxscore --maxscore-scope group {EP2}"
    statistics = tmp_path / "fork.jsonl"
    results = [
        succeed(
            tmp_path / "patch", 2, f"{flags} --maxscore-stats-file {statistics}", module=CPU,
            environment=in_front(fork),
        ),
        succeed(
            tmp_path / "spec",
            2,
            # A spec comes too late to set our default.
            f"--moe-aux-loss-coeff 0.1 --spec megatron_maxscore.moe.specs gpt_layer {EP2}",
            module=CPU,
            environment={**stock, **OPTIONS},
        ),
        succeed(tmp_path / "launch", 2, flags, environment=stock),
    ]  # fmt: skip
    launched = results[-1]
    assert len(launched.losses) == 4
    assert all(result.losses == launched.losses for result in results)
    for result in results:
        assert "auxiliary loss: aux_loss times 0.1" in result.output
    assert set(launched.validation) == {"(price routing)", "(flow routing)"}
    assert all(result.validation == launched.validation for result in results)
    for line in [*launched.statistics, *map(json.loads, statistics.read_text().splitlines())]:
        assert line["maxvio"] == [0.0, 0.0] and line["dropped"] == [0, 0]
        assert line["loads"] == [[128] * 8] * 2


# The same tests that the suite runs with the installed release; with older ones the telling
# ones in every run, all of them with --full.
FEW = {"0.17.1": "contract or round_trip_restores or equals_a_loop", "0.18.2": "contract"}


@pytest.mark.parametrize(
    ("older", "select"),
    [*FEW.items(), *(pytest.param(r, "", marks=pytest.mark.full) for r in RELEASES if r != NEWEST)],
)
def test_contracts_and_dispatcher(older, select):
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "-k", select,
        "tests/contract", "tests/dist/test_moe_layer.py", "tests/dist/test_router.py",
        "tests/dist/test_serving.py",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= in_front(wheel(older))
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:]


@on_every_release
def test_topk_is_stock_bit_for_bit(tmp_path, release):
    stock, tree = in_front(wheel(release)), copy_of_wheel(release, tmp_path / "fork")
    assert list(patch.run("apply", tree))
    flags = f"{TOPK} --expert-model-parallel-size 2 --train-iters 20 --hidden-dropout 0.1"
    plain = succeed(tmp_path / "plain", 2, flags, module=CPU, environment=stock)
    flags += " --moe-router-type topk"
    launched = succeed(tmp_path / "launched", 2, flags, environment=stock)
    patched = succeed(tmp_path / "patched", 2, flags, module=CPU, environment=in_front(tree))
    assert len(plain.losses) == 20
    assert launched.losses == patched.losses == plain.losses
    assert launched.validation == patched.validation == plain.validation
    assert sum(map(sum, launched.statistics[-1]["loads"])) == 2 * 8 * 64 * 2


def test_refusals_are_one_line(tmp_path):
    tree = copy_of_wheel(NEWEST, tmp_path / "fork")
    assert list(patch.run("apply", tree))
    for way, words in (
        ("patch", ["--moe-router-load-balancing-type sinkhorn"]), ("spec", ["speed", "scope"]),
    ):  # fmt: skip
        refused(tmp_path / way, way, tree, words)


def refused(tmp_path, way, tree, words):
    flags = f"{EP2} --moe-router-load-balancing-type sinkhorn"
    if way == "patch":
        flags, environment = f"{flags} --moe-router-type maxscore", in_front(tree)
    else:
        flags = f"{flags} --spec megatron_maxscore.moe.specs gpt_layer"
        environment = {"MEGATRON_MAXSCORE": '{"scope": "group", "speed": 9}'}
    result = run(tmp_path, 2, flags, module=CPU, environment=environment, timeout=90.0)
    assert result.status != 0 and len(result.errors) == 1 and not result.losses
    assert all(word in result.errors[0] for word in words)


@on_every_release
def test_example_without_megatron_training(release):
    command = (
        f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 "
        "examples/mcore_loop.py --steps 20"
    )
    result = subprocess.run(
        command.split(), cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **in_front(wheel(release))},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    losses = [float(x) for x in re.findall(r"step \d+: loss ([\d.]+)", result.stdout)]
    assert len(losses) == 3 and losses[-1] < losses[0] - 1.0
    gap = re.search(r"largest relative gap (\S+)", result.stdout)
    assert gap is not None and float(gap.group(1)) <= 1e-9
