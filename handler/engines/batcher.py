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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from handler.answers import TokenLogprob
from handler.engines.detokenizer import Detokenizer
from handler.engines.generation_defaults import GenerationDefaults, generation_defaults
from handler.engines.token_processors import processors_of
from handler.errors import Code, JobError, invalid, is_gpu_lost, is_out_of_memory
from handler.sampling import Sampling

if TYPE_CHECKING:
    from handler.engines.adapters import Adapters, PreparedAdapter

JOIN_EVERY = 16  # tokens; joining sooner would pay the pass over the tokens so far too often
_SEND_EVERY = 32
_STUCK_S = 120.0  # for a step of the model after all its rows have ended
_SCORED_AT_ONCE = 256  # tokens of a prompt: more would need much memory beside a large vocabulary
_INCOMPLETE = "\ufffd"  # the text of the first tokens of a character
_CHARACTER_TOKENS = 4
_IMPOSSIBLE = -9999.0
_NOT_A_NUMBER = "the model's output is not a number: its weights overflow here"

logger = logging.getLogger(__name__)


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
        self.left = sampling.max_tokens
        self.scores_prompt = scores_prompt
        self.ended_at: float | None = None
        self.alone = False
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
        named = tuple((self._text_of(other, self._partial), value) for other, value in top)
        text = self._text_of(token, self._partial)
        self._partial.append(token)
        if text.endswith(_INCOMPLETE) and len(self._partial) < _CHARACTER_TOKENS:
            text = ""  # the last token of a character has all of its text
        else:
            self._partial.clear()
        self._logprobs.append(TokenLogprob(text, logprob, named))

    def push(self, token: int, ends: frozenset[int]) -> None:
        """Take one more token."""
        self.tokens.append(token)
        self.left -= 1
        self._unsent_tokens += 1
        if token not in ends or not (self.sampling.skip_special_tokens or token in self._own_ends):
            self._text += self._detokenizer.push(token)  # the model's own end is a special token like others
        if token in ends or self._detokenizer.stopped:
            self.end("stop")
        elif not self.left:
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


