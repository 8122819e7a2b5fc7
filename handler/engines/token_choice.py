"""A step of `generate` for a batch: each row's own token is chosen, with its log probability, and handed to the row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from handler.engines.active_sequence import ActiveSequence
from handler.engines.generation_defaults import GenerationDefaults
from handler.engines.token_processors import processors_of
from handler.errors import invalid, not_a_number

JOIN_EVERY = 16  # tokens; joining sooner would pay the pass over the tokens so far too often
_IMPOSSIBLE = -9999.0


class TokenSampler(LogitsProcessor):  # type: ignore[misc]
    """Chooses each row's token in its own way: all others become impossible, so that a greedy `generate` takes it."""

    def __init__(
        self,
        rows: list[ActiveSequence],
        ends: Sequence[frozenset[int]],
        repeated: Sequence[Sequence[int]],
        defaults: GenerationDefaults,
        *,
        has_encoder: bool,
    ) -> None:
        """`ends`: the tokens that end each row. `repeated`: those that each row begins with once more. `has_encoder`:
        whether the prompts are in an encoder, and not before the tokens that are generated."""
        self._rows = rows
        self._alike: dict[tuple[float, float, int, float], list[int]] = {}
        self._processors: dict[int, list[LogitsProcessor]] = {}
        self._ends = ends
        self._repeated = repeated
        self._steps = 0
        self.logprobs: dict[int, Logprob] = {}  # of the tokens of the last step, by row, if they are asked for
        self._defaults = defaults
        self._has_encoder = has_encoder
        self._sampling = [defaults.completed(row.sampling) for row in rows]
        for number, sampling in enumerate(self._sampling):
            if sampling.temperature:
                alike = (sampling.temperature, sampling.min_p or 0.0, sampling.top_k or 0, sampling.top_p or 1.0)
                self._alike.setdefault(alike, []).append(number)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if torch.isnan(scores).any():  # else the choice, greedy or not, would be made of nothing
            raise not_a_number()
        repeated = {number: ids[self._steps] for number, ids in enumerate(self._repeated) if self._steps < len(ids)}
        self._steps += 1
        self.logprobs = {}
        with_logprobs = [
            number
            for number, row in enumerate(self._rows)
            if row.sampling.logprobs is not None and number not in repeated and not row.ended
        ]
        raw = scores[with_logprobs].clone() if with_logprobs else None
        if not self._processors:
            self._processors = self._build_processors(scores.device)
        for number, processors in self._processors.items():
            if processors and number not in repeated:
                # Of a decoder behind an encoder, also the token that it begins with. None of them is padded.
                row = [self._rows[number].tokens]
                so_far = input_ids[number : number + 1] if self._has_encoder else input_ids.new_tensor(row)
                for processor in processors:
                    scores[number : number + 1] = processor(so_far, scores[number : number + 1])
                if torch.isneginf(scores[number]).all():
                    raise invalid("no token is left to choose: ask for fewer min_tokens or stop_token_ids")
        for way, numbers in self._alike.items():
            self._choose([number for number in numbers if number not in repeated], way, input_ids, scores)
        for number, token in repeated.items():
            _make_certain(scores[number], token)
        if raw is not None:
            for place, number in enumerate(with_logprobs):
                token, most = int(scores[number].argmax()), self._rows[number].sampling.logprobs or 0
                (self.logprobs[number],) = logprobs_of([token], raw[place : place + 1], most)
        return scores

    def is_repeated(self, number: int) -> bool:
        """Whether the token of a row in the last step is one that it had before."""
        return self._steps <= len(self._repeated[number])

    def _choose(
        self, numbers: list[int], way: tuple[float, float, int, float], input_ids: torch.Tensor, scores: torch.Tensor
    ) -> None:
        """Choose the tokens of rows that are sampled in the same way: temperature, min_p, top_k and top_p."""
        for number in numbers:
            if (drawn := self._rows[number].drawn) is not None:  # in a step that has failed
                _make_certain(scores[number], drawn)
        numbers = [number for number in numbers if self._rows[number].drawn is None]
        if not numbers:
            return
        temperature, min_p, top_k, top_p = way
        some = TemperatureLogitsWarper(temperature)(input_ids, scores[numbers].float())
        if min_p:
            some = MinPLogitsWarper(min_p)(input_ids, some)
        if top_k:
            some = TopKLogitsWarper(min(top_k, some.shape[-1]))(input_ids, some)
        if top_p < 1.0:
            some = TopPLogitsWarper(top_p)(input_ids, some)
        odds = some.softmax(-1)
        if not torch.isfinite(odds).all():  # on a GPU multinomial would take the whole process with it
            raise not_a_number()
        for place, number in enumerate(numbers):
            row = self._rows[number]
            row.drawn = torch.multinomial(odds[place], 1, generator=row.generator(odds.device))
            _make_certain(scores[number], row.drawn)

    def _build_processors(self, device: torch.device) -> dict[int, list[LogitsProcessor]]:
        """The processors of each row."""
        return {
            number: processors_of(
                self._sampling[number],
                prompt_tokens=1 if self._has_encoder else row.prompt_tokens,
                ends=self._ends[number],
                suppressed_first=self._defaults.suppressed_first,
                device=device,
            )
            for number, row in enumerate(self._rows)
        }


