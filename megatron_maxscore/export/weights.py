"""Weights of Megatron's model under a format's names, and back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_maxscore.export.formats import (
    Format,
    Weight,
    expert_size,
    head_size,
    query_groups,
    routed_layers,
)

OUTPUT, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# What is no weight, and layers that predict further tokens, which a served model does without.
_IGNORED = re.compile(r"(^|\.)mtp\.|_extra_state$|\.rotary_pos_emb\.")


@dataclass(frozen=True)
class Shapes:
    """Sizes that weights are cut by.

    Attributes:
        groups: heads with keys.
        channels: of a head.
        rotary: channels of a head that are rotated.
        vocabulary: rows that stand for tokens.
        swap: whether rotary channels change their order: Megatron rotates halves of a head, the
            format neighbours.
    """

    groups: int
    channels: int
    rotary: int
    vocabulary: int
    swap: bool

    @classmethod
    def of(cls, args: Any, format_: Format, vocabulary: int) -> Shapes:
        """Return the sizes of a model."""
        channels = head_size(args)
        return cls(
            groups=query_groups(args),
            channels=channels,
            rotary=int(channels * args.rotary_percent),
            vocabulary=vocabulary,
            swap=format_.is_rotary_interleaved != bool(args.rotary_interleaved),
        )

    def order(self) -> Tensor:
        """Return which of Megatron's channels of a head each exported channel is."""
        order = torch.arange(self.channels)
        if self.swap:
            order[: self.rotary] = torch.arange(self.rotary).view(2, -1).T.reshape(-1)
        return order


def exported(
    state: Mapping[str, Tensor], format_: Format, args: Any, vocabulary: int
) -> dict[str, Tensor]:
    """Return a model's weights under the format's names, cut as the format has them.

    Args:
        state: Megatron's model of one rank, from :func:`state_of`.
        format_: the format.
        args: Megatron's arguments.
        vocabulary: tokens.

    Raises:
        ValueError: a weight has no place in the format; names it.
    """
    shapes = Shapes.of(args, format_, vocabulary)
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        weight, places = _place_of(name, format_)
        parts = _cut(weight.kind, tensor, shapes, format_)
        for theirs, part in zip(weight.theirs, parts, strict=True):
            result[theirs.format(**places)] = part
    for name, shape in _absent_shared_experts(format_, args):
        result[name] = torch.zeros(shape, dtype=args.params_dtype)
    if not format_.config(args)["tie_word_embeddings"]:
        result.setdefault(OUTPUT, result[EMBEDDING])
    return result


def imported(
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    format_: Format,
    args: Any,
    vocabulary: int,
) -> dict[str, Tensor]:
    """Return an exported model's weights under Megatron's names; the inverse of :func:`exported`.

    Args:
        tensors: by the format's names.
        wanted: of Megatron's model, as :func:`state_of` names them; gives shapes and dtypes.
        format_: the format.
        args: Megatron's arguments.
        vocabulary: tokens.

    Raises:
        ValueError: a weight is missing, left over, or has another shape; names it.
    """
    shapes = Shapes.of(args, format_, vocabulary)
    left = dict(tensors)
    result = {}
    for name, like in wanted.items():
        weight, places = _place_of(name, format_)
        names = [theirs.format(**places) for theirs in weight.theirs]
        missing = [theirs for theirs in names if theirs not in left]
        if missing:
            raise ValueError(f"the model has no weight {missing[0]}, which {name} is made of")
        whole = _joined(weight.kind, [left.pop(theirs) for theirs in names], shapes)
        if weight.kind == "vocabulary" and len(whole) < len(like):
            padded = torch.zeros_like(like, device=whole.device, dtype=whole.dtype)
            padded[: len(whole)] = whole
            whole = padded
        if whole.shape != like.shape:
            raise ValueError(f"{names[0]} makes {name} {tuple(whole.shape)}, not {like.shape}")
        result[name] = whole.to(like.dtype)
    if left:
        raise ValueError(f"Megatron's model has no place for {', '.join(sorted(left)[:3])}")
    return result


def state_of(model: Any) -> dict[str, Tensor]:
    """Return the weights of a model of one rank, and every router's bias under one name.

    Args:
        model: GPTModel, in CPU mode or not, without Transformer Engine's layers.
    """
    state = {
        name: tensor.detach()
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and not _IGNORED.search(name)
    }
    for name, router in routers_of(model):
        for key in [key for key in state if key.startswith(f"{name}.") and "weight" not in key]:
            del state[key]
        state[f"{name}.bias"] = bias_of(router)
    return state


