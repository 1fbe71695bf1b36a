"""What the ranks do with Megatron's other dispatchers behind our router."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
import torch.distributed as dist

from megatron_maxscore.moe import MaxScoreConfig
from megatron_maxscore.moe.seam import seen_with
from tests.dist.cases import EXPERTS, HIDDEN, TOPK, groups, make_layer, own_input


def _watch(layer, noted):
    """Note what the router returns, and what the experts get."""
    route, experts = layer.router.forward, layer.experts.forward

    def routing(*args, **kwargs):
        noted["gates"], noted["map"] = route(*args, **kwargs)
        return noted["gates"], noted["map"]

    def computing(rows, counts, probs, **kwargs):
        noted["counts"] = counts
        # Over expert-tensor-parallel ranks the all-to-all has another order within an expert.
        expert_N = torch.arange(len(counts)).repeat_interleave(torch.as_tensor(counts))
        order_N = rows.detach()[:, 0].argsort(stable=True)
        order_N = order_N[expert_N[order_N].argsort(stable=True)]
        noted["rows"], noted["row gates"] = rows[order_N], probs[order_N]
        return experts(rows, counts, probs, **kwargs)

    layer.router.forward, layer.experts.forward = routing, computing


def trains_like_all_to_all(rank, size, topk, steps=20, scope="local", layout=None, **dispatcher):
    """Train a layer with the all-to-all, and beside it one with another dispatcher.

    The other takes the same step with the same parameters. What is exact must be equal; rounding
    may differ in sums alone. Returns the largest differences of outputs and of gradients, relative
    to their largest entry, and the losses.
    """
    options = MaxScoreConfig(scope=scope)
    layers = []
    for settings in ({}, dispatcher):
        torch.manual_seed(3)
        layer = make_layer(options=options, moe_router_topk=topk, **(layout or {}), **settings)
        with torch.no_grad():
            layer.router.weight *= 20
        layers.append(layer.train())
    noted = [{}, {}]
    for layer, note in zip(layers, noted, strict=True):
        _watch(layer, note)
    differences, losses = [], []
    for step in range(steps):
        with torch.no_grad():
            for other, parameter in zip(
                layers[1].parameters(), layers[0].parameters(), strict=True
            ):
                other.copy_(parameter)
            layers[1].router.expert_prices.copy_(layers[0].router.expert_prices)
        results = []
        for layer in layers:
            hidden = own_input(rank + size * step, 24)
            output, _ = layer(hidden)
            loss = (output - hidden.detach()).square().sum() / hidden.shape[0]
            layer.zero_grad()
            loss.backward()
            grads = [hidden.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
            results.append((output.detach(), grads, loss.item()))
        own, other = noted
        assert torch.equal(own["map"], other["map"])
        for name in ("gates", "row gates", "rows"):
            assert torch.equal(own[name], other[name]), (step, name)
        assert own["counts"].tolist() == other["counts"].tolist()
        (output, grads, loss), (output_2, grads_2, loss_2) = results
        for a, b in zip([output, *grads], [output_2, *grads_2], strict=True):
            differences.append(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)))
        differences.append(abs(loss - loss_2) / loss)
        losses.append(loss)
        for layer in layers:
            layer.router.end_attempt(layer.router.price_sum / layer.router.price_count)
            layer.router.end_batch()
        with torch.no_grad():
            for parameter in layers[0].parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    assert losses[-1] < losses[0]
    return max(differences)


def chosen_gates_of_zero(rank, size, backend):
    """Return whether experts that were chosen with a gate of 0 are still those that get tokens.

    A softmax gate underflows where the flow moves a token far from its best experts.
    """
    layer = make_layer(
        ep=size, options=MaxScoreConfig(gate="score"), moe_router_pre_softmax=True,
        moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend=backend,
    )  # fmt: skip
    noted = {}
    _watch(layer, noted)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0, 0] = 1e4
    hidden = own_input(rank, 24)
    with torch.no_grad():
        hidden[..., 0] = 1.0  # all want expert 0, by more than a gate of float32 can say
    output, _ = layer.train()(hidden)
    output.sum().backward()
    assert torch.isfinite(output).all() and torch.isfinite(hidden.grad).all()
    chosen_T = noted["map"].sum(1)
    gates_TE = noted["gates"].detach()
    assert chosen_T.tolist() == [TOPK] * 24
    loads = torch.zeros(EXPERTS, dtype=torch.int64)
    first = layer.token_dispatcher.local_expert_indices[0]
    counts = noted["counts"]
    loads[first : first + len(counts)] = counts
    dist.all_reduce(loads)
    smallest = float(gates_TE[noted["map"]].min())
    assert not gates_TE[~noted["map"]].any()
    return loads.tolist(), smallest


def more_tokens_than_the_shape(rank, size, dispatcher):
    """Return the tokens that a router counts as lost where a batch is longer than it was said."""
    layer = make_layer(ep=size, shape=(16, 1), **dispatcher)
    output, _ = layer.train()(own_input(rank, 24))
    output.sum().backward()
    return layer.router.statistics.lost_tokens, bool(torch.isfinite(output).all())


def budget_of_rows(rank, size, scope, tokens=512):
    """Compare a layer whose buffer holds just a step's rows with the all-to-all.

    Evaluation by prices sends most tokens to one rank. Local experts play Transformer Engine's
    fused operators, which a budget needs. Returns whether rows were dropped.
    """
    outputs = []
    for settings in (
        {},
        dict(
            moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="hybridep",
            moe_expert_rank_capacity_factor=1.0, use_transformer_engine_op_fuser=True,
        ),
    ):  # fmt: skip
        torch.manual_seed(3)
        options = MaxScoreConfig(scope=scope)
        layer = make_layer(ep=size, options=options, shape=(tokens, 1), **settings)
        hidden = own_input(rank, tokens)
        with torch.no_grad():
            hidden[..., 0] = 1.0
            layer.router.weight[:2, 0] = 3.0  # tokens like experts 0 and 1
        for training in (True, False):
            outputs.append(layer.train(training)(hidden)[0].detach())
    for own, other in zip(outputs[:2], outputs[2:], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)
    # Megatron lifts the budget itself for a step that it repeats after an overflow.
    manager = layer.token_dispatcher._comm_manager
    layer.train()(hidden)
    assert manager.moe_expert_rank_capacity_factor == 1.0
    manager.moe_expert_rank_capacity_factor = None
    layer(hidden)
    assert manager.moe_expert_rank_capacity_factor is None
    return bool(layer.token_dispatcher.check_over_budget())


def padding(rank, size, tokens, scope, shape, flex=False, steps=2):
    """Train a layer whose experts' rows are padded to multiples of 16, and one without padding.

    Returns the all-gathers of a pass, each local expert's rows, and those that statistics count.
    """
    from megatron.core.transformer import transformer_config

    from megatron_maxscore.training.statistics import _without_padding
    from tests.dist.cases import counted

    settings = dict(
        ep=size, options=MaxScoreConfig(scope=scope), shape=(tokens, 1) if shape else None
    )
    if flex:
        settings |= dict(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="hybridep")
    layers = []
    for is_padded in (False, True):
        torch.manual_seed(3)
        quantised = dict(fp8="e4m3", moe_router_padding_for_quantization=True)
        # What rounds to eight bits needs Transformer Engine and a GPU.
        with mock.patch.object(transformer_config, "is_te_min_version", lambda *_, **__: True):
            layer = make_layer(**settings, **(quantised if is_padded else {}))
        layer.experts.config = seen_with(layer.config, {"fp8": None})
        layers.append(layer.train())
    noted = [{}, {}]
    for layer, note in zip(layers, noted, strict=True):
        _watch(layer, note)
    gathers = []
    for step in range(steps):
        results = []
        for layer in layers:
            hidden = own_input(rank + size * step, tokens)
            with counted() as collectives:
                output, _ = layer(hidden)
            gathers.append(collectives["all_gather_into_tensor"] + collectives["all_gather"])
            output.square().sum().backward()
            results.append((output.detach(), hidden.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    rows = torch.as_tensor(noted[1]["counts"])
    real = _without_padding(rows, noted[1]["row gates"].detach())
    assert real.tolist() == list(noted[0]["counts"])
    return gathers[-1], rows.tolist(), real.tolist()


def stand_ins(rank, size):
    """Check what the stand-ins of DeepEP and HybridEP do against a loop over all ranks' tokens."""
    from megatron_maxscore.cpu.deep_ep import Buffer, HybridEPBuffer

    group = groups(ep=size).ep
    tokens, experts, local = 6, 4 * size, 4
    generator = torch.Generator().manual_seed(11)
    # Every rank makes all ranks' inputs; -1 stands for no expert.
    x = torch.randn(size, tokens, HIDDEN, generator=generator)
    scores = torch.rand(size, tokens, experts, generator=generator)
    weights, indices = scores.topk(3)
    indices[:, 1, 1:] = -1
    buffer = Buffer(group)
    layout = buffer.get_dispatch_layout(indices[rank], experts)
    per_rank, _, per_expert, is_in, _ = layout
    wanted = [
        (source, token)
        for source in range(size)
        for token in range(tokens)
        if any(index // local == rank for index in indices[source, token].tolist() if index >= 0)
    ]
    rows, got_indices, got_weights, counts, handle, _ = buffer.dispatch(
        x[rank], num_tokens_per_rank=per_rank, is_token_in_rank=is_in,
        num_tokens_per_expert=per_expert, topk_idx=indices[rank], topk_weights=weights[rank],
    )  # fmt: skip
    assert torch.equal(rows, torch.stack([x[place] for place in wanted]))
    for row, place in enumerate(wanted):
        for slot, index in enumerate(indices[place].tolist()):
            is_here = index >= 0 and index // local == rank
            assert int(got_indices[row, slot]) == (index - rank * local if is_here else -1)
            assert float(got_weights[row, slot]) == (weights[place][slot] if is_here else 0.0)
    assert counts == [int((indices == rank * local + e).sum()) for e in range(local)]
    # A token comes back once from every rank that has got it.
    back, back_weights, _ = buffer.combine(rows, handle, got_weights)
    times = is_in.sum(1, keepdim=True)
    torch.testing.assert_close(back, x[rank] * times)
    torch.testing.assert_close(back_weights, weights[rank] * (indices[rank] >= 0))
    assert torch.equal(buffer.dispatch(x[rank], handle=handle)[0], rows)

    routed = torch.zeros(size, tokens, experts + 1).scatter_(2, indices % (experts + 1), 1.0)
    routed = routed[..., :-1].bool()
    gates = scores * routed
    hybrid = HybridEPBuffer(group, HIDDEN, tokens, local)
    places = [
        [
            (source, token)
            for source in range(size)
            for token in range(tokens)
            if routed[source, token, rank * local + expert]
        ]
        for expert in range(local)
    ]
    for multiple in (None, 4):
        expected, expected_gates, padded = [], [], []
        for expert, found in enumerate(places):
            expected += [x[place] for place in found]
            expected_gates += [gates[place][rank * local + expert] for place in found]
            rest = -len(found) % (multiple or 1)
            expected += [torch.zeros(HIDDEN)] * rest
            expected_gates += [torch.tensor(0.0)] * rest
            padded.append(len(found) + rest)
        common = dict(
            hidden=x[rank], routing_map=routed[rank], probs=gates[rank],
            num_of_experts_per_rank=local, pad_multiple=multiple,
        )  # fmt: skip
        rows, got, _, counts, handle = hybrid.dispatch_with_permute(**common)
        assert counts.tolist() == padded and counts.dtype == torch.int64
        assert torch.equal(rows, torch.stack(expected))
        assert torch.equal(got, torch.stack(expected_gates))
        assert int(handle[-1]) == 0
        back, back_gates = hybrid.combine_with_unpermute(
            hidden=rows, probs=got, handle=handle, pad_multiple=multiple
        )
        torch.testing.assert_close(back, x[rank] * routed[rank].sum(1, keepdim=True))
        assert torch.equal(back_gates, gates[rank])
        again = hybrid.dispatch_with_permute(hidden=x[rank], handle=handle, pad_multiple=multiple)
        assert torch.equal(again[0], rows)
    # Rows beyond the budget are dropped, and the handle says so.
    budget = len(expected) - 4
    rows, _, _, _, handle = hybrid.dispatch_with_permute(**common, num_permuted_tokens=budget)
    assert torch.equal(rows, torch.stack(expected)[:budget]) and int(handle[-1]) == 1
    try:
        uneven = torch.randn(tokens + rank, HIDDEN)
        hybrid.dispatch_with_permute(
            hidden=uneven, routing_map=torch.zeros(tokens + rank, experts).bool()
        )
    except ValueError as error:
        assert "same number of tokens" in str(error) and "pad-uneven" in str(error)
    else:
        raise AssertionError("ranks with different numbers of tokens were dispatched")


def missing_backend(rank, size):
    """Return what is said of flex dispatchers whose packages are missing, and in CPU mode."""
    from types import SimpleNamespace

    from megatron.core.transformer.moe import fused_a2a

    from megatron_maxscore import cpu
    from megatron_maxscore.training import machine

    said = {}
    missing = {"HAVE_DEEP_EP": False, "HAVE_HYBRIDEP": False, "HAVE_TE_EP": False}
    for is_cpu in (True, False):
        for backend in ("deepep", "hybridep", "ncclep"):
            args = SimpleNamespace(
                moe_token_dispatcher_type="flex", num_experts=8, moe_enable_deepep=False,
                moe_flex_dispatcher_backend=backend,
            )  # fmt: skip
            with (
                mock.patch.multiple(fused_a2a, create=True, **missing)
                if not is_cpu
                else contextlib.nullcontext(),
                mock.patch.object(cpu, "is_enabled", lambda is_cpu=is_cpu: is_cpu),
            ):
                try:
                    machine._check_dispatcher(args)
                except ValueError as error:
                    said[backend, is_cpu] = str(error)
    return said