class Batcher:
    """Generates for all rows that were submitted, `limit` at once. Call `close` at the end."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        limit: int,
        pad_token_id: int | None,
        tokenizer_end: int | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        """`limit`: the rows of one batch. `tokenizer_end`: the tokenizer's end token. `adapters`: beside the model."""
        self._model = model
        self._adapters = adapters
        self._exchanges: deque[tuple[PreparedAdapter, Future[None]]] = deque()
        self._retired: list[str] = []  # keys of adapters that were exchanged
        self._most = self._room = limit
        vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or 1 << 60
        own_defaults = model.generation_config
        self._defaults = generation_defaults(
            own_defaults, vocabulary=vocabulary, pad_token_id=pad_token_id, tokenizer_end=tokenizer_end
        )
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
            for row in rows:
                row.adapter_key = self._adapters.key_of(row.adapter) if self._adapters is not None else ""
            self._waiting.extend(rows)
            self._changed.notify_all()
        if not self._thread.is_alive():
            self._fail_all(RuntimeError(self._broken or "the engine has ended"))

    def exchange(self, adapter: PreparedAdapter) -> None:
        """Return when rows that are submitted from now on have this adapter by its name; those with the one before end
        with that. Raises NotServable if it does not fit the model."""
        exchanged: Future[None] = Future()
        with self._changed:
            self._exchanges.append((adapter, exchanged))
            self._changed.notify_all()
        if not self._thread.is_alive():
            self._fail_all(RuntimeError(self._broken or "the engine has ended"))
        exchanged.result()

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
            exchanges = list(self._exchanges)
            self._exchanges.clear()
        for row in rows:
            row.fail(error)
        for _adapter, exchanged in exchanges:
            exchanged.set_exception(error)

    def _next(self) -> list[ActiveSequence] | None:
        """The rows to go on with; None when there will be none."""
        while True:
            self._exchange_adapters()
            with self._changed:
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
                    break
                if not self._exchanges and not self._retired:
                    self._changed.wait()
        self._fail_all(RuntimeError("the engine has ended"))
        return None

    def _exchange_adapters(self) -> None:
        """Add the adapters that wait for it, and remove those that no row has any more."""
        while self._exchanges and self._adapters is not None:
            adapter, exchanged = self._exchanges.popleft()
            before = self._adapters.key_of(adapter.adapter.name)
            try:
                self._adapters.add(adapter)
            except BaseException as error:
                exchanged.set_exception(error)
            else:
                self._retired.append(before)
                exchanged.set_result(None)
        if self._retired and self._adapters is not None:
            with self._changed:
                rows = (*self._running, *self._waiting)
                used = {row.adapter_key for row in rows if not row.ended}
            for key in [key for key in self._retired if key not in used]:
                self._retired.remove(key)
                try:
                    self._adapters.remove(key)
                except Exception as error:
                    logger.warning("an adapter that no job has any more stays in memory: %s", error)

    def _wanted(self) -> bool:
        """Whether a request waits that could join, or an adapter. An encoder's state cannot be extended, only computed
        again."""
        if self._model.config.is_encoder_decoder:
            return False
        has_room = sum(not row.ended for row in self._running) < self._room
        return bool(self._exchanges) or (bool(self._waiting) and has_room)

    def _generate(self, rows: list[ActiveSequence]) -> None:
        """Generate until all have ended, or a request joins."""
        for row in rows:
            if row.scores_prompt:
                self._score_prompt(row)
            if not row.left:
                row.end("length")
        rows = [row for row in rows if not row.ended]
        if not rows:
            return
        width = max(len(row.tokens) for row in rows)
        tokens = torch.full((len(rows), width), self._defaults.config.pad_token_id)
        mask = torch.zeros_like(tokens)
        for number, row in enumerate(rows):
            tokens[number, width - len(row.tokens) :] = torch.tensor(row.tokens)
            mask[number, width - len(row.tokens) :] = 1
        config = copy.copy(self._defaults.config)
        config.max_new_tokens = max(row.left for row in rows)
        device = self._model.device
        ends = [row.ends(self._defaults.ends) for row in rows]
        with torch.inference_mode(), _generation_config(self._model, self._defaults.config):
            self._call_generate(
                rows,
                tokens.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=LogitsProcessorList([_TokenSampler(rows, ends, self._defaults)]),
                stopping_criteria=StoppingCriteriaList([_EndOfRows(rows, ends, self._wanted, self._context)]),
            )

    def _call_generate(self, rows: Sequence[ActiveSequence], tokens: torch.Tensor, **options: Any) -> None:
        if self._adapters is None:
            self._model.generate(tokens, **options)
        else:
            self._adapters.generate(tokens, keys=[row.adapter_key for row in rows], **options)

    def _score_prompt(self, row: ActiveSequence) -> None:
        """Note the log probabilities of a prompt's tokens, by one pass over them."""
        tokens = torch.tensor([row.tokens], device=self._model.device)
        with torch.inference_mode():
            adapters = self._adapters
            output = self._model(tokens) if adapters is None else adapters.forward(tokens, keys=[row.adapter_key])
            logits = output.logits[0]
            row.tell(row.tokens[0], None, ())
            for begin in range(0, len(row.tokens) - 1, _SCORED_AT_ONCE):
                following = row.tokens[begin + 1 : begin + 1 + _SCORED_AT_ONCE]
                _add_logprobs(row, following, logits[begin : begin + len(following)])
        row.scores_prompt = False

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

    def __init__(
        self, rows: list[ActiveSequence], ends: Sequence[frozenset[int]], defaults: GenerationDefaults
    ) -> None:
        """`ends`: the tokens that end each row."""
        self._rows = rows
        self._alike: dict[tuple[float, float, int, float], list[int]] = {}
        self._processors: dict[int, list[LogitsProcessor]] = {}
        self._ends = ends
        self._defaults = defaults
        self._sampling = [defaults.completed(row.sampling) for row in rows]
        self._rows_with_logprobs = [number for number, row in enumerate(rows) if row.sampling.logprobs is not None]
        for number, sampling in enumerate(self._sampling):
            if sampling.temperature:
                alike = (sampling.temperature, sampling.min_p or 0.0, sampling.top_k or 0, sampling.top_p or 1.0)
                self._alike.setdefault(alike, []).append(number)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if torch.isnan(scores).any():  # else the choice, greedy or not, would be made of nothing
            raise JobError(Code.INTERNAL_ERROR, _NOT_A_NUMBER)
        raw = scores[self._rows_with_logprobs].clone() if self._rows_with_logprobs else None
        if not self._processors:
            self._processors = self._build_processors(scores.device)
        for number, processors in self._processors.items():
            if processors:
                so_far = torch.tensor([self._rows[number].tokens], device=scores.device)
                for processor in processors:
                    scores[number : number + 1] = processor(so_far, scores[number : number + 1])
                if torch.isneginf(scores[number]).all():
                    raise invalid("no token is left to choose: ask for fewer min_tokens or stop_token_ids")
        for (temperature, min_p, top_k, top_p), numbers in self._alike.items():
            some = TemperatureLogitsWarper(temperature)(input_ids, scores[numbers].float())
            if min_p:
                some = MinPLogitsWarper(min_p)(input_ids, some)
            if top_k:
                some = TopKLogitsWarper(min(top_k, some.shape[-1]))(input_ids, some)
            if top_p < 1.0:
                some = TopPLogitsWarper(top_p)(input_ids, some)
            odds = some.softmax(-1)
            if not torch.isfinite(odds).all():  # on a GPU multinomial would take the whole process with it
                raise JobError(Code.INTERNAL_ERROR, _NOT_A_NUMBER)
            for place, number in enumerate(numbers):
                chosen = torch.multinomial(odds[place], 1, generator=self._rows[number].generator(odds.device))
                scores[number] = float("-inf")
                scores[number, chosen] = 0.0
        if raw is not None:
            for place, number in enumerate(self._rows_with_logprobs):
                if not self._rows[number].ended:
                    _add_logprobs(self._rows[number], [int(scores[number].argmax())], raw[place : place + 1])
        return scores

    def _build_processors(self, device: torch.device) -> dict[int, list[LogitsProcessor]]:
        """The processors of each row."""
        return {
            number: processors_of(
                self._sampling[number],
                prompt_tokens=row.prompt_tokens,
                ends=self._ends[number],
                suppressed_first=self._defaults.suppressed_first,
                device=device,
            )
            for number, row in enumerate(self._rows)
        }


