"""What the ranks do in the distributed tests. Every case runs on all ranks of a pool."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter

import numpy as np
import torch
import torch.distributed as dist

HIDDEN, EXPERTS, TOPK = 16, 8, 2


def device():
    """Return where tensors of this group live."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def groups(tp=1, ep=1, etp=1, cp=1):
    """Set up Megatron's process groups and return the collection."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    model_parallel_cuda_manual_seed(7, force_reset_rng=True)
    return ProcessGroupCollection.use_mpu_process_groups()


def make_layer(
    tp=1, ep=1, etp=1, cp=1, router="maxscore", options=None, experts=EXPERTS, shape=None,
    **settings,
):  # fmt: skip
    """Build a Megatron MoE layer, stock or ours; ``shape`` is what every rank is said to route."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import build_module

    from megatron_maxscore.moe import MaxScoreConfig, with_maxscore

    collection = groups(tp, ep, etp, cp)
    defaults = dict(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        ffn_hidden_size=24,
        moe_ffn_hidden_size=24,
        num_moe_experts=experts,
        moe_router_topk=TOPK,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        add_bias_linear=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
    )
    config = TransformerConfig(**{**defaults, **settings})
    spec = get_moe_module_spec(use_te=False, num_experts=experts, moe_grouped_gemm=False)
    if router == "maxscore":
        options = options or MaxScoreConfig()
        if shape is not None:
            options = dataclasses.replace(options, fixed_shape=list(shape))
        spec = with_maxscore(spec, options)
    if callable(spec) and not hasattr(spec, "module"):
        layer = spec(config=config, layer_number=1, pg_collection=collection)
    else:
        layer = build_module(spec, config=config, layer_number=1, pg_collection=collection)
    layer.set_layer_number(1)
    return layer.to(device())


def own_input(rank, num_tokens, batch=1, dtype=torch.float32):
    """Return hidden states that differ by rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    hidden = torch.randn(num_tokens, batch, HIDDEN, generator=generator, dtype=dtype)
    return hidden.to(device()).requires_grad_()


def round_trip(rank, size, num_tokens=24, training=True, ragged=False, **settings):
    """Dispatch, pass each copy through times its gate, combine: must restore input x gate sum."""
    from megatron_maxscore.moe.plan import plan_of

    layer = make_layer(**settings)
    layer.train(training)
    if ragged:
        num_tokens = 1 if rank == 1 else num_tokens + 5 * rank
    hidden = own_input(rank, num_tokens)
    probs, routing_map = layer.route(hidden)
    expected = hidden * probs.sum(-1).reshape(num_tokens, 1, 1)
    dispatcher = layer.token_dispatcher
    h, p = dispatcher.dispatch_preprocess(hidden, routing_map, probs)
    h, p = dispatcher.token_dispatch(h, p)
    h, tokens_per_expert, p = dispatcher.dispatch_postprocess(h, p)
    assert h.shape[0] == int(tokens_per_expert.sum())
    # Expert-tensor-parallel ranks each hold all tokens and their partial results are summed.
    h = h * p.unsqueeze(-1) / dispatcher.tp_size
    h = dispatcher.combine_preprocess(h)
    output = dispatcher.combine_postprocess(dispatcher.token_combine(h))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(rank))
    (got,) = torch.autograd.grad((output * weights).sum(), hidden, retain_graph=True)
    (want,) = torch.autograd.grad((expected * weights).sum(), hidden)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    return {
        "loads": tokens_per_expert.tolist(),
        "first": dispatcher.local_expert_indices[0],
        "etp_rank": dispatcher.tp_rank,
        "per_token": routing_map.sum(1).tolist(),
        "own": routing_map.sum(0).tolist(),
        "static": plan_of(routing_map).static is not None,
    }


def layer_equals_reference(rank, size, num_tokens=20, **settings):
    """Compare a layer's output and input gradient with a loop over tokens and experts."""
    layer = make_layer(**settings)
    layer.train()
    hidden = own_input(rank, num_tokens)
    noted = {}
    route = layer.router.forward
    layer.router.forward = lambda *a: noted.setdefault("routed", route(*a))
    output, _ = layer(hidden)
    _, routing_map = noted["routed"]
    # All experts' weights from the ranks that hold them; expert-tensor-parallel ranks hold slices
    # of the inner dimension.
    own = [
        (e.linear_fc1.weight.detach().clone(), e.linear_fc2.weight.detach().clone())
        for e in layer.experts.local_experts
    ]
    dispatcher = layer.token_dispatcher
    everyone = [None] * size
    dist.all_gather_object(everyone, (dispatcher.local_expert_indices, dispatcher.tp_rank, own))
    slices = {}
    for indices, etp_rank, pairs in everyone:
        for index, pair in zip(indices, pairs, strict=True):
            slices[index, etp_rank] = pair
    weights = {}
    for index in range(layer.config.num_moe_experts):
        parts = [slices[index, t] for t in range(dispatcher.tp_size)]
        weights[index] = torch.cat([fc1 for fc1, _ in parts]), torch.cat([w for _, w in parts], 1)
    again = hidden.detach().clone().requires_grad_()
    probs_again, _ = route(again)
    rows = []
    for token in range(num_tokens):
        total = torch.zeros(HIDDEN)
        for expert in routing_map[token].nonzero().flatten().tolist():
            fc1, fc2 = weights[expert]
            inner = torch.nn.functional.gelu(again[token, 0] @ fc1.T) * probs_again[token, expert]
            total = total + inner @ fc2.T
        rows.append(total)
    expected = torch.stack(rows).unsqueeze(1)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    (got,) = torch.autograd.grad(output.sin().sum(), hidden)
    (want,) = torch.autograd.grad(expected.sin().sum(), again)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    return float(output.detach().abs().sum())


