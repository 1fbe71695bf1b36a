"""One of two ranks: a MoE layer in scope group whose kernels run in the interpreter.

Prints OK on rank 0 if the layer gives what the same layer gives with the solver on the CPU, if no
operator made the host wait, and if nothing but the all-to-all's sizes was copied for it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from unittest import mock

import torch
import torch.distributed as dist

import megatron_maxscore.cpu

megatron_maxscore.cpu.enable()

from megatron.core.transformer.moe import token_dispatcher  # noqa: E402

from megatron_maxscore.flow import device  # noqa: E402
from megatron_maxscore.moe import counting, scopes  # noqa: E402
from megatron_maxscore.moe import dispatcher as dispatcher_module  # noqa: E402
from megatron_maxscore.moe import router as router_module  # noqa: E402
from megatron_maxscore.ops.kernels import soft_topk  # noqa: E402
from tests.dist.cases import make_layer, own_input  # noqa: E402
from tests.kernels.test_flow import Waits  # noqa: E402


@contextlib.contextmanager
def as_on_a_device():
    """Let tensors on the CPU, where the interpreter works, count as a device's."""
    on_device = lambda tensor: True  # noqa: E731
    kernels = sys.modules["megatron_maxscore.ops.soft_topk"]
    with (
        mock.patch.object(device, "is_device", on_device),
        mock.patch.object(router_module, "is_device", on_device),
        mock.patch.object(scopes, "is_device", on_device),
        mock.patch.object(counting, "is_device", on_device),
        mock.patch.object(dispatcher_module, "is_device", on_device),
        mock.patch.object(kernels, "_kernels", lambda matrix: soft_topk),
    ):
        yield


def main() -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    from megatron_maxscore.moe import MaxScoreConfig

    options = MaxScoreConfig(scope="group", mode="bounded")
    # Tokens that differ between the ranks, so that loads do.
    hidden = own_input(rank, 64) * (1 + rank)
    layers = [make_layer(ep=size, options=options, shape=(64, 1)) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    expected, _ = layers[0](hidden)
    copied: list[str] = []

    def copy(tensor, as_numpy=False, record_stream=False):
        copied.append("" if tensor is None else str(tuple(getattr(tensor, "shape", ()))))
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    with as_on_a_device():
        layers[1](hidden)  # arguments are compared
        copied.clear()
        solved = mock.patch.object(device, "solve_bounded", wraps=device.solve_bounded)
        with mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", copy):
            with Waits(), solved as on_the_device:
                probs, routing_map = layers[1].router(hidden)
                tokens_L = layers[1].token_dispatcher.preprocess(routing_map)
            assert on_the_device.call_count == 1
            assert torch.is_tensor(layers[1].token_dispatcher.input_splits)
            found, _ = layers[1](hidden)
    assert probs.shape == routing_map.shape and tokens_L.sum() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert copied, "Megatron's own copy on its side stream was not used"
    loads = routing_map.sum(0)
    dist.all_reduce(loads)
    assert loads.max() - loads.min() <= 1, loads
    # A rank with another number of tokens still takes part; its own are not dispatched.
    with as_on_a_device():
        shorter, _ = layers[1](hidden[: 64 - 20 * rank])
        shorter.sum().backward()
    assert bool(shorter.isnan().all()) == (rank > 0)
    if rank == 0:
        print("OK")
    dist.destroy_process_group()


if __name__ == "__main__":
    assert os.environ["TRITON_INTERPRET"] == "1"
    main()