def _add_logprobs(row: ActiveSequence, tokens: Sequence[int], logits: torch.Tensor) -> None:
    """Note the log probabilities of tokens; `logits`: as the model gave them, shape (tokens, vocabulary)."""
    odds = logits.float().log_softmax(-1)
    chosen = odds.gather(1, torch.tensor(tokens, device=odds.device)[:, None])[:, 0].tolist()
    values, ids = (each.tolist() for each in odds.topk(min(row.sampling.logprobs or 0, odds.shape[-1])))
    for token, logprob, top_ids, top_values in zip(tokens, chosen, ids, values, strict=True):
        row.tell(token, _finite(logprob), zip(top_ids, map(_finite, top_values), strict=True))


def _finite(logprob: float) -> float:
    """A log probability that JSON can hold: vLLM's number for an impossible token."""
    return max(logprob, _IMPOSSIBLE)


class _EndOfRows(StoppingCriteria):  # type: ignore[misc]
    """Hands each row its tokens, and says which have ended: all of them, if a request waits to join, or if one reaches
    the end of the model's context."""

    def __init__(
        self, rows: list[ActiveSequence], ends: Sequence[frozenset[int]], is_wanted: Callable[[], bool], context: int
    ) -> None:
        """`ends`: the tokens that end each row; `context`: the most tokens that the model takes."""
        self._rows = rows
        self._lengths = [len(row.tokens) for row in rows]
        self._context = context
        self._ends = ends
        self._wanted = is_wanted
        self._steps = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self._steps += 1
        for row, ends, token in zip(self._rows, self._ends, input_ids[:, -1].tolist(), strict=True):
            if not row.ended:
                row.push(token, ends)
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