@contextlib.contextmanager
def counted():
    """Count collectives by name."""
    names = (
        "all_reduce all_gather all_gather_into_tensor all_gather_single _all_gather_base "
        "all_to_all_single "
        "reduce_scatter reduce_scatter_tensor _reduce_scatter_base broadcast all_gather_object"
    ).split()
    from megatron.core.tensor_parallel import mappings

    counts: Counter = Counter()
    saved = []

    def wrapper(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for owner, attributes in ((dist, names), (mappings, ("dist_all_gather_func",))):
        for name in attributes:
            function = getattr(owner, name)
            saved.append((owner, name, function))
            setattr(owner, name, wrapper("all_gather" if "gather_func" in name else name, function))
    try:
        yield counts
    finally:
        for owner, name, function in saved:
            setattr(owner, name, function)


def count_collectives(rank, size, router="maxscore", training=True, **settings):
    """Return the collectives of one forward and backward pass, and the dispatcher's sync point."""
    layer = make_layer(router=router, shape=(16, 1), **settings)
    layer.train(training)
    hidden = own_input(rank, 16)
    with counted() as counts:
        output, _ = layer(hidden)
        output.sum().backward()
    return dict(counts), layer.token_dispatcher.cuda_sync_point


def count_with_rounds(rank, size, **settings):
    """The same for ours, and the rounds that its solve says it took."""
    from megatron_maxscore.moe import scopes

    rounds = []
    solve = scopes.solve

    def noting(*args, **kwargs):
        solution = solve(*args, **kwargs)
        rounds.append(solution.rounds)
        return solution

    scopes.solve = noting
    try:
        counts, sync = count_collectives(rank, size, **settings)
    finally:
        scopes.solve = solve
    return counts, sync, rounds


def scope_problems(rank, size, scope, batch=2, num_tokens=12, skew=1.0, **layout):
    """Route in a scope; return what every rank had and chose, and which ranks share a problem."""
    from megatron_maxscore.moe import MaxScoreConfig
    from megatron_maxscore.moe.plan import plan_of

    layer = make_layer(options=MaxScoreConfig(scope=scope), shape=(num_tokens, batch), **layout)
    layer.train()
    hidden = own_input(rank, num_tokens, batch).detach()
    router = layer.router
    with torch.no_grad():
        # Ranks prefer different experts.
        lift = skew * torch.randn(EXPERTS, generator=torch.Generator().manual_seed(rank))
        gating = router.gating
        router.gating = lambda x: gating(x) + lift
        _, routing_map = router(hidden)
        logits = router.gating(hidden)
    chosen = routing_map.reshape(num_tokens, batch, EXPERTS)
    return {
        "logits": logits,
        "chosen": chosen,
        "ranks": dist.get_process_group_ranks(router.scope.group),
        "loads": plan_of(routing_map).loads_RE,
        "static": plan_of(routing_map).static is not None,
        "tp_ep": dist.get_process_group_ranks(router.scope._tp_ep),
    }


def prices_after_batches(rank, size, batches=3, **settings):
    """Train-mode passes on rank-dependent data, then the end of each global batch."""
    from megatron_maxscore.moe.step import average_prices, maxscore_routers

    layer = make_layer(**settings)
    layer.train()
    routers = maxscore_routers([layer])
    history = []
    for batch in range(batches):
        own = []
        for microbatch in range(2):
            layer(own_input(rank + 10 * batch + 100 * microbatch, 24))[0].sum().backward()
        own.append((routers[0].price_sum.clone(), int(routers[0].price_count)))
        average_prices(routers)
        history.append((own[0], routers[0].expert_prices.clone()))
    assert routers[0].price_count == 0 and not routers[0].price_sum.any()
    return history


def bad_scores(rank, size, bad_rank=1, tokens=3):
    """One rank's router meets NaN; every rank must raise the same error."""
    from megatron_maxscore.moe.step import BadScoresError, maxscore_routers, raise_on_bad_scores

    layer = make_layer(ep=size)
    layer.train()
    routers = maxscore_routers([layer])
    raise_on_bad_scores(routers, 5)  # nothing to report
    hidden = own_input(rank, 16).detach()
    if rank == bad_rank:
        hidden[:tokens] = float("nan")
    probs, routing_map = layer.router(hidden)
    assert routing_map.sum(1).tolist() == [TOPK] * 16, "the assignment stays valid"
    is_bad = torch.isnan(probs).any(1)
    assert is_bad.tolist() == [rank == bad_rank and t < tokens for t in range(16)]
    probs.sum().backward()
    try:
        raise_on_bad_scores(routers, 6)
    except BadScoresError as error:
        message = str(error)
    else:
        message = None
    raise_on_bad_scores(routers, 7)  # reported once
    return message


def recompute(rank, size, how, **settings):
    """Return output, gradients, number of solves and collectives of plain or recomputed passes."""
    from megatron.core import tensor_parallel

    layer = make_layer(**settings)
    layer.train()
    outputs, grads = [], []
    inputs = [own_input(rank + 10 * m, 24) for m in range(2)]
    with counted() as counts:
        for hidden in inputs:
            if how == "full":
                outputs.append(tensor_parallel.checkpoint(lambda h: layer(h)[0], False, hidden))
            else:
                outputs.append(layer(hidden)[0])
        for hidden, output in zip(inputs, outputs, strict=True):
            output.square().sum().backward()
            grads.append(hidden.grad)
    router = layer.router
    return {
        "outputs": [o.detach() for o in outputs],
        "grads": [*grads, router.weight.grad],
        "solves": router.statistics.solves,
        "gathers": counts["all_gather"],
        # Nothing else uses these here.
        "solver_rounds": counts["all_gather_single"] + counts["all_gather_into_tensor"],
        "price_count": int(router.price_count),
    }


def same_experts_on_tensor_parallel_copies(rank, size, scope, tp, ep):
    """In evaluation without sequence parallelism TP ranks hold copies and must agree."""
    from megatron_maxscore.moe import MaxScoreConfig

    layer = make_layer(
        tp=tp, ep=ep, etp=1, sequence_parallel=False, options=MaxScoreConfig(scope=scope)
    )
    layer.eval()
    hidden = own_input(rank // tp, 16)
    from megatron_maxscore.moe.evaluation import evaluation_routing

    maps = []
    for rule in ("price", "flow"):
        with evaluation_routing(rule):
            maps.append(layer.route(hidden)[1])
            layer(hidden)  # what is dispatched comes back
    return maps


def uneven_collectives(rank, size):
    """Return what CPU mode's uneven all_gather and reduce_scatter give, and what they mean."""
    sizes = [3 * r + 1 for r in range(size)]
    parts = [torch.arange(n, dtype=torch.float32) + 100 * r for r, n in enumerate(sizes)]
    outputs = [torch.full_like(part, -1) for part in parts]
    dist.all_gather(outputs, parts[rank])
    output = torch.full_like(parts[rank], -1)
    dist.reduce_scatter(output, [part * (rank + 1) for part in parts])
    return [*outputs, output], [*parts, parts[rank] * sum(range(1, size + 1))]


def sleep_on_one_rank(rank, size):
    """Rank 1 never comes; the others wait in a collective."""
    if rank == 1:
        time.sleep(600)
    dist.all_reduce(torch.ones(1))


def raise_on_one_rank(rank, size):
    """Rank 0 raises."""
    if rank == 0:
        raise RuntimeError("as intended")
    return np.int64(rank)
