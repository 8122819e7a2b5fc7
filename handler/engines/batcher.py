"""Many prompts through one model at once: a dynamic batcher over transformers' own `generate`.

One thread owns the model. A waiting request joins the running batch: that is stopped every few tokens for it, and goes
on with both, each row with its own way to choose tokens, its own random numbers and its own end. The cost of such a
stop is one forward pass over the tokens so far. Prompts of different lengths are padded, unless the model ignores the
mask of the pads: that is tried with the first such batch, and such a model gets prompts of one length, to their end.

`generate` brings caches, positions and masks of every architecture that transformers knows; its own continuous batching
has neither seeds nor repetition penalties for each request (5.23).
"""

from __future__ import annotations

import copy
import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from handler.engines.active_sequence import ActiveSequence
from handler.engines.batch_room import BatchRoom
from handler.engines.context import Context
from handler.engines.generation_defaults import generation_defaults
from handler.engines.token_choice import EndOfRows, TokenSampler, logprobs_of
from handler.errors import gpu_loss, is_gpu_lost, is_out_of_memory

if TYPE_CHECKING:
    from handler.engines.adapters import Adapters, PreparedAdapter

_STUCK_S = 120.0  # for a step of the model after all its rows have ended
_SCORED_AT_ONCE = 256  # tokens of a prompt: more would need much memory beside a large vocabulary
_PADS = 16
_PADS_CHANGE = 0.1  # of the logits: what rounding changes is far less, even in 16 bits

