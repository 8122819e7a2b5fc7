"""Many prompts through one model at once: a dynamic batcher over transformers' own `generate`.

One thread owns the model. A waiting request joins the running batch: that is stopped every few tokens for it, and goes
on with both, each row with its own way to choose tokens, its own random numbers and its own end. The cost of such a
stop is one forward pass over the tokens so far. `generate` brings caches, positions and masks of every architecture
that transformers knows; its own continuous batching has neither seeds nor repetition penalties for each request (5.23).
"""

from __future__ import annotations

import copy
import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from handler.engines.detokenizer import Detokenizer
from handler.engines.generation_defaults import GenerationDefaults, generation_defaults
from handler.errors import Code, JobError, is_gpu_lost, is_out_of_memory
from handler.jobs import Sampling

JOIN_EVERY = 16  # tokens; joining sooner would pay the pass over the tokens so far too often
_SAY_EVERY = 32
_STUCK_S = 120.0  # for a step of the model after all its rows have ended
_DEFAULT_TOP_K = 50  # transformers' own, if neither the job nor the model names one

logger = logging.getLogger(__name__)


class Receiver(Protocol):
    """Gets the generated text of a row; called from the batcher's thread, and must not raise."""

    def piece(self, text: str, tokens: int, finish_reason: str | None) -> None:
        """More text, how many tokens it stands for, and why it ended."""

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
    ) -> None:
        """Without `every_token` the receiver gets a piece now and then, for its progress alone."""
        self.tokens = list(prompt)
        self.sampling = sampling
        self.left = sampling.max_tokens
        self.ended_at: float | None = None
        self.alone = False
        self._detokenizer = detokenizer
        self._receiver = receiver
        self._every_token = every_token
        self._text = ""
        self._unsaid = 0
        self._generator: torch.Generator | None = None

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

    def push(self, token: int, ends: frozenset[int]) -> None:
        """Take one more token."""
        self.tokens.append(token)
        self.left -= 1
        self._unsaid += 1
        if token not in ends:
            self._text += self._detokenizer.push(token)
        if token in ends or self._detokenizer.stopped:
            self._end("stop")
        elif not self.left:
            self._end("length")
        elif self._unsaid >= _SAY_EVERY or (self._every_token and self._text):
            self._say(None)

    def cancel(self) -> None:
        """The rest is not needed any more."""
        self.ended_at = self.ended_at or time.monotonic()

    def fail(self, error: BaseException) -> None:
        """Nothing more can be generated."""
        if not self.ended:
            self.ended_at = time.monotonic()
            self._receiver.failed(error)

    def _end(self, reason: str) -> None:
        self._text += self._detokenizer.finish()
        self.ended_at = time.monotonic()
        self._say(reason)

    def _say(self, reason: str | None) -> None:
        text, tokens = self._text, self._unsaid
        self._text, self._unsaid = "", 0
        self._receiver.piece(text, tokens, reason)


