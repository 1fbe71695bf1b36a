"""Put MaxScore's router and dispatcher into Megatron's MoE layers.

Megatron builds MoE layers from many specs, and rebuilds some of them (multi-token prediction) from
its own functions. All of them end in ``MoELayer.__init__``, so only this function is wrapped. The
wrapper replaces the router class in the layer's submodules before the layer is built, and the
dispatcher afterwards. It changes no attribute of a module meanwhile, so layers can be built in
several threads.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
)

from megatron_maxscore._replacements import Replacements
from megatron_maxscore.moe.budgets import BudgetedFlexTokenDispatcher
from megatron_maxscore.moe.config import MaxScoreConfig
from megatron_maxscore.moe.dispatcher import MaxScoreTokenDispatcher
from megatron_maxscore.moe.router import MaxScoreRouter

_replacements = Replacements("MaxScore layer hook")


# Options for layers that are not configured for MaxScore, by config or by spec. None: such layers
# stay stock.
_everywhere: MaxScoreConfig | None = None


def install_layer_hook(everywhere: MaxScoreConfig | None = None) -> None:
    """Wrap ``MoELayer.__init__``; a second call at most changes the options.

    Layers whose config says ``moe_router_type == 'maxscore'``, or whose spec comes from
    :func:`with_maxscore`, are built with our router and dispatcher; all others as before.

    Args:
        everywhere: makes all layers ours, with these options.
    """
    global _everywhere
    _everywhere = everywhere or _everywhere
    if not _replacements:
        _replacements.wrap(MoELayer, "__init__", _choosing_router)


def remove_layer_hook() -> None:
    """Undo :func:`install_layer_hook`; layers that exist keep what they have."""
    global _everywhere
    _everywhere = None
    _replacements.undo()


def with_maxscore(spec: Any, options: MaxScoreConfig | None = None) -> Any:
    """Return a copy of a layer or block spec whose MoE parts are MaxScore's.

    Args:
        spec: any GPT layer spec, block spec or multi-token-prediction block spec, local or
            Transformer Engine.
        options: None reads the ``maxscore_*`` fields of the TransformerConfig, if it has them.

    Returns:
        A spec of the same type. The one given is left as it was.

    Raises:
        ValueError: the spec holds no MoE layer.
    """
    install_layer_hook()
    result = copy.deepcopy(spec)
    found = _moe_submodules(result, set())
    if not found:
        raise ValueError(
            "the spec holds no MoE layer to route; build it with num_experts (--num-experts) set"
        )
    for submodules in found:
        submodules.router = functools.partial(MaxScoreRouter, maxscore=options)
    return result


def _moe_submodules(part: Any, seen: set[int]) -> list[MoESubmodules]:
    """Find every MoESubmodules below a spec: through dataclasses, partials and containers."""
    if id(part) in seen or part is None or isinstance(part, (str, int, float, type)):
        return []
    seen.add(id(part))
    if isinstance(part, MoESubmodules):
        return [part]
    children: list[Any] = []
    if isinstance(part, functools.partial):
        children = [*part.args, *part.keywords.values()]
    elif isinstance(part, dict):
        children = list(part.values())
    elif isinstance(part, (list, tuple)):
        children = list(part)
    elif dataclasses.is_dataclass(part):
        children = [getattr(part, f.name, None) for f in dataclasses.fields(part)]
    return [found for child in children for found in _moe_submodules(child, seen)]


def _router_options(config: Any, router: Any) -> tuple[bool, MaxScoreConfig | None]:
    """Return whether a layer is ours, and the options its spec carries."""
    if getattr(router, "func", None) is MaxScoreRouter:
        return True, router.keywords.get("maxscore")
    if router is MaxScoreRouter:
        return True, None
    if router is not TopKRouter:
        return False, None
    if getattr(config, "moe_router_type", "topk") == "maxscore":
        return True, None
    return _everywhere is not None, _everywhere


def choose_router(config: Any, submodules: MoESubmodules) -> MoESubmodules:
    """Return a layer's submodules with our router, if the layer is ours; else as they are."""
    ours, options = _router_options(config, submodules.router)
    if not ours:
        return submodules
    router = functools.partial(MaxScoreRouter, maxscore=options)
    return dataclasses.replace(submodules, router=router)


def _is_hashed(config: Any, arguments: dict[str, Any]) -> bool:
    """Return whether a layer routes tokens by their ids (Megatron's branch dev), and stays stock.

    Args:
        config: TransformerConfig.
        arguments: that ``MoELayer`` is built with.
    """
    layers, number = getattr(config, "moe_n_hash_layers", 0), arguments.get("layer_number")
    is_among = number is not None and number <= layers
    return is_among and not arguments.get("is_mtp_layer", False)


def choose_dispatcher(layer: Any, pg_collection: Any) -> None:
    """Give a layer with our router our dispatcher, in place of Megatron's all-to-all one.

    A flex dispatcher with HybridEP and a budget of rows is replaced by one that ignores the budget
    in evaluation.

    Args:
        layer: a MoELayer whose dispatcher is built.
        pg_collection: the process groups that it was built with, None for Megatron's default ones.
    """
    stock = layer.token_dispatcher
    if not isinstance(layer.router, MaxScoreRouter):
        return
    build: Any
    if type(stock) is MoEAlltoAllTokenDispatcher:
        build = MaxScoreTokenDispatcher
    elif type(stock) is MoEFlexTokenDispatcher and _has_budget(layer.config):
        build = functools.partial(
            BudgetedFlexTokenDispatcher, is_training=lambda: bool(layer.training)
        )
    else:
        return
    layer.token_dispatcher = build(
        layer.num_local_experts,
        layer.local_expert_indices,
        config=layer.config,
        pg_collection=get_default_pg_collection() if pg_collection is None else pg_collection,
    )
    if stock.shared_experts is not None:
        layer.token_dispatcher.set_shared_experts(stock.shared_experts)


def _has_budget(config: Any) -> bool:
    # From megatron-core 0.18.
    factor = getattr(config, "moe_expert_rank_capacity_factor", None)
    return factor is not None and config.moe_flex_dispatcher_backend == "hybridep"


def _choosing_router(original: Any) -> Any:
    signature = inspect.signature(original)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        call = signature.bind(self, *args, **kwargs)
        submodules = call.arguments.get("submodules")
        config = call.arguments["config"]
        if submodules is not None:
            submodules = choose_router(config, submodules)
            if _is_hashed(config, call.arguments):
                submodules = dataclasses.replace(submodules, router=TopKRouter)
            call.arguments["submodules"] = submodules
        original(*call.args, **call.kwargs)
        choose_dispatcher(self, call.arguments.get("pg_collection"))

    return init
