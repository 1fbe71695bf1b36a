"""What ``--use-checkpoint-args`` takes from the arguments of a checkpoint's run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_maxscore.moe.fields import config_fields
from megatron_maxscore.training.arguments import (
    AUX_LOSS_COEFFICIENT,
    restore_options,
    set_defaults,
)

STOCK = {
    "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.0,
    "moe_token_dispatcher_type": "allgather",
}  # fmt: skip


def parsed(**given):
    """Return arguments as Megatron's parser leaves them: lists where several may be given."""
    defaults = {name: field.default for name, field in config_fields().items()}
    return SimpleNamespace(**{**STOCK, **defaults, **given})


@pytest.mark.parametrize(
    ("saved", "given", "restored"),
    [
        # A run that switched the loss off goes on without it.
        ({"moe_aux_loss_coeff": 0.0}, {}, (["none"], [0.0])),
        ({"moe_aux_loss_coeff": 1e-3}, {}, (["aux_loss"], [1e-3])),
        (
            {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0},
            {},
            (["none"], [0.0]),
        ),
        (
            {
                "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
                "moe_aux_loss_coeff": [1e-2, 1e-4],
            },
            {},
            (["aux_loss", "seq_aux_loss"], [1e-2, 1e-4]),
        ),
        # What the command gives counts, and then nothing is restored of the pair.
        ({"moe_aux_loss_coeff": 1e-3}, {"moe_aux_loss_coeff": [0.0]}, (["none"], [0.0])),
        (
            {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0},
            {"moe_aux_loss_coeff": [1e-2]},
            ("aux_loss", [1e-2]),
        ),
        (
            {
                "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
                "moe_aux_loss_coeff": [1e-2, 1e-4],
            },
            {"moe_aux_loss_coeff": [1e-3]},
            ("aux_loss", [1e-3]),
        ),
        (
            {"moe_aux_loss_coeff": 0.0},
            {"moe_router_load_balancing_type": ["aux_loss"]},
            (["aux_loss"], AUX_LOSS_COEFFICIENT),
        ),
        (
            {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 1e-4},
            {"moe_router_load_balancing_type": ["aux_loss"]},
            (["aux_loss"], AUX_LOSS_COEFFICIENT),
        ),
        (
            {"moe_aux_loss_coeff": 1e-3},
            {"moe_router_load_balancing_type": ["seq_aux_loss"], "moe_aux_loss_coeff": [1e-4]},
            (["seq_aux_loss"], [1e-4]),
        ),
    ],
)
def test_the_auxiliary_loss_goes_on_as_it_was(saved, given, restored):
    args = parsed(**given)
    restore_options(args, parsed(moe_router_type="maxscore", **saved))
    set_defaults(args)
    assert args.moe_router_type == "maxscore"
    assert (args.moe_router_load_balancing_type, args.moe_aux_loss_coeff) == restored


def test_no_auxiliary_loss_stays_none_when_arguments_are_validated_again():
    """As Megatron's checkpoint converters do, with the scalars of the first validation."""
    args = parsed(moe_router_type="maxscore", moe_aux_loss_coeff=[0.0])
    set_defaults(args)
    args.moe_router_load_balancing_type, args.moe_aux_loss_coeff = "none", 0.0
    set_defaults(args)
    assert args.moe_aux_loss_coeff == 0.0


def test_a_stock_checkpoint_gives_no_auxiliary_loss():
    args = parsed(moe_router_type="maxscore")
    restore_options(args, parsed(moe_aux_loss_coeff=1e-3))
    set_defaults(args)
    assert args.moe_aux_loss_coeff == AUX_LOSS_COEFFICIENT
    args = parsed()
    restore_options(args, parsed(moe_aux_loss_coeff=1e-3))
    set_defaults(args)
    assert args.moe_aux_loss_coeff == 0.0, "as stock Megatron does"
