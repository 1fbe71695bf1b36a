"""Adapter for EleutherAI's lm-evaluation-harness (its model API, ``lm_eval`` 0.4.9 or newer).

``python -m megatron_maxscore harness`` is its command. Price routing chooses every token's experts
by that token alone. So sequences are scored in batches, padded on the right, and neither padding
nor neighbours change a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from megatron_maxscore.inference.decoding import sample
from megatron_maxscore.inference.restore import TrainedModel

# Of a continuation, where a task does not say.
MAX_NEW_TOKENS = 256


class MaxScoreLM(TemplateLM):
    """A restored checkpoint as the harness wants it.

    Args:
        trained: the model.
        batch_size: sequences scored at a time.
        max_length: tokens of context at most; None is what the model was trained with. Longer
            contexts lose their beginning.
    """

    def __init__(
        self, trained: TrainedModel, batch_size: int = 16, max_length: int | None = None
    ) -> None:
        super().__init__()
        # Neighbours in a batch must not compete for capacity: nothing is dropped here.
        trained.model.config.moe_expert_capacity_factor = None
        self.trained = trained
        self.batch_size = batch_size
        self.max_length = max_length or trained.args.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """The end of a document, which also stands before texts without a context."""
        return int(self.trained.tokenizer.eod)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the tokens of a text, without special ones."""
        return list(self.trained.tokenizer.tokenize(string))

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability and whether it is the greedy one."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        # Alike lengths together: little padding.
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        starts = range(0, len(order), self.batch_size)
        for start in tqdm(starts, desc="scoring", disable=disable_tqdm):
            batch = order[start : start + self.batch_size]
            for index, answer in zip(batch, self._score([pairs[i] for i in batch]), strict=True):
                found[index] = answer
        return found

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Score one batch."""
        inputs, targets = [], []
        for context, continuation in pairs:
            if not continuation:
                raise ValueError("a continuation has no tokens; the task asks for an empty answer")
            # The last token predicts nothing that is asked for.
            whole = (context + continuation)[-(self.max_length + 1) :]
            inputs.append(whole[:-1])
            targets.append(continuation[-(len(whole) - 1) :])
        longest = max(map(len, inputs))
        padded = [row + [self.eot_token_id] * (longest - len(row)) for row in inputs]
        logprobs_BSV = self.trained.logits(torch.tensor(padded)).cpu().log_softmax(-1)
        answers = []
        for row, (tokens, target) in enumerate(zip(inputs, targets, strict=True)):
            part_SV = logprobs_BSV[row, len(tokens) - len(target) : len(tokens)]
            wanted_S = torch.tensor(target)
            logprob = float(part_SV.gather(1, wanted_S[:, None]).double().sum())
            answers.append((logprob, bool((part_SV.argmax(1) == wanted_S).all())))
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of whole texts, in windows that do not overlap."""
        totals = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(x for x, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return continuations up to the first of the given texts, by default greedily."""
        answers = []
        for request in tqdm(requests, desc="generating", disable=disable_tqdm):
            context, wishes = request.args
            ends = wishes.get("until") or []
            ends = [ends] if isinstance(ends, str) else ends
            count = min(wishes.get("max_gen_toks", MAX_NEW_TOKENS), self.max_length - 1)
            prompt = (self.tok_encode(context) or [self.eot_token_id])[-(self.max_length - count) :]
            temperature = wishes.get("temperature", 0.0) if wishes.get("do_sample") else 0.0
            answers.append(self._generate(prompt, count, temperature, ends))
        return answers

    def _generate(self, prompt: list[int], count: int, temperature: float, ends: list[str]) -> str:
        tokens: list[int] = []
        text = ""
        for token in sample(self.trained, prompt, count, temperature):
            tokens.append(token)
            text = self.trained.tokenizer.detokenize(tokens)
            places = [place for end in ends if (place := text.find(end)) >= 0]
            if places:
                return text[: min(places)]
        return text
