"""What the ranks do in the tests of CPU mode."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def devices_by_index(rank, size):
    """Return the current device, this rank's number, and where tensors are made that name it."""
    index = torch.cuda.current_device()
    device = torch.device("cuda", index)
    made = (
        torch.zeros(2, device=device),
        torch.empty(2, device=f"cuda:{index}"),
        torch.ones(2, device=index),
        torch.ones(2).to(device),
        torch.ones(2).to(index),
        torch.ones(2).cuda(index),
        torch.nn.Linear(2, 2, device=device).weight,
        torch.nn.Linear(2, 2).to(device).weight,
        torch.rand(2, generator=torch.Generator(device=device), device=device),
    )
    with torch.cuda.device(index):
        # A reentrant checkpoint's inner backward pass, where no mode of torch's is active.
        from torch.utils.checkpoint import checkpoint

        x = torch.ones(2, requires_grad=True)
        checkpoint(
            lambda v: v * torch.zeros(2, device=device), x, use_reentrant=True
        ).sum().backward()
    own = int(os.environ.get("LOCAL_RANK", "0"))
    return index, own, [tensor.device.type for tensor in made], x.grad


def positional_and_asynchronous(rank, size):
    """Give group and ``async_op`` by position, for equal and unequal sizes.

    Returns pairs of what was received and what should have been, what calls have returned, and
    whether two groups of all ranks are one.
    """
    found, returned = [], []
    group = dist.group.WORLD
    for unequal in (0, 1):
        parts = [torch.arange(2 + r * unequal) + 10.0 * r for r in range(size)]
        outputs = [torch.zeros_like(part) for part in parts]
        work = dist.all_gather(outputs, parts[rank], group, True)
        work.wait()
        found += [(output.clone(), part) for output, part in zip(outputs, parts, strict=True)]
        returned += [work.is_completed(), dist.all_gather(outputs, parts[rank], group, False)]
        output = torch.zeros_like(parts[rank])
        work = dist.reduce_scatter(output, parts, dist.ReduceOp.SUM, group, True)
        work.wait()
        found.append((output, size * parts[rank]))
    dist.barrier(group, False, None)
    work = dist.barrier(group, True, [0])
    work.wait()
    sent = torch.arange(float(size))
    received = torch.empty(size)
    dist.all_to_all_single(received, sent, None, None, group, True).wait()
    found.append((received, torch.full((size,), float(rank))))
    same = dist.new_group([*range(size)], None, "nccl") is dist.new_group(backend="nccl")
    return found, returned, same
