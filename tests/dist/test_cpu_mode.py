"""What ordinary scripts and flags ask of CPU mode."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.dist import cpu_cases as cases
from tests.dist.training_runs import MAXSCORE, MODEL, ROOT, run, succeed

FLAGS = f"{MAXSCORE} --expert-model-parallel-size 2 --train-iters 2"


def test_data_loader_workers_with_pinned_memory(tmp_path):
    # Megatron's default is two workers; its loaders pin memory.
    model = MODEL.replace("--num-workers 0", "")
    with_workers = succeed(tmp_path / "workers", 2, FLAGS, model=model)
    # Beside what asks for CUDA's profiler and allocator.
    watched = "--profile --profile-step-start 1 --profile-step-end 2 --record-memory-history"
    without = succeed(
        tmp_path / "none", 2, f"{FLAGS} {watched} --memory-snapshot-path {tmp_path}/snapshot"
    )
    assert with_workers.losses == without.losses and len(without.losses) == 2


def test_asynchronous_checkpoints(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    saving = f"--save {checkpoint} --save-interval 1 --ckpt-format torch_dist --async-save "
    saving += "--use-persistent-ckpt-worker --async-strategy mcore --exit-signal-handler"
    result = succeed(tmp_path / "save", 2, f"{FLAGS} {saving}")
    assert len(result.losses) == 2
    assert (checkpoint / "latest_checkpointed_iteration.txt").read_text() == "2"
    again = succeed(
        tmp_path / "load", 2,
        f"{FLAGS.replace('iters 2', 'iters 3')} --load {checkpoint} --ckpt-format torch_dist "
        "--override-opt_param-scheduler",
    )  # fmt: skip
    assert len(again.losses) == 1


def test_a_strategy_that_is_not_installed_ends_every_rank(tmp_path):
    saving = f"--save {tmp_path}/checkpoint --save-interval 1 --ckpt-format torch_dist --async-save"
    result = run(
        tmp_path, 2, f"{FLAGS} {saving} --use-persistent-ckpt-worker --async-strategy nvrx",
        timeout=120,
    )  # fmt: skip
    assert result.status != 0 and len(result.errors) == 1
    assert "--async-strategy mcore" in result.errors[0] and not result.losses


def test_devices_by_index(ranks):
    """The current device is an index, as with CUDA, and every way to name it gives the CPU."""
    for index, own, devices, gradient in ranks(2, cases.devices_by_index):
        assert type(index) is int and index == own
        assert devices == ["cpu"] * 9 and torch.equal(gradient, torch.zeros(2))


def test_uneven_collectives_take_all_arguments(ranks):
    for found, returned, is_same in ranks(2, cases.positional_and_asynchronous):
        assert len(found) == 7
        for received, expected in found:
            assert torch.equal(received, expected)
        assert returned == [True, None] * 2
        assert is_same, "two groups of all ranks should be one in CPU mode"


@pytest.mark.parametrize(
    "name",
    "init_process_group new_group destroy_process_group barrier all_to_all_single all_gather "
    "reduce_scatter".split(),
)
def test_replaced_collectives_have_the_signature_of_the_originals(name):
    # In a process of its own: CPU mode replaces the functions.
    script = (
        "import inspect, sys, torch.distributed as dist; from megatron_maxscore import cpu;"
        f"before = inspect.signature(dist.{name}); cpu.enable(); after = dist.{name};"
        "given = {p: None for p in before.parameters}; code = after.__code__;"
        "takes_all = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS);"
        "own = inspect.signature(after, follow_wrapped=False).parameters;"
        "names = [p for p, v in own.items() if v.kind is v.POSITIONAL_OR_KEYWORD];"
        "assert takes_all == 12 or names == list(before.parameters), (names, list(given));"
        "assert names == list(before.parameters)[: len(names)]; print('same')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.stdout.strip().endswith("same"), done.stderr[-2000:]
