"""What ``check`` says of rooms, splits and solver, against what the dispatcher and solver do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_maxscore.commands import check_report
from megatron_maxscore.moe import MaxScoreConfig
from megatron_maxscore.moe.checks import why_on_host


def arguments(**changes):
    """Return what Megatron would parse: 512 tokens of a rank, 16 experts, k = 2, on four ranks."""
    values = {
        "num_experts": 16, "moe_router_topk": 2, "seq_length": 128, "expert_model_parallel_size": 4,
        "expert_tensor_parallel_size": None, "tensor_model_parallel_size": 1,
        "context_parallel_size": 1, "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall", "moe_router_padding_for_quantization": False,
        "use_transformer_engine_op_fuser": False, "fp8": None, "fp4": None, "fp8_recipe": None,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        ({}, {}, "64 of a rank's tokens"),
        ({}, {"num_experts": 48}, "21 of a rank's tokens, 16 experts one more"),
        ({"capacity_factor": 1.25}, {}, "at most 80 of a rank's tokens (factor 1.25)"),
        ({"scope": "group"}, {}, "at most 256 of its group's tokens"),
        ({"scope": "group"}, {"expert_tensor_parallel_size": 2}, "at most 512 of its group's"),
        ({"scope": "sequence"}, {}, "at most 16 of a sequence's tokens"),
    ],
)
def test_room_of_an_expert(options, changes, words):
    found = check_report._room(arguments(**changes), MaxScoreConfig(**options), 512)
    assert found.startswith(words), found


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        ({}, {}, "known in advance"),
        ({}, {"moe_token_dispatcher_type": "allgather"}, "Megatron's allgather finds them"),
        ({"capacity_factor": 1.25}, {}, "gathered and copied to the host, as with top-k"),
        ({"scope": "group"}, {}, "known from the solve"),
        ({"scope": "sequence"}, {}, "known in advance: a sequence's"),
        ({"scope": "sequence"}, {"seq_length": 100}, "gathered and copied"),
        ({"scope": "sequence"}, {"tensor_model_parallel_size": 2}, "known from the solve where"),
        # For fp8, rows are padded to multiples of 16: quotas of 64 are such, quotas of 50 are not.
        ({}, {"moe_router_padding_for_quantization": True, "fp8": "hybrid"}, "known in advance"),
        (
            {"fixed_shape": [100, 4]},
            {"moe_router_padding_for_quantization": True, "fp8": "hybrid"},
            "gathered and copied to the host: Megatron pads rows",
        ),
    ],
)
def test_splits(options, changes, words):
    config = MaxScoreConfig(**{"fixed_shape": [128, 4], **options})
    length, batch = config.fixed_shape
    share, rest = divmod(length * batch * 2, 16)
    found = check_report._splits(arguments(**changes), config, share, rest)
    assert found.startswith(words), found


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        ({}, {}, None),
        ({"mode": "exact"}, {}, "--maxscore-mode exact"),
        ({}, {"moe_router_dtype": "fp64"}, "--moe-router-dtype fp64"),
        ({}, {"num_experts": 2048}, "more than 1024 experts"),
        ({"scope": "sequence"}, {"context_parallel_size": 2}, "sequences are split over ranks"),
        ({"scope": "sequence"}, {}, None),
        ({}, {"tensor_model_parallel_size": 2}, None),
    ],
)
def test_why_a_launch_is_solved_on_the_host(options, changes, words):
    assert why_on_host(arguments(**changes), MaxScoreConfig(**options)) == words
