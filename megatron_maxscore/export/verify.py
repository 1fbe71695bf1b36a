"""Compare a model of transformers with Megatron's: logits, and the experts of every token."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What an export compares: random tokens.
_SEQUENCES, _LENGTH = 4, 64
# By how much a logit may differ, in standard deviations of logits.
_TOLERANCE = 1e-3
# Float32 rounds differently in the two models, and errors grow with depth. Scores lie in [0, 1].
_TIE = 1e-4


@dataclass
class Agreement:
    """How two models agree.

    Attributes:
        logit: largest difference of a logit, over tokens that no tie has reached.
        spread: standard deviation of logits.
        other_experts: choices of experts that differ though there is no tie.
        ties: choices that differ where the k-th and the next score plus bias are nearly equal.
        decided: choices in all, one for each token and layer.
        biased: choices that would be others without the bias.
    """

    logit: float = 0.0
    spread: float = 0.0
    other_experts: int = 0
    ties: int = 0
    decided: int = 0
    biased: int = 0


def load_served(directory: str | Path, dtype: torch.dtype | str = "auto") -> Any:
    """Return the model of a directory, as transformers loads it on the CPU.

    Raises:
        ValueError: weights are missing or left over, or have other shapes.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    level = logging.getLogger("transformers").level
    transformers.utils.logging.set_verbosity_error()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=dtype, output_loading_info=True
        )
        model, report = loaded
    finally:
        transformers.utils.logging.set_verbosity(level or logging.WARNING)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            names = sorted(map(str, report[kind]))[:3]
            raise ValueError(f"{directory}: {kind.replace('_', ' ')}: {', '.join(names)}")
    return model.eval()


def gates_of(served: Any) -> dict[int, Any]:
    """Return the routers of a model of transformers, by the number of their layer from 1."""
    layers = enumerate(served.model.layers, start=1)
    return {number: layer.mlp.gate for number, layer in layers if hasattr(layer.mlp, "gate")}


def bias_of(gate: Any) -> Tensor:
    """Return the (E,) bias of one of transformers' routers; writing into it changes the router."""
    bias: Tensor = getattr(gate, "moe_statics", gate).e_score_correction_bias
    return bias.data.view(-1)


def compare(
    trained: Any,
    served: Any,
    tokens_BS: Tensor,
    score: Callable[[Tensor], Tensor],
    tie: float = _TIE,
) -> Agreement:
    """Run both models on the same tokens.

    A tie makes other experts legitimate, and changes what later tokens of the sequence see. So
    neither that token's logits are compared, nor those after it.

    Args:
        trained: :class:`megatron_maxscore.inference.TrainedModel`, or what has its methods.
        served: a model of transformers.
        tokens_BS: (B, S) int64.
        score: makes scores of (..., E) logits.
        tie: difference of scores up to which rounding decides.
    """
    batch, length = tokens_BS.shape
    ours: dict[int, Tensor] = {}
    theirs: dict[int, tuple[Tensor, ...]] = {}
    topk = served.config.num_experts_per_tok

    def keep_ours(layer: int) -> Any:
        def hook(router: Any, _: Any, output: Any) -> None:
            # Megatron's order is (S, B).
            ours[layer] = output[1].cpu().view(length, batch, -1).transpose(0, 1).flatten(0, 1)

        return hook

    def keep_theirs(layer: int) -> Any:
        def hook(gate: Any, _: Any, output: Any) -> None:
            scores_TE = score(output[0].float())
            biased_TE = scores_TE + bias_of(gate)
            best = biased_TE.topk(topk + 1, dim=-1).values
            maps = [
                torch.zeros_like(biased_TE, dtype=torch.bool).scatter_(1, experts_TK, True)
                for experts_TK in (output[2], scores_TE.topk(topk, dim=-1).indices)
            ]
            theirs[layer] = (*maps, best[:, -2] - best[:, -1])

        return hook

    hooks = [
        router.register_forward_hook(keep_ours(layer))
        for layer, router in trained.routers().items()
    ]
    hooks += [
        gate.register_forward_hook(keep_theirs(layer)) for layer, gate in gates_of(served).items()
    ]
    try:
        logits = trained.logits(tokens_BS).float().cpu()
        with torch.no_grad():
            served_logits = served(tokens_BS).logits.float()
    finally:
        for hook in hooks:
            hook.remove()
    # A model may have more rows than its tokenizer has tokens.
    served_logits = served_logits[..., : logits.shape[-1]]
    if logits.shape != served_logits.shape or ours.keys() != theirs.keys():
        raise ValueError(
            f"the served model has logits {tuple(served_logits.shape)} and routers in layers "
            f"{sorted(theirs)}, Megatron's {tuple(logits.shape)} and {sorted(ours)}"
        )
    result = Agreement(spread=float(logits.std()))
    is_reached = torch.zeros(batch, length, dtype=torch.bool)
    # Layer by layer: tokens that a tie has reached are not compared in the layers after it.
    for layer in sorted(ours):
        chosen, unbiased, gap = theirs[layer]
        differs = (ours[layer] != chosen).any(-1)
        is_near = gap <= tie
        is_witness = ~is_reached.flatten()
        result.other_experts += int((differs & ~is_near & is_witness).sum())
        result.ties += int((differs & is_near & is_witness).sum())
        result.biased += int((chosen != unbiased).any(-1).sum())
        result.decided += differs.numel()
        is_reached |= (differs & is_near).view(batch, length).cumsum(1) > 0
    if not bool(is_reached.all()):
        difference = (logits - served_logits).abs().amax(-1)
        result.logit = float(difference[~is_reached].max())
    return result


def verify(trained: Any, directory: Path, score: Callable[[Tensor], Tensor]) -> float:
    """Return by how much logits of random tokens differ, relative to their standard deviation.

    Both models compute in float32; Megatron's is in float32 afterwards.

    Args:
        trained: Megatron's model.
        directory: of the model of transformers.
        score: makes scores of logits.

    Raises:
        ValueError: they differ by more than rounding.
    """
    trained.widen(torch.float32)
    served = load_served(directory, torch.float32)
    length = min(_LENGTH, int(trained.args.max_position_embeddings))
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(served.config.vocab_size, int(trained.tokenizer.vocab_size))
    tokens_BS = torch.randint(vocabulary, (_SEQUENCES, length), generator=generator)
    found = compare(trained, served, tokens_BS, score)
    difference = found.logit / found.spread
    if found.other_experts or not difference <= _TOLERANCE:
        raise ValueError(
            "the two models are not the same: logits differ by up to "
            f"{difference:.1e} of their standard deviation, and {found.other_experts} of "
            f"{found.decided} choices of experts; this is a fault of the conversion"
        )
    return difference
