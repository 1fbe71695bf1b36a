"""What ranks do in the tests of steps: frozen routers, numbers of experts, bad scores, quotas."""

from __future__ import annotations

import threading

import torch

from tests.dist.cases import EXPERTS, HIDDEN, make_layer, own_input


def frozen_routers(rank, size, how):
    """Train a layer with a frozen router; return its prices before and after, and its counts."""
    from megatron_maxscore.moe.step import average_prices

    layer = make_layer(ep=size)
    layer.train()
    router = layer.router
    router.expert_prices.copy_(torch.linspace(-0.3, 0.3, EXPERTS))
    before = router.expert_prices.clone()
    if how == "weight":
        router.weight.requires_grad_(False)
    elif how == "bias":
        router.frozen_expert_bias = True
    for step in range(3):
        layer(own_input(rank + 10 * step, 24))[0].square().sum().backward()
        average_prices([router])
    return torch.equal(before, router.expert_prices), router.last_statistics.solves


def different_numbers_of_experts(rank, size):
    """Average the prices of routers over 8 and 6 experts together, and one by one."""
    from megatron_maxscore.moe.step import average_prices

    layers = [make_layer(ep=size, experts=experts) for experts in (8, 6)]
    for layer in layers:
        layer.train()
        layer(own_input(rank, 24))[0].square().sum().backward()
    routers = [layer.router for layer in layers]
    sums = [(router.price_sum.clone(), router.price_count.clone()) for router in routers]
    average_prices(routers)
    together = [router.expert_prices.clone() for router in routers]
    for router, (price_sum, price_count) in zip(routers, sums, strict=True):
        router.expert_prices.zero_()
        router.price_sum.copy_(price_sum)
        router.price_count.copy_(price_count)
        average_prices([router])
    return together, [router.expert_prices for router in routers]


def bad_weight(rank, size, training, scope="local", gate="soft_topk", frozen=False):
    """Put a NaN into the router's weight; return which share of the output is NaN, and counts."""
    found = {}
    for router in ("maxscore", "topk"):
        from megatron_maxscore.moe import MaxScoreConfig

        options = MaxScoreConfig(scope=scope, gate=gate)
        layer = make_layer(ep=size, router=router, options=options)
        layer.train(training)
        with torch.no_grad():
            layer.router.weight[3, 2] = float("nan")
        layer.router.weight.requires_grad_(not frozen)
        with torch.set_grad_enabled(training):
            output, _ = layer(own_input(rank, 24).detach().requires_grad_(training and not frozen))
        found[router] = float(output.isnan().float().mean())
        if router == "maxscore":
            counted = int(layer.router.evaluated_bad_tokens)
    return found, counted


def shares_over_time(rank, size, num_tokens, topk, experts, declared, with_gradients=True):
    """Return how many of this rank's tokens each expert got in 200 microbatches."""
    from megatron_maxscore.moe.step import average_prices

    layer = make_layer(
        ep=size, experts=experts, moe_router_topk=topk,
        shape=(num_tokens, 1) if declared else None,
    )  # fmt: skip
    router = layer.router
    router.train()
    loads = torch.zeros(experts, dtype=torch.int64)
    kept = best = 0.0
    for batch in range(200):
        generator = torch.Generator().manual_seed(1000 * rank + batch)
        hidden = torch.randn(num_tokens, 1, HIDDEN, generator=generator)
        with torch.set_grad_enabled(with_gradients):
            probs, routing_map = router(hidden)
        if with_gradients:
            probs.sum().backward()
            average_prices([router])
        loads += routing_map.sum(0)
        logits = router.gating(hidden).reshape(num_tokens, experts).detach()
        logits = logits - logits.mean()
        kept += float(logits[routing_map].sum())
        best += float(logits.topk(topk, dim=1).values.sum())
        assert routing_map.sum(1).tolist() == [topk] * num_tokens
    return loads, kept / best


def two_layers_in_threads(rank, size):
    """Two layers, each run and built by a thread of its own; return how often one was wrong."""
    from megatron.core.transformer.moe import moe_layer, token_dispatcher

    symbols = lambda: (  # noqa: E731
        token_dispatcher.permute,
        moe_layer.MoEAlltoAllTokenDispatcher,
    )
    layers = [make_layer(), make_layer()]
    before = symbols()
    inputs = [own_input(seed, 256).detach() for seed in (1, 2)]
    with torch.no_grad():
        layers[1].router.weight.mul_(-1)
        wanted = [layer(x)[0].clone() for layer, x in zip(layers, inputs, strict=True)]
    # Both threads are inside their dispatch at the same time.
    meeting = threading.Barrier(2, timeout=20)
    wrong, errors = [0, 0], []

    def meet(preprocess):
        def met(routing_map):
            result = preprocess(routing_map)
            meeting.wait()
            return result

        return met

    for layer in layers:
        layer.token_dispatcher.preprocess = meet(layer.token_dispatcher.preprocess)

    def work(index):
        try:
            with torch.no_grad():
                for _ in range(10):
                    output = layers[index](inputs[index])[0]
                    wrong[index] += not torch.equal(output, wanted[index])
        except Exception as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong, errors, symbols() == before


def layers_built_in_threads(rank, size):
    """Stock layers and ours, built at the same time; return the classes they got."""
    from unittest import mock

    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.router import TopKRouter

    from tests.dist import cases

    make_layer()  # sets up the groups
    collection = ProcessGroupCollection.use_mpu_process_groups()
    meeting = threading.Barrier(2, timeout=20)
    found = []
    init = TopKRouter.__init__

    def meet(self, *args, **kwargs):
        # In the middle of both layers' construction.
        meeting.wait()
        init(self, *args, **kwargs)

    def build(router):
        layer = make_layer(router=router)
        found.append((router, type(layer.router).__name__, type(layer.token_dispatcher).__name__))

    with (
        mock.patch.object(cases, "groups", lambda *layout: collection),
        mock.patch.object(TopKRouter, "__init__", meet),
    ):
        for _ in range(3):
            threads = [threading.Thread(target=build, args=(r,)) for r in ("topk", "maxscore")]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    return sorted(found)


def loads_of_different_widths(rank, size):
    """Ranks whose layers have different numbers of experts write lines of one width."""
    from megatron_maxscore.training.statistics import _Watch

    watch = _Watch()
    own = torch.ones(2, 4 + 2 * rank, dtype=torch.int64)
    first, second = watch._widened(own), watch._widened(own)
    assert torch.equal(first, second)
    return list(first.shape), int(first.sum())


def built_on_meta(rank, size):
    """Build a layer on meta, as large models are, and make it real; return its buffers."""
    from unittest import mock

    from tests.dist import cases

    meta = torch.device("meta")
    with meta, mock.patch.object(cases, "device", lambda: meta):
        layer = make_layer(ep=size)
    assert layer.router.price_sum.is_meta
    empty_like = torch.empty_like

    def full_of_something(tensor, **kwargs):
        return empty_like(tensor, **kwargs).fill_(7.0)

    with mock.patch.object(torch, "empty_like", full_of_something):
        layer.to_empty(device="cpu")
    router = layer.router
    assert router.weight.detach().eq(7.0).all() and not router.price_sum.any()
    with torch.no_grad():
        router.weight.copy_(torch.linspace(-1, 1, router.weight.numel()).view_as(router.weight))
        for parameter in layer.experts.parameters():
            parameter.fill_(0.01)
    layer.train()
    layer(own_input(rank, 24))[0].square().sum().backward()
    return router.expert_prices.clone(), int(router.price_count), int(router.statistics.solves)
