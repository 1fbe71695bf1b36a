"""Token by token with Megatron's key-value cache.

Shape letters: see :mod:`megatron_maxscore`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_maxscore.inference.restore import TrainedModel


class Decoder:
    """Feeds tokens to a model bit by bit and keeps what attention needs of them.

    Under price routing each token is routed on its own, so the logits are those of one pass over
    all tokens. With several ranks all of them feed the same tokens.

    Args:
        trained: the model.
        batch_size: B.
        max_length: tokens per sequence that fit.

    Raises:
        ValueError: the model is split into pipeline stages, or routes by the flow.
    """

    def __init__(self, trained: TrainedModel, batch_size: int, max_length: int) -> None:
        from megatron.core.inference.contexts import StaticInferenceContext

        trained.check_is_whole()
        self._check_rule(trained)
        self.trained = trained
        self.length = 0
        self.max_length = max_length
        self._context = StaticInferenceContext(
            max_batch_size=batch_size, max_sequence_length=max_length
        )

    def feed(self, tokens_BS: Tensor) -> Tensor:
        """Append tokens to all sequences.

        Args:
            tokens_BS: (B, S) int64; S > 1 at first only.

        Returns:
            (B, V) logits, in float32 at least, of what follows the last of them.

        Raises:
            ValueError: they do not fit, or are several after the first call; or the model routes by
                the flow now.
        """
        self._check_rule(self.trained)
        count = tokens_BS.shape[1]
        if self.length and count > 1:
            raise ValueError(
                f"{count} tokens at once, after {self.length}, would see each other; feed them one "
                "by one"
            )
        if self.length + count > self.max_length:
            raise ValueError(
                f"{self.length + count} tokens do not fit into {self.max_length}; build the "
                "Decoder with a larger max_length"
            )
        device = next(self.trained.model.parameters()).device
        tokens_BS = tokens_BS.to(device)
        positions_BS = torch.arange(self.length, self.length + count, device=device)
        with torch.no_grad():
            logits = self.trained.model(
                tokens_BS,
                positions_BS.expand_as(tokens_BS),
                None,
                inference_context=self._context,
                runtime_gather_output=True,
            )
        self._context.sequence_len_offset += count
        self.length += count
        return self.trained.wide(logits[:, -1])

    @staticmethod
    def _check_rule(trained: TrainedModel) -> None:
        from megatron_maxscore.moe.evaluation import NO_FLOW_WITH_CACHE, uses_flow
        from megatron_maxscore.moe.step import maxscore_routers

        if any(uses_flow(r.options.eval_routing) for r in maxscore_routers([trained.model])):
            raise ValueError(NO_FLOW_WITH_CACHE)


def sample(
    trained: TrainedModel,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield sampled tokens one by one, until the end of a document or ``max_new_tokens``.

    Args:
        trained: the model.
        prompt: tokens to continue, at least one.
        max_new_tokens: how many at most.
        temperature: of the softmax; 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that together have this probability, in (0, 1].
        generator: of the random numbers; CPU.

    Raises:
        ValueError: an argument is out of range.
    """
    if not prompt:
        raise ValueError("the prompt has no tokens; give at least one, such as the end of document")
    if temperature < 0.0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    decoder = Decoder(trained, 1, len(prompt) + max_new_tokens)
    given = torch.tensor([prompt])
    for _ in range(max_new_tokens):
        logits_V = decoder.feed(given)[0].cpu()
        token = _pick(logits_V, temperature, top_p, generator)
        if token == trained.tokenizer.eod:
            return
        yield token
        given = torch.tensor([[token]])


def _pick(
    logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> int:
    if temperature == 0.0:
        return int(logits_V.argmax())
    chances_V, tokens_V = (logits_V / temperature).softmax(0).sort(descending=True)
    # The token that crosses the threshold stays.
    chances_V[chances_V.cumsum(0) - chances_V >= top_p] = 0.0
    return int(tokens_V[torch.multinomial(chances_V, 1, generator=generator)])
