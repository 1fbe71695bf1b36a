"""The model card of an exported model."""

from __future__ import annotations

from typing import Any

from megatron_maxscore import __version__
from megatron_maxscore.export.formats import Format

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, maxscore]
---

# A mixture of experts trained with MaxScore routing

{parameters:,} parameters, {layers} layers, {experts} experts per layer of which each token
takes {topk}. The weights are those of iteration {iteration}. They are stored as {title}
(`{architecture}`), by megatron-maxscore {version}.

## Routing

In training the experts of a batch were chosen by a minimum-cost maximum-flow: every token got
exactly {topk} experts, and no expert more than its share (Dong et al., *MaxScore*,
https://arxiv.org/abs/2508.12801). The flow's prices, averaged over training, are in this model as
`e_score_correction_bias`: the largest price minus each. A served token takes the {topk} experts
with the largest {function} score plus bias. Their gates are made of the scores alone. So a token's
experts depend on this token only, and loads are nearly even, not exactly.

Keep the bias, and the router's arithmetic, in float32: the differences between experts that it
decides are smaller than the resolution of bfloat16.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

Tokenizer: {tokenizer}.
{notes}"""


def card(args: Any, format_: Format, parameters: int, tokenizer: str, notes: list[str]) -> str:
    """Return the text of README.md."""
    return _CARD.format(
        parameters=parameters,
        layers=args.num_layers,
        experts=args.num_experts,
        topk=args.moe_router_topk,
        title=format_.title,
        architecture=format_.architecture,
        version=__version__,
        iteration=args.iteration,
        function=args.moe_router_score_function,
        tokenizer=tokenizer,
        notes="".join(f"\n- {note}" for note in notes) + "\n" if notes else "",
    )


def notes_on(args: Any, format_: Format) -> list[str]:
    """Return what differs between training and serving, besides the flow."""
    notes = []
    if getattr(args, "mtp_num_layers", None):
        notes.append(
            "The layers that predict further tokens (multi-token prediction) are left out."
        )
    is_half = args.params_dtype.itemsize == 2
    if is_half and getattr(args, "moe_router_dtype", None) != "fp32":
        notes.append(
            "Training computed the router's scores in half precision. Served models compute them "
            "in float32, so some tokens choose another expert. Train with --moe-router-dtype fp32."
        )
    if format_.needs_shared_expert and not getattr(
        args, "moe_shared_expert_intermediate_size", None
    ):
        notes.append(
            "The model was trained without a shared expert. This architecture always has one: it "
            "is stored with weights of zero."
        )
    return notes
