"""Ways to configure routers: specs, flags, and a config that changes later."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import pickle
import sys

from megatron_maxscore.moe import MaxScoreConfig
from tests.dist.cases import EXPERTS, HIDDEN, TOPK, groups, make_layer, own_input


def specs(rank, size):
    """``with_maxscore`` on layer, block and MTP specs; the flag alone; stock left alone."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_maxscore.moe import (
        MaxScoreRouter,
        MaxScoreTokenDispatcher,
        with_maxscore,
    )
    from megatron_maxscore.moe.step import maxscore_routers

    collection = groups(ep=size)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        moe_layer_freq=[1, 0],
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        expert_model_parallel_size=size,
        mtp_num_layers=1,
        add_bias_linear=False,
        use_cpu_initialization=True,
    )
    options = MaxScoreConfig(temperature=0.5)
    found = []
    layer_spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
    with_maxscore(layer_spec, options)  # returns a copy: the stock model comes after it
    for kind in ("stock", "layer", "block"):
        spec = layer_spec
        if kind == "block":
            spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
        mtp = get_gpt_mtp_block_spec(config, layer_spec, use_transformer_engine=False)
        if kind != "stock":
            spec, mtp = with_maxscore(spec, options), with_maxscore(mtp, options)
        model = GPTModel(
            config, spec, vocab_size=64, max_sequence_length=16, mtp_block_spec=mtp,
            position_embedding_type="rope", pg_collection=collection,
        )  # fmt: skip
        routers = [m for m in model.modules() if isinstance(m, TopKRouter)]
        ours = maxscore_routers([model])
        dispatchers = [
            m.token_dispatcher for m in model.modules() if hasattr(m, "token_dispatcher")
        ]
        assert len(routers) == len(dispatchers)
        if kind == "stock":
            assert not ours and not any(type(d) is MaxScoreTokenDispatcher for d in dispatchers)
        else:
            assert len(ours) == len(routers)
            assert all(
                type(r) is MaxScoreRouter and r.options == options.resolved_for(r.config)
                for r in ours
            )
            assert all(type(d) is MaxScoreTokenDispatcher for d in dispatchers)
            assert any(r.is_mtp_layer for r in ours), "the MTP layer is ours too"
        found.append(len(ours))
    # Releases differ in how a spec holds the MoE layer: a ModuleSpec or a partial.
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.router import TopKRouter as StockRouter
    from megatron.core.transformer.spec_utils import ModuleSpec

    inner = MoESubmodules(experts=None)
    given = ModuleSpec(
        module=GPTModel, submodules={"mlp": ModuleSpec(module=MoELayer, submodules=inner)}
    )
    swapped = with_maxscore(given, options).submodules["mlp"].submodules.router
    assert swapped.func is MaxScoreRouter and inner.router is StockRouter
    try:
        with_maxscore(get_gpt_layer_local_spec())
    except ValueError as error:
        assert "no MoE layer" in str(error)
    else:
        raise AssertionError("a dense spec was accepted")
    return found


REFUSED = {
    "--maxscore-capacity-factor 0.9": ["--maxscore-capacity-factor", "0.9", "at least 1"],
    "--maxscore-capacity-factor inf": ["--maxscore-capacity-factor", "inf", "at least 1"],
    "--maxscore-capacity-factor 1e300": ["--maxscore-capacity-factor", "1e+300", "at least 1"],
    "--maxscore-temperature inf": ["--maxscore-temperature", "inf", "finite"],
    "--moe-router-topk -1": ["--moe-router-topk -1", "between 1 and"],
    "--expert-model-parallel-size 0": ["--expert-model-parallel-size", "at least 1, got 0"],
    "--maxscore-record-dir s --maxscore-record-layers 99": ["layer 99", "2 layers"],
    "--maxscore-record-dir s --maxscore-record-layers 0": ["begin at 1", "'0'"],
    "--maxscore-record-layers 1": ["--maxscore-record-layers 1", "--maxscore-record-dir"],
    "--maxscore-gate score --maxscore-temperature 2": ["--maxscore-temperature", "soft_topk"],
    "--maxscore-gate score --maxscore-variant softmax": ["--maxscore-variant", "soft_topk"],
    "--moe-router-type topk --maxscore-scope group": [
        "--maxscore-scope",
        "--moe-router-type maxscore",
        "is topk",
    ],
    "--moe-router-type topk --maxscore-normalize-gates": [
        "--maxscore-normalize-gates",
        "--moe-router-type maxscore",
    ],
    "--maxscore-scope world": ["--maxscore-scope", "world", "sequence"],
    "--maxscore-scope sequence --sft --tokenizer-type SFTTokenizer": [
        "--maxscore-scope sequence",
        "--sft",
        "group or local",
    ],
    "--maxscore-mode greedy": ["--maxscore-mode", "greedy"],
    "--maxscore-temperature 0": ["--maxscore-temperature", "greater than 0"],
    "--maxscore-price-decay 1": ["--maxscore-price-decay"],
    "--maxscore-gate hard": ["--maxscore-gate", "soft_topk", "score"],
    "--moe-router-topk 9": ["--moe-router-topk 9", "--num-experts 8"],
    "--moe-router-load-balancing-type sinkhorn": ["sinkhorn", "none"],
    "--moe-router-load-balancing-type quantile_balancing": ["quantile_balancing", "none"],
    "--moe-expert-capacity-factor 1.0": [
        "--moe-expert-capacity-factor",
        "--maxscore-capacity-factor",
    ],
    "--moe-router-score-function sigmoid --maxscore-gate soft_topk": [
        "--moe-router-score-function sigmoid",
        "leave --maxscore-gate out",
    ],
    "--moe-router-score-function sigmoid --maxscore-temperature 2": [
        "--maxscore-temperature",
        "--moe-router-score-function sigmoid",
    ],
    "--moe-router-enable-expert-bias": ["--moe-router-score-function sigmoid or sqrtsoftplus"],
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias "
    "--maxscore-objective logits": ["--maxscore-objective logits", "--moe-router-enable-expert"],
    "--moe-router-group-topk 1": ["--moe-router-group-topk 1", "--moe-router-num-groups"],
    "--num-experts 7 --expert-model-parallel-size 2": ["--num-experts 7", "divisible"],
    "--bogus-flag 3": ["--bogus-flag"],
    "--moe-router-type best": ["--moe-router-type", "best"],
    "--train-data-path 0.5 /nowhere/text": ["--train-data-path", "/nowhere/text.idx"],
}


