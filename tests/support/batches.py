"""Rows for a batcher, and what they get: the text of a token is its number and a point."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from handler.answers import TokenLogprob
from handler.engines.active_sequence import ActiveSequence
from handler.engines.detokenizer import Detokenizer
from handler.sampling import Sampling

GREEDY = Sampling(max_tokens=12, temperature=0.0)


@dataclass
class Receiver:
    """Keeps what it gets."""

    text: str = ""
    tokens: int = 0
    reason: str | None = None
    error: BaseException | None = None
    pieces: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def piece(self, text: str, tokens: int, finish_reason: str | None, logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        self.text += text
        self.logprobs += logprobs
        self.tokens += tokens
        self.pieces += 1
        if finish_reason:
            self.reason = finish_reason
            self.ended.set()

    def failed(self, error: BaseException) -> None:
        self.error = error
        self.ended.set()


def decode(tokens: Any) -> str:
    return "".join(f"{token}." for token in tokens)


def row(
    prompt: list[int], sampling: Sampling = GREEDY, *, every_token: bool = False
) -> tuple[ActiveSequence, Receiver]:
    receiver = Receiver()
    detokenizer = Detokenizer(decode, sampling.stop, at_the_end=not every_token)
    return ActiveSequence(prompt, sampling, detokenizer, receiver, every_token=every_token), receiver


def wait(*receivers: Receiver) -> None:
    for receiver in receivers:
        assert receiver.ended.wait(60)
