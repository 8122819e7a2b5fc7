"""The processors of logits that one row of a batch has of its own, in vLLM's order: transformers' own, and the two
penalties that it does not have."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from transformers import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
)

from handler.sampling import Sampling


def processors_of(
    sampling: Sampling,
    *,
    prompt_tokens: int,
    ends: Collection[int],
    suppressed_first: Sequence[int],
    device: torch.device,
) -> list[LogitsProcessor]:
    """The processors of a row, each to be called with its own tokens, shape (1, n), and its logits, shape
    (1, vocabulary).

    `ends`: the tokens that end its text. `suppressed_first`: those that it does not begin with.
    """
    processors: list[LogitsProcessor] = []
    if suppressed_first:
        processors.append(SuppressTokensAtBeginLogitsProcessor(list(suppressed_first), prompt_tokens, device=device))
    if sampling.min_tokens and ends:
        processors.append(
            MinNewTokensLengthLogitsProcessor(prompt_tokens, sampling.min_tokens, sorted(ends), device=device)
        )
    if sampling.logit_bias:
        processors.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in sampling.logit_bias]))
    if sampling.repetition_penalty not in (None, 1.0):
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.presence_penalty or sampling.frequency_penalty:
        processors.append(
            OccurrencePenaltyLogitsProcessor(prompt_tokens, sampling.presence_penalty, sampling.frequency_penalty)
        )
    return processors


class OccurrencePenaltyLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """Makes tokens that were generated already less likely: `presence` once, `frequency` for each time, as OpenAI
    defines them. The prompt does not count."""

    def __init__(self, prompt_tokens: int, presence: float, frequency: float) -> None:
        self._prompt_tokens = prompt_tokens
        self._presence = presence
        self._frequency = frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        generated = input_ids[:, self._prompt_tokens :]
        counts = torch.zeros_like(scores).scatter_add_(1, generated, torch.ones_like(generated, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)