logger = logging.getLogger(__name__)


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
        self._room = BatchRoom(limit)
        self._applies_mask: bool | None = None
        vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or 1 << 60
        own_defaults = model.generation_config
        self._defaults = generation_defaults(
            own_defaults, vocabulary=vocabulary, pad_token_id=pad_token_id, tokenizer_end=tokenizer_end
        )
        self._context = Context.of(model).together
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
                count = len(self._running)
                self._running = [row for row in self._running if not row.ended]
                self._room.note_ended(count - len(self._running))
                while self._waiting and len(self._running) < self._room.rows:
                    row = self._waiting.popleft()
                    if not row.ended:
                        self._running.append(row)
                if self._running:
                    # The rows of a batch that failed go one by one: only a row that fails alone is to blame.
                    return [row for row in self._running if row.alone][:1] or self._running
                self._room.reset()
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
        """Whether a request waits that could join, an adapter, or a prompt that is to be scored. An encoder's state is
        never extended, only computed again; and beside a row that goes alone, or of one length, nothing joins."""
        if self._model.config.is_encoder_decoder:
            return False
        running = [row for row in self._running if not row.ended]
        if self._exchanges or self._applies_mask is False or any(row.alone for row in running):
            return bool(self._exchanges)
        has_room = len(running) < self._room.rows
        return any(row.scores_prompt for row in running) or (bool(self._waiting) and has_room)

    def _generate(self, rows: list[ActiveSequence]) -> None:
        """Generate until all have ended, or a request joins. One prompt at most is scored before: the other rows go on
        in between."""
        unscored = [row for row in rows if row.scores_prompt]
        if unscored:
            self._score_or_fail(unscored[0])
        if len(unscored) > 1 and not any(row.generated for row in rows if not row.ended):
            return  # nobody waits for the next token: score the others, too, and generate for all of them together
        for row in rows:
            if not row.scores_prompt and not row.tokens_left and not row.ended:
                row.end("length")
        rows = self._alike([row for row in rows if not row.scores_prompt and not row.ended])
        if not rows:
            return
        self._generating = rows
        # An encoder has the prompt again, and the decoder what was generated from it.
        repeated = [row.generated if self._model.config.is_encoder_decoder else [] for row in rows]
        config = copy.copy(self._defaults.config)
        config.max_new_tokens = max(row.tokens_left + len(tokens) for row, tokens in zip(rows, repeated, strict=True))
        ends = [row.ends(self._defaults.ends) for row in rows]
        sampler = TokenSampler(rows, ends, repeated, self._defaults, has_encoder=self._model.config.is_encoder_decoder)
        self._call_generate(
            rows,
            [self._input_of(row) for row in rows],
            generation_config=config,
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([EndOfRows(rows, ends, sampler, self._wanted, self._context)]),
        )

    def _input_of(self, row: ActiveSequence) -> list[int]:
        """The tokens that the model reads before it generates."""
        return row.prompt if self._model.config.is_encoder_decoder else row.tokens

    def _alike(self, rows: list[ActiveSequence]) -> list[ActiveSequence]:
        """The rows that can be a batch: all, or those that are as long as the first one if pads would change a text."""
        lengths = [len(self._input_of(row)) for row in rows]
        if len(set(lengths)) > 1:
            if self._applies_mask is None:
                self._applies_mask = self._try_mask(rows[lengths.index(max(lengths))])
            if not self._applies_mask:
                return [row for row, length in zip(rows, lengths, strict=True) if length == lengths[0]]
        return rows

    def _try_mask(self, row: ActiveSequence) -> bool | None:
        """Whether the model gives the same logits for a prompt with pads; None if this prompt does not tell. Some with
        a recurrent state do not know of a mask, and others accept one and do not look at it."""
        config = copy.copy(self._defaults.config)
        config.max_new_tokens, config.return_dict_in_generate, config.output_logits = 1, True, True
        tokens = self._input_of(row)[-_PADS:]
        outputs = [
            self._call_generate([row], [tokens], width=len(tokens) + pads, generation_config=config)
            for pads in (0, _PADS)
        ]
        if not all(getattr(output, "logits", None) for output in outputs):
            return True  # a `generate` of its own, which is taken at its word
        alone, padded = (output.logits[0][0].float() for output in outputs)
        numbers = torch.isfinite(alone) & torch.isfinite(padded)
        if not numbers.any() or torch.isnan(alone).any():
            return None
        alone, padded = alone[numbers], padded[numbers]
        change = float((alone - padded).norm() / (alone - alone.mean()).norm().clamp(min=1e-6))
        if change > _PADS_CHANGE:
            logger.warning("the model ignores the mask of pads: only prompts of one length are a batch")
        return change <= _PADS_CHANGE

    def _call_generate(
        self, rows: Sequence[ActiveSequence], inputs: Sequence[Sequence[int]], *, width: int = 0, **options: Any
    ) -> Any:
        """transformers' `generate` for these inputs, padded to the longest one, or to `width`. Pads come first, so that
        all texts go on at one place, but behind the input of an encoder, whose positions begin at its first token."""
        width = max(width, *map(len, inputs))
        tokens = torch.full((len(rows), width), self._defaults.config.pad_token_id)
        mask = torch.zeros_like(tokens)
        for number, ids in enumerate(inputs):
            start = 0 if self._model.config.is_encoder_decoder else width - len(ids)
            tokens[number, start : start + len(ids)] = torch.tensor(ids)
            mask[number, start : start + len(ids)] = 1
        device = self._model.device
        tokens, options = tokens.to(device), {**options, "attention_mask": mask.to(device)}
        with torch.inference_mode(), _generation_config(self._model, self._defaults.config):
            if self._adapters is None:
                return self._model.generate(tokens, **options)
            return self._adapters.generate(tokens, keys=[row.adapter_key for row in rows], **options)

    def _score_or_fail(self, row: ActiveSequence) -> None:
        """Score a prompt. It is computed alone: an error is its own, unless the GPU is lost."""
        self._generating = [row]
        try:
            self._score_prompt(row)
        except BaseException as error:
            if is_gpu_lost(error):
                raise
            row.fail(error.with_traceback(None))
            free_memory()

    def _score_prompt(self, row: ActiveSequence) -> None:
        """Note the log probabilities of a prompt's tokens, by one pass over them."""
        tokens = torch.tensor([row.tokens], device=self._model.device)
        with torch.inference_mode():
            adapters = self._adapters
            output = self._model(tokens) if adapters is None else adapters.forward(tokens, keys=[row.adapter_key])
            logits = output.logits[0]
            row.tell(row.tokens[0], None, ())
            for begin in range(0, len(row.tokens) - 1, _SCORED_AT_ONCE):
                if row.ended:
                    break
                following = row.tokens[begin + 1 : begin + 1 + _SCORED_AT_ONCE]
                for entry in logprobs_of(following, logits[begin : begin + len(following)], row.sampling.logprobs or 0):
                    row.tell(*entry)
        row.scores_prompt = False

    def _after_failure(self, rows: list[ActiveSequence], error: BaseException) -> None:
        if lost := gpu_loss(error):
            self._broken = lost
            with self._changed:
                rows = [*self._running, *self._waiting]
                self._waiting.clear()
        if len(rows) == 1 or self._broken:
            for row in rows:
                row.fail(error)
            if is_out_of_memory(error):
                self._room.blame_one()
        elif is_out_of_memory(error):
            self._room.shrink(len(rows))
            logger.warning("out of memory with %d prompts at once: going on with %d", len(rows), self._room.rows)
            with self._changed:
                self._waiting.extendleft(reversed(self._running[self._room.rows :]))
                del self._running[self._room.rows :]
        else:
            logger.warning("%s with %d prompts at once: trying them one by one", error, len(rows))
            for row in rows:
                row.alone = True


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
