"""A model that ``export`` has written, as transformers runs it, in place of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_maxscore.export.verify import gates_of, load_served
from megatron_maxscore.inference.restore import NotFiniteError


@dataclass(frozen=True)
class ServedModel:
    """A model of transformers and what evaluation asks of it.

    Attributes:
        model: a causal language model in evaluation mode.
        args: seq_length, micro_batch_size and moe_router_topk.
    """

    model: Any
    args: Any

    def logits(self, tokens_BS: Tensor) -> Tensor:
        """Return the (B, S, V) logits of whole sequences, in float32 at least.

        Raises:
            NotFiniteError: some are NaN or infinite.
        """
        with torch.no_grad():
            logits: Tensor = self.model(tokens_BS.to(self.model.device)).logits
        if not bool(torch.isfinite(logits).all()):
            raise NotFiniteError("the model's logits are NaN or infinite")
        return logits if logits.dtype == torch.float64 else logits.float()

    def routers(self) -> dict[int, Any]:
        """Return each layer's router, by the layer's number from 1."""
        return gates_of(self.model)

    def routed(self, output: Any) -> tuple[Tensor, float]:
        """Return the (E,) int64 loads and the sum of all gates of a router's call."""
        logits_TE, gates_TK, experts_TK = output
        loads_E = torch.bincount(experts_TK.flatten().cpu(), minlength=logits_TE.shape[-1])
        return loads_E, float(gates_TK.double().sum())


def check_no_arguments(directory: str | Path, given: list[str]) -> None:
    """Refuse arguments of Megatron's for an exported model, which would be ignored.

    Raises:
        ValueError: there are some; names them.
    """
    if given:
        raise ValueError(
            f"{directory} is an exported model, and takes no arguments of Megatron's; leave out "
            f"{' '.join(given)}"
        )


def open_served(directory: str | Path, batch_size: int = 8) -> ServedModel:
    """Load a Hugging Face directory in its own dtype.

    Args:
        directory: that ``export`` has written.
        batch_size: sequences that are evaluated at a time.

    Raises:
        ValueError: it holds no such model.
    """
    # Imports transformers, which is there only with an extra.
    from megatron_maxscore.export.convert import opened

    _, config = opened(Path(directory))
    model = load_served(directory)
    topk = model.config.num_experts_per_tok
    args = SimpleNamespace(
        seq_length=config["max_position_embeddings"],
        micro_batch_size=batch_size,
        moe_router_topk=topk,
    )
    return ServedModel(model.to("cuda" if torch.cuda.is_available() else "cpu"), args)