def hashed_layers(rank, size):
    """Return routers and dispatchers of layers of which the first routes by hash."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module

    from megatron_maxscore.moe import with_maxscore
    from tests.dist.cases import make_layer

    config = make_layer(ep=size, router="topk").config
    config.moe_n_hash_layers = 1
    spec = with_maxscore(get_moe_module_spec(use_te=False, num_experts=8, moe_grouped_gemm=False))
    collection = ProcessGroupCollection.use_mpu_process_groups()
    found = []
    for number, is_mtp in ((1, False), (2, False), (1, True)):
        arguments = dict(
            config=config, layer_number=number, is_mtp_layer=is_mtp, pg_collection=collection
        )
        is_plain = callable(spec) and not hasattr(spec, "module")
        layer = spec(**arguments) if is_plain else build_module(spec, **arguments)
        found.append((type(layer.router).__name__, type(layer.token_dispatcher).__name__))
    return found


def arguments(rank, size):
    """Parse good and bad command lines in one process; return the messages of the bad ones."""
    from megatron_maxscore import training

    training.install()
    training.install()  # twice is once
    try:
        from megatron.core.transformer import MLATransformerConfig, TransformerConfig
        from megatron.training import arguments as megatron_arguments
        from megatron.training.arguments import core_transformer_config_from_args

        from tests.dist.training_runs import MODEL

        def parse(flags):
            sys.argv = ["script", *MODEL.split(), "--train-iters", "2", *flags.split()]
            args = megatron_arguments.parse_args()
            args.rank, args.world_size = 0, 2
            megatron_arguments.validate_args(args)
            return args

        stock = parse("")
        assert stock.moe_router_type == "topk"
        assert core_transformer_config_from_args(stock).moe_router_type == "topk"
        ours = parse(
            "--moe-router-type maxscore --maxscore-capacity-factor 1.25 --maxscore-gate score "
            "--moe-router-score-function sigmoid --maxscore-eval-routing price"
        )
        config = core_transformer_config_from_args(ours)
        assert config.moe_router_type == "maxscore" and config.maxscore_capacity_factor == 1.25

        for clone in (
            dataclasses.replace(config),
            copy.deepcopy(config),
            TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1,
                              maxscore_capacity_factor=1.25, moe_router_type="maxscore"),
        ):  # fmt: skip
            assert clone.maxscore_capacity_factor == 1.25, clone
            assert dataclasses.asdict(clone)["moe_router_type"] == "maxscore"
        mla = MLATransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        assert mla.maxscore_scope == "local"
        messages = {}
        for flags in REFUSED:
            try:
                parse(
                    f"--moe-router-type maxscore {flags}".replace(
                        "--moe-router-type maxscore --moe-router-type", "--moe-router-type"
                    )
                )
            except ValueError as error:
                messages[flags] = str(error)

        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            parse("--help")
        for name in ("--moe-router-type {topk,maxscore}", "--maxscore-scope {", "--num-layers"):
            assert name in shown.getvalue(), name
        # The same without the router type: stock accepts what stock accepts.
        parse("--moe-router-load-balancing-type sinkhorn")
    finally:
        training.uninstall()
    assert not hasattr(TransformerConfig, "maxscore_scope")
    assert "maxscore_scope" not in {f.name for f in dataclasses.fields(TransformerConfig)}
    return messages


def config_is_shared(rank, size):
    """Return pre-softmax and hidden size of a layer's config, its router's, and copies of that.

    And the size of the z-loss's gradient, whose coefficient is set after the layer was built.
    """
    layer = make_layer(ep=size)
    config = layer.config
    assert isinstance(layer.router.config, type(config))
    view = layer.router.config
    copies = [copy.deepcopy(view), pickle.loads(pickle.dumps(view))]
    config.moe_z_loss_coeff = 1.0
    layer.train()
    probs, _ = layer.router(own_input(rank, 16))
    (probs.sum() * 0.0).backward()
    values = [(c.moe_router_pre_softmax, c.hidden_size) for c in (config, view, *copies)]
    return values[0], values[1], values[2:], float(layer.router.weight.grad.abs().sum())
