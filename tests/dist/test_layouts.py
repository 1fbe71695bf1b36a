"""The same checkpoint trains alike in every layout."""

from __future__ import annotations

import pytest

from tests.dist.training_runs import MAXSCORE, succeed

STOCK = "--moe-router-load-balancing-type none"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2"
PP2_EP2 = "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"
# Ranks and flags, beside EP 2 on two ranks.
LAYOUTS = {
    "DP2": (2, ""),
    "TP2 x EP2, ETP1": (4, f"{TP2} --expert-tensor-parallel-size 1"),
    "TP2 x EP2, ETP2": (4, f"{TP2} --expert-tensor-parallel-size 2"),
    "PP2 x EP2": (4, PP2_EP2),
    "EP4": (4, "--expert-model-parallel-size 4"),
}
# Megatron pads the vocabulary to a multiple of this times TP, and padding has logits.
COMMON = (
    "--ckpt-format torch_dist --make-vocab-size-divisible-by 64 --hidden-dropout 0 "
    "--attention-dropout 0"
)
BASE = (2, "--expert-model-parallel-size 2")
# Those whose problems in scope group are those of EP 2 on two ranks.
SAME_GROUPS = ("PP2 x EP2",)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("layouts")
    flags = f"{STOCK} {BASE[1]} {COMMON} --train-iters 5 --save {directory}/ckpt --save-interval 5"
    succeed(directory, BASE[0], flags)
    return directory / "ckpt"


def first_losses(directory, checkpoint, router, layout):
    ranks, flags = layout
    result = succeed(
        directory, ranks,
        f"{router} {flags} {COMMON} --no-load-optim --no-load-rng --load {checkpoint} "
        "--train-iters 10 --override-opt_param-scheduler",
    )  # fmt: skip
    assert len(result.losses) == 5
    return [float.fromhex(text) for text in result.losses]


def difference(losses, base):
    return max(abs(one - other) / other for one, other in zip(losses, base, strict=True))


@pytest.mark.full
@pytest.mark.parametrize(("scope", "same"), [("sequence", tuple(LAYOUTS)), ("group", SAME_GROUPS)])
def test_first_losses_agree_between_layouts(tmp_path, checkpoint, scope, same):
    """Where the problems are the same ones; elsewhere the difference is printed (``-s``)."""
    routers = {"stock": STOCK, "ours": MAXSCORE.replace("scope local", f"scope {scope}")}
    base = {
        name: first_losses(tmp_path / name, checkpoint, router, BASE)
        for name, router in routers.items()
    }
    for layout in LAYOUTS:
        found = {
            name: difference(
                first_losses(tmp_path / name, checkpoint, router, LAYOUTS[layout]), base[name]
            )
            for name, router in routers.items()
        }
        print(f"{scope}, {layout}: largest relative difference {found}")
        if layout in same:
            assert found["ours"] <= max(3 * found["stock"], 1e-3)
