"""Compare a checkpoint with its exported model: logits, experts, greedy decoding.

    python tests/dist/agreement_probe.py CHECKPOINT SERVED DATA

Prints one JSON object. Experts of a token may differ where its k-th and next score plus bias are
equal up to rounding; logits of that token and of those after it in the sequence are not compared.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

from megatron_maxscore.commands.evaluate import sequences_of
from megatron_maxscore.inference import restore, sample

SEQUENCES, BATCH = 64, 8
PROMPTS, PROMPT, NEW = 4, 16, 64
# Scores lie between 0 and 1 and are computed in float32.
TIE = 1e-6
SCORES = {"glm4_moe": torch.sigmoid, "ernie4_5_moe": lambda logits: logits.softmax(-1)}


def bias_of(gate):
    """Return the bias of one of transformers' routers."""
    statics = getattr(gate, "moe_statics", gate)
    return statics.e_score_correction_bias.reshape(-1)


def compare(trained, served, sequences):
    """Return the largest difference of a logit, and how many tokens chose other experts."""
    ours, theirs = {}, {}
    score, topk = SCORES[served.config.model_type], served.config.num_experts_per_tok

    def hook_ours(layer):
        def keep(router, _, output):
            tokens, experts = output[1].shape
            batch = BATCH if tokens % BATCH == 0 else tokens
            ours[layer] = output[1].view(-1, batch, experts).transpose(0, 1)

        return keep

    def hook_theirs(layer):
        def keep(gate, _, output):
            scores = score(output[0]) + bias_of(gate)
            best = scores.topk(topk + 1, dim=-1).values
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, output[2], True)
            theirs[layer] = chosen, best[:, -2] - best[:, -1]

        return keep

    for layer, router in trained.routers().items():
        router.register_forward_hook(hook_ours(layer))
        gate = served.model.layers[layer - 1].mlp.gate
        gate.register_forward_hook(hook_theirs(layer))
    largest, other, ties, decided = 0.0, 0, 0, 0
    for tokens in sequences.split(BATCH):
        if len(tokens) < BATCH:
            break
        logits = trained.logits(tokens)
        with torch.no_grad():
            served_logits = served(tokens).logits
        is_tie = torch.zeros(tokens.shape, dtype=torch.bool)
        for layer, chosen in ours.items():
            same, gap = theirs[layer]
            differs = (chosen != same.view_as(chosen)).any(-1)
            is_near = (gap <= TIE).view_as(differs)
            # A token after a tie sees other keys, and is no witness either.
            other += int((differs & ~is_near & (is_tie.cumsum(1) == 0)).sum())
            is_tie |= differs & is_near
            ties += int((differs & is_near).sum())
            decided += differs.numel()
        compared = is_tie.cumsum(1) == 0
        largest = max(largest, float((logits - served_logits).abs().amax(-1)[compared].max()))
    return {
        "logit": largest, "other_experts": other, "ties": ties, "decided": decided,
        "spread": float(logits.std()),
    }  # fmt: skip


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
    result |= decoded(trained, served, sequences) | compare(trained, served, sequences)
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
