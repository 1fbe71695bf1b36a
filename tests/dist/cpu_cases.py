"""What the ranks do in the tests of CPU mode."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def devices_by_index(rank, size):
    """The current device is an index, as with CUDA, and every way to name it gives the CPU."""
    index = torch.cuda.current_device()
    assert isinstance(index, int) and index == int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", index)
    for made in (
        torch.zeros(2, device=device),
        torch.empty(2, device=f"cuda:{index}"),
        torch.ones(2, device=index),
        torch.ones(2).to(device),
        torch.ones(2).to(index),
        torch.ones(2).cuda(index),
        torch.nn.Linear(2, 2, device=device).weight,
        torch.nn.Linear(2, 2).to(device).weight,
        torch.rand(2, generator=torch.Generator(device=device), device=device),
    ):
        assert made.device.type == "cpu"
    with torch.cuda.device(index):
        # A reentrant checkpoint's inner backward pass, where no mode of torch's is active.
        from torch.utils.checkpoint import checkpoint

        x = torch.ones(2, requires_grad=True)
        checkpoint(
            lambda v: v * torch.zeros(2, device=device), x, use_reentrant=True
        ).sum().backward()
    return True


def positional_and_asynchronous(rank, size):
    """Group and ``async_op`` by position, equal and unequal sizes."""
    group = dist.group.WORLD
    for unequal in (0, 1):
        parts = [torch.arange(2 + r * unequal) + 10.0 * r for r in range(size)]
        outputs = [torch.zeros_like(part) for part in parts]
        work = dist.all_gather(outputs, parts[rank], group, True)
        work.wait()
        assert work.is_completed() and all(map(torch.equal, outputs, parts))
        assert dist.all_gather(outputs, parts[rank], group, False) is None
        output = torch.zeros_like(parts[rank])
        work = dist.reduce_scatter(output, parts, dist.ReduceOp.SUM, group, True)
        work.wait()
        assert torch.equal(output, size * parts[rank])
    dist.barrier(group, False, None)
    work = dist.barrier(group, True, [0])
    work.wait()
    sent = torch.arange(float(size))
    received = torch.empty(size)
    dist.all_to_all_single(received, sent, None, None, group, True).wait()
    assert torch.equal(received, torch.full((size,), float(rank)))
    assert dist.new_group([*range(size)], None, "nccl") is dist.new_group(backend="nccl")
    return True