class Batcher:
    """Generates for all rows that were submitted, `limit` at once. Call `close` at the end."""

    def __init__(self, model: PreTrainedModel, *, limit: int, pad_token_id: int | None) -> None:
        self._model = model
        self._most = self._room = limit
        vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or 1 << 60
        own_defaults = model.generation_config
        self._defaults = generation_defaults(own_defaults, vocabulary=vocabulary, pad_token_id=pad_token_id)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._context = context if isinstance(context, int) and context > 0 else 1 << 60
        self._waiting: deque[ActiveSequence] = deque()
        self._running: list[ActiveSequence] = []
        self._changed = threading.Condition()
        self._closed = False
        self._broken = ""
        self._generating: list[ActiveSequence] = []
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)
        self._thread.start()

    @property
    def broken(self) -> str:
        """Why the model cannot generate any more in this process; empty if it can."""
        ended_at = [row.ended_at for row in self._generating]
        if not self._broken and ended_at and None not in ended_at:
            since_s = time.monotonic() - max(at for at in ended_at if at is not None)
            return f"a step of the model has not ended for {since_s:.0f} s" if since_s > _STUCK_S else ""
        return self._broken

    def submit(self, rows: Sequence[ActiveSequence]) -> None:
        """Generate for these, beside each other if there is room."""
        with self._changed:
            self._waiting.extend(rows)
            self._changed.notify_all()
        if not self._thread.is_alive():
            self._fail_all(RuntimeError(self._broken or "the engine has ended"))

    def close(self) -> None:
        """Return when all that was submitted has ended."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while (rows := self._next()) is not None:
                failed: BaseException | None = None
                self._generating = rows
                try:
                    self._generate(rows)
                except BaseException as error:  # a panic of the tokenizer too: the other rows go on
                    failed = error.with_traceback(None)  # whose frames hold the batch's tensors
                self._generating = []
                if failed is not None:
                    self._after_failure(rows, failed)
                    free_memory()
        except BaseException as error:  # a fault of ours: no job waits for a thread that is gone
            logger.exception("the batcher's thread ends")
            self._broken = f"the batcher has failed: {type(error).__name__}"
            self._fail_all(error)

    def _fail_all(self, error: BaseException) -> None:
        with self._changed:
            rows = [*self._running, *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for row in rows:
            row.fail(error)

    def _next(self) -> list[ActiveSequence] | None:
        """The rows to go on with; None when there will be none."""
        with self._changed:
            while True:
                self._running = [row for row in self._running if not row.ended]
                while self._waiting and len(self._running) < self._room:
                    row = self._waiting.popleft()
                    if not row.ended:
                        self._running.append(row)
                if self._running:
                    # The rows of a batch that failed go one by one: only a row that fails alone is to blame.
                    return [row for row in self._running if row.alone][:1] or self._running
                self._room = self._most
                if self._closed:
                    return None
                self._changed.wait()

    def _wanted(self) -> bool:
        """Whether a request waits that could join. An encoder's state cannot be extended, only computed again."""
        return (
            not self._model.config.is_encoder_decoder
            and bool(self._waiting)
            and (sum(not row.ended for row in self._running) < self._room)
        )

    def _generate(self, rows: list[ActiveSequence]) -> None:
        """Generate until all have ended, or a request joins."""
        width = max(len(row.tokens) for row in rows)
        tokens = torch.full((len(rows), width), self._defaults.config.pad_token_id)
        mask = torch.zeros_like(tokens)
        for number, row in enumerate(rows):
            tokens[number, width - len(row.tokens) :] = torch.tensor(row.tokens)
            mask[number, width - len(row.tokens) :] = 1
        config = copy.copy(self._defaults.config)
        config.max_new_tokens = max(row.left for row in rows)
        device = self._model.device
        ends = self._defaults.ends
        with torch.inference_mode(), _generation_config(self._model, self._defaults.config):
            self._model.generate(
                tokens.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=LogitsProcessorList([_TokenSampler(rows, self._defaults)]),
                stopping_criteria=StoppingCriteriaList([_StopTracker(rows, ends, self._wanted, self._context)]),
            )

    def _after_failure(self, rows: list[ActiveSequence], error: BaseException) -> None:
        if is_gpu_lost(error):
            self._broken = f"the GPU does not answer any more ({str(error)[:200]})"
            with self._changed:
                rows = [*self._running, *self._waiting]
                self._waiting.clear()
        if len(rows) == 1 or self._broken:
            for row in rows:
                row.fail(error)
        elif is_out_of_memory(error):
            self._room = max(1, len(rows) // 2)
            logger.warning("out of memory with %d prompts at once: going on with %d", len(rows), self._room)
            with self._changed:
                self._waiting.extendleft(reversed(self._running[self._room :]))
                del self._running[self._room :]
        else:
            logger.warning("%s with %d prompts at once: trying them one by one", error, len(rows))
            for row in rows:
                row.alone = True


class _TokenSampler(LogitsProcessor):  # type: ignore[misc]
    """Chooses each row's token in its own way: all others become impossible, so that a greedy `generate` takes it."""

    def __init__(self, rows: list[ActiveSequence], defaults: GenerationDefaults) -> None:
        self._rows = rows
        self._alike: dict[tuple[float, int, float], list[int]] = {}
        self._penalties: dict[int, RepetitionPenaltyLogitsProcessor] = {}
        for number, row in enumerate(rows):
            sampling = row.sampling
            penalty = sampling.repetition_penalty or defaults.repetition_penalty
            if penalty != 1.0:
                self._penalties[number] = RepetitionPenaltyLogitsProcessor(penalty)
            if sampling.temperature:
                top_k_or_none = defaults.top_k if sampling.top_k is None else sampling.top_k
                top_k = _DEFAULT_TOP_K if top_k_or_none is None else top_k_or_none
                self._alike.setdefault((sampling.temperature, top_k, sampling.top_p), []).append(number)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for number, penalty in self._penalties.items():
            so_far = torch.tensor([self._rows[number].tokens], device=scores.device)
            scores[number : number + 1] = penalty(so_far, scores[number : number + 1])
        for (temperature, top_k, top_p), numbers in self._alike.items():
            some = TemperatureLogitsWarper(temperature)(input_ids, scores[numbers].float())
            if top_k:
                some = TopKLogitsWarper(min(top_k, some.shape[-1]))(input_ids, some)
            if top_p < 1.0:
                some = TopPLogitsWarper(top_p)(input_ids, some)
            odds = some.softmax(-1)
            if not torch.isfinite(odds).all():  # on a GPU multinomial would take the whole process with it
                raise JobError(Code.INTERNAL_ERROR, "the model's output is not a number: its weights overflow here")
            for place, number in enumerate(numbers):
                chosen = torch.multinomial(odds[place], 1, generator=self._rows[number].generator(odds.device))
                scores[number] = float("-inf")
                scores[number, chosen] = 0.0
        return scores


class _StopTracker(StoppingCriteria):  # type: ignore[misc]
    """Hands each row its tokens, and says which have ended: all of them, if a request waits to join, or if one reaches
    the end of the model's context."""

    def __init__(
        self, rows: list[ActiveSequence], ends: frozenset[int], is_wanted: Callable[[], bool], context: int
    ) -> None:
        self._rows = rows
        self._lengths = [len(row.tokens) for row in rows]
        self._context = context
        self._ends = ends
        self._wanted = is_wanted
        self._steps = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self._steps += 1
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if not row.ended:
                row.push(token, self._ends)
        ended = [row.ended for row in self._rows]
        beyond = any(
            row.ended and length + self._steps >= self._context
            for row, length in zip(self._rows, self._lengths, strict=True)
        )
        if beyond or (self._steps >= JOIN_EVERY and self._wanted()):
            ended = [True for _row in self._rows]
        return torch.tensor(ended, device=input_ids.device)


@contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Let `generate` fill options that a call leaves open from `config`, and not from the model's own unchecked one."""
    own_defaults, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own_defaults


def free_memory() -> None:
    """Release the memory of a failed or a finished request."""
    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # a GPU that is lost raises again, for every call
            torch.cuda.empty_cache()
