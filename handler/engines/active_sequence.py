"""A prompt of a batch with what is generated for it: its tokens, its text as it comes, and its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from handler.answers import TokenLogprob
from handler.engines.detokenizer import Detokenizer
from handler.sampling import Sampling

_SEND_EVERY = 32  # tokens
_INCOMPLETE = "\ufffd"  # the text of the first tokens of a character
_CHARACTER_TOKENS = 4


class Receiver(Protocol):
    """Gets the generated text of a row; called from the batcher's thread, and must not raise."""

    def piece(self, text: str, tokens: int, finish_reason: str | None, logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        """More text, how many tokens it stands for, why it ended, and the tokens' log probabilities if wanted."""

    def failed(self, error: BaseException) -> None:
        """There will be no more."""


class ActiveSequence:
    """One prompt of a batch, and the tokens that are generated for it."""

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        detokenizer: Detokenizer,
        receiver: Receiver,
        *,
        every_token: bool,
        ends: frozenset[int] = frozenset(),
        beginning: str = "",
        scores_prompt: bool = False,
        text_of: Callable[[int, Sequence[int]], str] = lambda token, _before: str(token),
        adapter: str | None = None,
    ) -> None:
        """Without `every_token` the receiver gets a piece now and then, for its progress alone. `ends`: tokens that end
        the text besides the model's own. `beginning`: the prompt, if the text repeats it. `scores_prompt`: whether
        the log probabilities of its tokens are told too.
        `text_of`: a token's text behind the first tokens of a character, for log probabilities. `adapter`: the name of
        the one that it is generated with."""
        self.adapter = adapter
        self.adapter_key = ""
        self.tokens = list(prompt)
        self.prompt_tokens = len(self.tokens)
        self.sampling = sampling
        self.tokens_left = sampling.max_tokens
        self.scores_prompt = scores_prompt
        self.ended_at: float | None = None
        self.alone = False
        self.drawn: torch.Tensor | None = None  # the next token, if it is chosen and not pushed yet
        self._detokenizer = detokenizer
        self._receiver = receiver
        self._every_token = every_token
        self._own_ends = ends
        self._text_of = text_of
        self._text = beginning
        self._unsent_tokens = 0
        self._logprobs: list[TokenLogprob] = []
        self._partial: list[int] = []  # the first tokens of a character
        self._generator: torch.Generator | None = None

    @property
    def prompt(self) -> list[int]:
        return self.tokens[: self.prompt_tokens]

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_tokens :]

    @property
    def ended(self) -> bool:
        """Whether nothing more will be generated."""
        return self.ended_at is not None

    def generator(self, device: torch.device) -> torch.Generator:
        """The row's own random numbers: its text does not depend on the other rows of the batch."""
        if self._generator is None:
            self._generator = torch.Generator(device)
            if self.sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.sampling.seed)
        return self._generator

    def ends(self, of_model: frozenset[int]) -> frozenset[int]:
        """The tokens that end the row; `of_model`: the model's own."""
        return self._own_ends if self.sampling.ignore_eos else self._own_ends | of_model

    def tell(self, token: int, logprob: float | None, top: Iterable[tuple[int, float]]) -> None:
        """Note a token's log probability, and the alternatives."""
        alternatives = tuple((self._text_of(other, self._partial), value) for other, value in top)
        text = self._text_of(token, self._partial)
        self._partial.append(token)
        if text.endswith(_INCOMPLETE) and len(self._partial) < _CHARACTER_TOKENS:
            text = ""  # the last token of a character has all of its text
        else:
            self._partial.clear()
        self._logprobs.append(TokenLogprob(text, logprob, alternatives))

    def push(self, token: int, ends: frozenset[int]) -> None:
        """Take one more token."""
        self.drawn = None
        self.tokens.append(token)
        self.tokens_left -= 1
        self._unsent_tokens += 1
        if token not in ends or not (self.sampling.skip_special_tokens or token in self._own_ends):
            self._text += self._detokenizer.push(token)  # the model's own end is a special token like others
        if token in ends or self._detokenizer.stopped:
            self.end("stop")
        elif not self.tokens_left:
            self.end("length")
        elif self._unsent_tokens >= _SEND_EVERY or (self._every_token and self._text):
            self._send_piece(None)

    def end(self, reason: str) -> None:
        """Nothing more is generated: hand out the rest of the text."""
        self._text += self._detokenizer.finish()
        self.ended_at = time.monotonic()
        self._send_piece(reason)

    def cancel(self) -> None:
        """The rest is not needed any more."""
        self.ended_at = self.ended_at or time.monotonic()

    def fail(self, error: BaseException) -> None:
        """Nothing more can be generated."""
        if not self.ended:
            self.ended_at = time.monotonic()
            self._receiver.failed(error)

    def _send_piece(self, reason: str | None) -> None:
        text, tokens, logprobs = self._text, self._unsent_tokens, tuple(self._logprobs)
        self._text, self._unsent_tokens, self._logprobs = "", 0, []
        self._receiver.piece(text, tokens, reason, logprobs)
