"""What the ranks do in the tests of microbatches of different lengths."""

from __future__ import annotations

import torch

from tests.dist.cases import HIDDEN, TOPK, make_layer, own_input


def layer_of_lengths(rank, size, lengths, scope="local", shape=None, batch=1, factor=1.0, **layout):
    """Run a layer on this rank's length; return what a loop over its tokens needs.

    The layer must give the same as on one rank, so gates and experts are applied by hand to every
    token: experts are the same on all ranks, a multiple of what goes in.
    """
    from megatron_maxscore.moe import MaxScoreConfig
    from megatron_maxscore.moe.step import CollectiveError, raise_on_bad_scores

    options = MaxScoreConfig(scope=scope, capacity_factor=factor)
    layer = make_layer(options=options, shape=shape, **layout)
    layer.train()
    hidden = own_input(rank, lengths[rank], batch)
    dispatcher = layer.token_dispatcher
    probs, routing_map = layer.route(hidden)
    tokens, gates = dispatcher.dispatch_preprocess(hidden, routing_map, probs)
    tokens, gates = dispatcher.token_dispatch(tokens, gates)
    tokens, per_expert, gates = dispatcher.dispatch_postprocess(tokens, gates)
    # Expert e multiplies by e + 1; expert-tensor-parallel ranks' results are summed.
    first = dispatcher.local_expert_indices[0]
    scale = torch.repeat_interleave(
        torch.arange(first, first + len(per_expert)) + 1.0, per_expert.cpu()
    )
    tokens = tokens * (gates * scale / dispatcher.tp_size).unsqueeze(-1)
    output = dispatcher.combine_preprocess(tokens)
    output = dispatcher.combine_postprocess(dispatcher.token_combine(output))
    factor_T = (probs * (torch.arange(probs.shape[1]) + 1.0)).sum(1)
    expected = hidden * factor_T.reshape(*hidden.shape[:2], 1)
    # Every rank takes part in the backward pass.
    output.nan_to_num().sum().backward()
    try:
        raise_on_bad_scores([layer.router], 3)
        message = None
    except CollectiveError as error:
        message = str(error)
    lost = output.isnan().all(-1)
    return {
        "right": bool(torch.allclose(output[~lost], expected[~lost], rtol=1e-5, atol=1e-6)),
        "lost": int(lost.sum()),
        "gradient": bool(hidden.grad.abs().sum() > 0) and hidden.grad.shape == hidden.shape,
        "received": per_expert.tolist(),
        "own": routing_map.sum(0).tolist(),
        "per_token": routing_map.sum(1).unique().tolist() == ([TOPK] if lengths[rank] else []),
        "message": message,
        "hidden": HIDDEN,
    }