def _make_certain(scores: torch.Tensor, token: int | torch.Tensor) -> None:
    """Make all tokens but one impossible; `scores` has the shape (vocabulary,)."""
    scores[:] = float("-inf")
    scores[token] = 0.0


Logprob = tuple[int, float, list[tuple[int, float]]]
"""A token, its log probability, and the most likely tokens with theirs."""


def logprobs_of(tokens: Sequence[int], logits: torch.Tensor, most: int) -> list[Logprob]:
    """The log probabilities of tokens, and of the `most` likely ones; `logits`: as the model gave them, shape
    (tokens, vocabulary). Raises JobError if they are not numbers."""
    odds = logits.float().log_softmax(-1)
    if torch.isnan(odds).any():
        raise not_a_number()
    chosen = odds.gather(1, torch.tensor(tokens, device=odds.device)[:, None])[:, 0].tolist()
    values, ids = (each.tolist() for each in odds.topk(min(most, odds.shape[-1])))
    return [
        (token, _finite(logprob), list(zip(top_ids, map(_finite, top_values), strict=True)))
        for token, logprob, top_ids, top_values in zip(tokens, chosen, ids, values, strict=True)
    ]


def _finite(logprob: float) -> float:
    """A log probability that JSON can hold: vLLM's number for an impossible token."""
    return max(logprob, _IMPOSSIBLE)


class EndOfRows(StoppingCriteria):  # type: ignore[misc]
    """Hands each row its tokens, and says which have ended: all of them, if a request waits to join, or if one reaches
    the end of the model's context."""

    def __init__(
        self,
        rows: list[ActiveSequence],
        ends: Sequence[frozenset[int]],
        sampler: TokenSampler,
        is_wanted: Callable[[], bool],
        context: int | None,
    ) -> None:
        """`ends`: the tokens that end each row. `sampler`: it has chosen the tokens. `context`: the most tokens that
        the model takes, prompt and answer together, if there is such a limit."""
        self._rows = rows
        self._lengths = [len(row.tokens) for row in rows]
        self._sampler = sampler
        self._context = context
        self._ends = ends
        self._wanted = is_wanted
        self._steps = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self._steps += 1
        for number, token in enumerate(input_ids[:, -1].tolist()):
            row = self._rows[number]
            if not row.ended and not self._sampler.is_repeated(number):
                try:
                    if (logprob := self._sampler.logprobs.get(number)) is not None:
                        row.tell(*logprob)
                    row.push(token, self._ends[number])
                except BaseException as error:  # a panic of the tokenizer, too: the other rows have their tokens
                    row.fail(error.with_traceback(None))
        ended = [row.ended for row in self._rows]
        beyond = self._context is not None and any(
            row.ended and length + self._steps >= self._context
            for row, length in zip(self._rows, self._lengths, strict=True)
        )
        if beyond or (self._steps >= JOIN_EVERY and self._wanted()):
            ended = [True for _row in self._rows]
        return torch.tensor(ended, device=input_ids.device)
