"""Compare a checkpoint with its exported model: logits, experts, greedy decoding, faults.

    python tests/dist/agreement_probe.py CHECKPOINT SERVED DATA

Prints one JSON object. Experts of a token may differ where its k-th and next score plus bias are
equal up to rounding.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

from megatron_maxscore.commands.evaluate import sequences_of
from megatron_maxscore.export import FORMATS
from megatron_maxscore.export.verify import bias_of, compare, gates_of
from megatron_maxscore.inference import restore, sample

SEQUENCES, BATCH = 64, 8
PROMPTS, PROMPT, NEW = 4, 16, 64
# Scores lie between 0 and 1 and are computed in float32.
TIE = 1e-6


def agreement(trained, served, sequences):
    """Return sums over the batches."""
    score = FORMATS[served.config.model_type].score
    found = {"logit": 0.0, "other_experts": 0, "ties": 0, "decided": 0, "biased": 0}
    for tokens in sequences.split(BATCH):
        one = vars(compare(trained, served, tokens, score, TIE))
        found["spread"] = one.pop("spread")
        logit = max(found["logit"], one.pop("logit"))
        found |= {name: found[name] + count for name, count in one.items()} | {"logit": logit}
    return found


def faults(trained, served, sequences):
    """Return what the comparison finds of models that were changed, by the change."""

    def negate():
        for gate in gates_of(served).values():
            bias_of(gate).mul_(-1.0)

    def swap():
        experts = served.model.layers[-1].mlp.experts
        experts.gate_up_proj.data = experts.gate_up_proj.data.roll(experts.intermediate_dim, 1)

    found = {}
    for change in (negate, swap):
        change()
        one = agreement(trained, served, sequences[:BATCH])
        change()
        found[change.__name__] = one["other_experts"] + (one["logit"] > 1e-3)
    return found


def decoded(trained, served, sequences):
    """Return how many of the greedy continuations are the same."""
    same = 0
    for tokens in sequences[:PROMPTS, :PROMPT]:
        new = min(NEW, trained.args.seq_length - PROMPT)
        ours = list(sample(trained, tokens.tolist(), new, temperature=0.0))
        theirs = served.generate(
            tokens[None], attention_mask=torch.ones_like(tokens)[None], do_sample=False,
            max_new_tokens=new,
        )[0, PROMPT:].tolist()  # fmt: skip
        if theirs and theirs[-1] == trained.tokenizer.eod:
            theirs = theirs[:-1]
        same += ours == theirs
    return {"greedy": same, "prompts": PROMPTS, "new": new}


def main():
    """Compare and print."""
    checkpoint, directory, data = sys.argv[1:]
    trained = restore(checkpoint)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    served = AutoModelForCausalLM.from_pretrained(directory)
    sequences = sequences_of(data, trained.args.seq_length)[:SEQUENCES, :-1]
    result = {"sequences": len(sequences), "length": sequences.shape[1]}
    result |= decoded(trained, served, sequences) | agreement(trained, served, sequences)
    result["faults"] = faults(trained, served, sequences)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = [trained.tokenizer.detokenize(row.tolist()) for row in sequences]
    result["tokenized"] = sum(
        tokenizer.encode(text, add_special_tokens=False) == list(trained.tokenizer.tokenize(text))
        for text in texts
    )
    dist.destroy_process_group()
    print("AGREEMENT", json.dumps(result))


if __name__ == "__main__":
    main()