def load_state(model: Any, state: Mapping[str, Tensor]) -> None:
    """Put weights into a model with MaxScore's routers; the inverse of :func:`state_of`."""
    own = dict(model.state_dict())
    routers = dict(routers_of(model))
    with torch.no_grad():
        for name, tensor in state.items():
            prefix, _, last = name.rpartition(".")
            if prefix in routers and last == "bias":
                routers[prefix].set_prices(-tensor.to(routers[prefix].weight.device))
            else:
                own[name].copy_(tensor)


def routers_of(model: Any) -> Iterator[tuple[str, Any]]:
    """Return the routers of the decoder's layers, with their names."""
    from megatron.core.transformer.moe.router import Router

    for name, module in model.named_modules():
        if isinstance(module, Router) and not _IGNORED.search(name):
            yield name, module


def bias_of(router: Any) -> Tensor:
    """Return the (E,) float32 bias that a router adds to its scores when it chooses."""
    if getattr(router, "expert_bias", None) is not None:
        bias_E: Tensor = router.expert_bias.detach().float()
        return bias_E
    prices_E = getattr(router, "expert_prices", None)
    if prices_E is None:
        return torch.zeros(router.weight.shape[0])
    # As an expert bias is kept, no value below 0.
    return (prices_E.max() - prices_E).detach().float()


def _place_of(name: str, format_: Format) -> tuple[Weight, dict[str, str]]:
    for weight in format_.weights:
        pattern = re.escape(weight.ours).replace(r"\{layer\}", r"(?P<layer>\d+)")
        pattern = pattern.replace(r"\{expert\}", r"(?P<expert>\d+)")
        if match := re.fullmatch(pattern, name):
            return weight, match.groupdict()
    raise ValueError(f"{format_.title} has no place for the weight {name}")


def _cut(kind: str, tensor: Tensor, shapes: Shapes, format_: Format) -> list[Tensor]:
    if kind == "vocabulary":
        return [tensor[: shapes.vocabulary]]
    if kind == "halves":
        return list(tensor.chunk(2))
    if kind == "bias":
        return [tensor.float().reshape(format_.router_bias)]
    if kind == "qkv":
        grouped = tensor.view(shapes.groups, -1, shapes.channels, *tensor.shape[1:])
        queries = grouped.shape[1] - 2
        parts = grouped.split([queries, 1, 1], dim=1)
        order = shapes.order().to(tensor.device)
        turned = [parts[0].index_select(2, order), parts[1].index_select(2, order), parts[2]]
        return [part.reshape(-1, *tensor.shape[1:]) for part in turned]
    return [tensor]


def _joined(kind: str, parts: list[Tensor], shapes: Shapes) -> Tensor:
    if kind == "halves":
        return torch.cat(parts)
    if kind == "bias":
        return parts[0].reshape(-1)
    if kind == "qkv":
        rest = parts[0].shape[1:]
        back = shapes.order().argsort().to(parts[0].device)
        grouped = [part.view(shapes.groups, -1, shapes.channels, *rest) for part in parts]
        turned = [grouped[0].index_select(2, back), grouped[1].index_select(2, back), grouped[2]]
        return torch.cat(turned, dim=1).reshape(-1, *rest)
    return parts[0]


def _absent_shared_experts(format_: Format, args: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    """Return names and shapes of shared experts that the format has and the model has not."""
    has_one = getattr(args, "moe_shared_expert_intermediate_size", None)
    if has_one or not format_.needs_shared_expert:
        return
    size, hidden = expert_size(args), args.hidden_size
    for layer in (i for i, is_routed in enumerate(routed_layers(args)) if is_routed):
        prefix = f"model.layers.{layer}.mlp.shared_experts"
        for name in ("gate_proj", "up_proj"):
            yield f"{prefix}.{name}.weight", (size, hidden)
        yield f"{prefix}.down_proj.weight", (hidden, size)


def simplest(
    tensors: dict[str, Tensor], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return weights and config.json without what Megatron's model need not have.

    It need not have layers that predict further tokens, shared experts of zeros, or an output layer
    that equals the embedding.
    """
    layers = config["num_hidden_layers"]

    def is_own(name: str) -> bool:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        return not name.startswith("model.mtp_") and (layer is None or int(layer[1]) < layers)

    kept = {name: tensor for name, tensor in tensors.items() if is_own(name)}
    changed = {}
    shared = {name for name in kept if ".mlp.shared_experts." in name}
    if shared and not any(bool(kept[name].any()) for name in shared):
        kept = {name: tensor for name, tensor in kept.items() if name not in shared}
        changed["n_shared_experts"] = 0
    if OUTPUT in kept:
        is_tied = config["tie_word_embeddings"] or torch.equal(kept[OUTPUT], kept[EMBEDDING])
        changed["tie_word_embeddings"] = is_tied
        if is_tied:
            del kept[OUTPUT]
    return kept, config | changed
