"""Text generation with transformers."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from handler.answers import Answer, TextDelta, TokenLogprob
from handler.engines import MANY, NUMBERS, compiled_code
from handler.engines.active_sequence import ActiveSequence
from handler.engines.adapter_gate import exchange_begun, exchange_ended, shown
from handler.engines.batcher import Batcher, free_memory
from handler.engines.chat_template import Renderer
from handler.engines.loaded import Loaded, check_token_ids, encode, ends_of, fitted, pad_token_id
from handler.engines.offload import Offload
from handler.errors import Code, JobError, invalid, not_served
from handler.jobs import JobContext, TextRequest
from handler.prompts import Prompt
from handler.sampling import Sampling
from handler.text_jobs import text_answer
from modelstore.adapters import find_or_make
from modelstore.errors import DoesNotFit, IntegrityError, Refused
from modelstore.load.torch_device import check_room, device_name, spare_bytes
from modelstore.pending_start import PendingStart
from modelstore.reference import parse_reference
from modelstore.servable import check_generates_text
from modelstore.settings import Settings
from modelstore.timeline import Timeline
from modelstore.volume.layout import Layout, SnapshotKey
from modelstore.volume.snapshots import Catalog
from modelstore.warmstart import Target, begin

logger = logging.getLogger(__name__)

_POLL_S = 0.02
_ENCODE_S = 60.0  # for one job's prompts: a million characters take a slow tokenizer half a minute


class _Serving:
    """A model that answers, with its batcher and the number of its running answers. `asked_for`: the reference that it
    was loaded by."""

    def __init__(self, loaded: Loaded, settings: Settings, asked_for: str) -> None:
        self.loaded = loaded
        self.asked_for = asked_for
        self.answering = 0
        parameters = (*loaded.model.parameters(), *loaded.model.buffers())
        self.weights_bytes = sum(each.numel() * each.itemsize for each in parameters)
        self.batcher = Batcher(
            loaded.model,
            limit=settings.max_concurrency,
            pad_token_id=pad_token_id(loaded),
            tokenizer_end=loaded.tokenizer.eos_token_id,
            adapters=loaded.adapters,
        )

    def has_adapter(self, name: str | None) -> bool:
        """Whether a job that names this model is answered with an adapter."""
        return self.loaded.adapters is not None and name in self.loaded.adapters.names

    def serves(self, name: str) -> bool:
        """Whether a job may call the model so."""
        return name in (self.loaded.key.repo_id, self.asked_for) or self.has_adapter(name)


class TextEngine:
    """Answers with one loaded model, many requests at once; the model can be exchanged for another meanwhile."""

    jobs_at_once = MANY
    beside_the_prompt = NUMBERS

    def __init__(self, loaded: Loaded, settings: Settings, renderer: Renderer | None = None) -> None:
        """`renderer`: of chat templates, one that others use too; by default the engine has its own."""
        self._serving = _Serving(loaded, settings, str(settings.model))
        self._leaving: _Serving | None = None
        self._renderer = renderer or Renderer()
        self._own_renderer = renderer is None
        self._offload = Offload()
        self._settings = settings
        self._kept: Loaded | None = None
        self._device = loaded.model.device
        self._swapping = threading.Lock()
        self._turns = threading.Condition()
        self._paused = False

    @classmethod
    def load(
        cls, pending: PendingStart, *, while_reading: Callable[[], None] | None = None, renderer: Renderer | None = None
    ) -> TextEngine:
        """The engine from a start whose bytes are in flight; `while_reading` is called before the last of them."""
        return cls(Loaded.from_start(pending, while_reading=while_reading), pending.settings, renderer)

    @property
    def _loaded(self) -> Loaded:
        return self._serving.loaded

    @property
    def model(self) -> str:
        return self._loaded.key.repo_id

    def serves(self, name: str) -> bool:
        """Whether a job may call the model so without loading another."""
        return self._serving.serves(name)

    @property
    def broken(self) -> str:
        leaving = self._leaving
        return self._serving.batcher.broken or (leaving.batcher.broken if leaving else "") or self._offload.stuck

    def compile(self) -> None:
        self._loaded.model.compile(dynamic=True)

    def run_uncompiled(self) -> None:
        compiled_code.run_uncompiled(self._loaded.model)

    def check(self) -> None:
        Catalog(Layout(self._settings.root)).check_unchanged(self._loaded.snapshot)
        if self.broken:
            raise IntegrityError(self.broken)

    def status(self) -> dict[str, Any]:
        loaded = self._loaded
        memory = {"weights_bytes": self._serving.weights_bytes, "device": str(loaded.model.device)}
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            memory |= {"gpu_free_bytes": free, "gpu_total_bytes": total}
        return {
            "engine": "text",
            "model": loaded.key.repo_id,
            "commit": loaded.key.commit,
            "dtype": loaded.key.dtype,
            "context": loaded.context.size,
            "memory": memory,
            **shown(loaded.adapters.current if loaded.adapters is not None else {}),
        }

    async def answer(self, data: Mapping[str, Any], job: JobContext) -> Answer:
        return text_answer(self.generate, data, job)

    async def generate(self, request: TextRequest) -> AsyncIterator[TextDelta]:
        """The pieces of all the request's prompts, as they come. A caller that stops the iteration ends the generation.

        Raises JobError for errors that the sender can mend. Requests may overlap.
        """
        while (serving := self._begin_answer()) is None:
            await asyncio.sleep(_POLL_S)
        rows: list[ActiveSequence] = []
        try:
            loaded, batcher = serving.loaded, serving.batcher
            if request.model is not None and not serving.serves(request.model):
                raise not_served(
                    request.model, loaded.key.repo_id, *self._settings.served_names, *self._settings.adapters
                )
            name = request.model if serving.has_adapter(request.model) else None
            pieces = _Pieces(asyncio.get_running_loop())
            try:
                encode = partial(_rows, request, loaded, pieces, self._renderer, name)
                rows = await self._offload.run(encode, limit_s=_ENCODE_S)
            except TimeoutError as error:
                reason = f"the tokenizer of {self.model} did not end within {_ENCODE_S:g} s: send a shorter prompt"
                raise JobError(Code.TIMEOUT, reason) from error
            lengths = [len(row.tokens) for row in rows]
            batcher.submit(rows)
            remaining = len(rows)
            while remaining:
                piece = await pieces.next()
                counted = piece.finish_reason and not piece.index % request.choices
                prompt_tokens = lengths[piece.index] if counted else 0
                remaining -= piece.finish_reason is not None
                yield replace(piece, prompt_tokens=prompt_tokens, model=name or loaded.key.repo_id)
        finally:
            for row in rows:
                row.cancel()
            self._end_answer(serving)

    def swap(self, reference: str) -> Timeline:
        """Serve another model from now on; returns the record of its start, in seconds since this call.

        It is looked up or made, read and built while the current one answers: on the GPU, if both have room there. From
        then on new answers are its own, and running ones come to their end. If they have no room together, it waits in
        host memory until running answers ended, and they change places in a pause. With MODELSTORE_KEEP_PREVIOUS the
        one before stays in host memory, and to swap back is a memory copy. Raises the errors of a start; the current
        model then goes on.
        """
        with self._swapping:
            if hasattr(self._loaded.model, "hf_device_map"):
                raise Refused(f"{self.model} lies on several GPUs and cannot be exchanged: restart the worker instead")
            if self._settings.compile:  # a new model would be compiled while jobs wait
                raise Refused(f"{self.model} is compiled and cannot be exchanged: restart the worker instead")
            settings = replace(self._settings, model=parse_reference(reference))
            timeline = Timeline(
                worker=settings.worker_id, model=str(settings.model), kind="swap", began=time.monotonic()
            )
            loaded = self._in_memory(settings, timeline)
            if loaded is None:
                self._load_and_exchange(settings, reference, timeline)
            elif loaded is not self._loaded:
                self._exchange(loaded, reference, timeline, is_beside=self._moved_beside(loaded, timeline))
            else:
                self._serving.asked_for = reference
                timeline.mark("ready")
            return timeline

    def adapter(self, name: str) -> SnapshotKey:
        assert self._loaded.adapters is not None
        return self._loaded.adapters.current[name].snapshot.key

    def swap_adapter(self, name: str) -> Timeline:
        with self._swapping:
            serving = self._serving
            adapters = serving.loaded.adapters
            assert adapters is not None
            timeline = exchange_begun(self._settings, name)
            before = adapters.current[name]
            adapter = find_or_make(self._settings, name, serving.loaded.key, timeline)
            try:
                with timeline.span("build"):
                    serving.batcher.exchange(adapters.prepare(adapter))
            except BaseException:
                adapter.in_use.end()
                raise
            before.in_use.end()
            return exchange_ended(timeline, adapter)

    def close(self) -> None:
        for serving in (self._leaving, self._serving):
            if serving is not None:
                serving.batcher.close()
        if self._own_renderer:
            self._renderer.close()
        for loaded in (self._loaded, self._kept):
            if loaded is not None:
                loaded.end_use()
        self._kept = None
        del self._serving, serving, loaded
        free_memory()

    def _begin_answer(self) -> _Serving | None:
        """The model for an answer, which is counted as begun; None while models change places."""
        with self._turns:
            if self._paused:
                return None
            self._serving.answering += 1
            return self._serving

    def _end_answer(self, serving: _Serving) -> None:
        with self._turns:
            serving.answering -= 1
            self._turns.notify_all()

    @contextmanager
    def _answers_paused(self) -> Iterator[None]:
        """Let running answers come to their end, and no new ones begin."""
        with self._turns:
            self._paused = True
            self._turns.wait_for(lambda: not self._serving.answering)
        try:
            yield
        finally:
            with self._turns:
                self._paused = False

    def _in_memory(self, settings: Settings, timeline: Timeline) -> Loaded | None:
        """The model that serves, or the one that was kept, if the volume's records name it for these settings."""
        assert settings.model is not None
        settings.check_allowed(settings.model)
        with timeline.span("lookup"):
            catalog = Catalog.of(settings)
            snapshot = catalog.find(settings.model, settings.dtype, worker=settings.worker_id)
        for loaded in (self._loaded, self._kept):
            if loaded is not None and snapshot is not None and snapshot.key == loaded.key:
                timeline.commit, timeline.dtype = snapshot.commit, snapshot.dtype
                timeline.outcome, timeline.reason = "hit", "the model was in host memory"
                return loaded
        return None

    def _load_and_exchange(self, settings: Settings, reference: str, timeline: Timeline) -> None:
        """Load a model beside the current one, on the GPU if there is room for both, else in host memory; then go on
        with it."""
        if self._device.type != "cpu":
            free_memory()  # memory that torch keeps for itself would count as taken
            try:
                self._load_on(self._device, "device", settings, reference, timeline)
                return
            except (DoesNotFit, torch.OutOfMemoryError):
                logger.info("%s has no room beside %s: it is loaded in host memory first", settings.model, self.model)
            free_memory()
        self._load_on(torch.device("cpu"), "host", settings, reference, timeline)

    def _load_on(
        self, device: torch.device, target: Target, settings: Settings, reference: str, timeline: Timeline
    ) -> None:
        pending = begin(
            settings,
            timeline=timeline,
            target=target,
            gpu=device_name(device),
            spare_bytes=spare_bytes(device),
            check_config=check_generates_text,
        )
        loaded: Loaded | None = None
        try:
            loaded = pending.load(partial(Loaded.from_start, device=device))
            self._exchange(loaded, reference, timeline, is_beside=device.type == self._device.type)
        except BaseException:
            if loaded is not None:
                loaded.end_use()
            pending.in_use.end()
            raise

    def _moved_beside(self, loaded: Loaded, timeline: Timeline) -> bool:
        """Move a model from host memory to the GPU, if there is room for it beside the current one; whether that was
        done, or there is nothing to move."""
        if self._device.type == "cpu":
            return True
        try:
            check_room(loaded.model, self._device, spare=spare_bytes(self._device))
            with timeline.span("transfer"):
                loaded.model.to(self._device)
        except (DoesNotFit, torch.OutOfMemoryError):
            loaded.model.to("cpu")
            free_memory()
            return False
        return True

    def _exchange(self, loaded: Loaded, reference: str, timeline: Timeline, *, is_beside: bool) -> None:
        """Go on with another model. `is_beside`: it is on the device already, beside the current one; else the two
        change places in a pause. Once it serves, nothing is raised any more."""
        before = self._loaded
        if is_beside:
            self._serve_from_now_on(_Serving(loaded, self._settings, reference), timeline)
        else:
            with timeline.span("pause"), self._answers_paused():
                check_room(loaded.model, self._device, besides=before.model)
                self._change_places(loaded, reference, timeline)
            timeline.mark("ready")
        self._keep_or_drop(before)
        del before
        free_memory()

    def _serve_from_now_on(self, serving: _Serving, timeline: Timeline) -> None:
        """Give new answers to another model at once, and return when the running ones have ended."""
        before = self._serving
        with self._turns:
            self._leaving, self._serving = before, serving
            timeline.mark("ready")
            self._turns.wait_for(lambda: not before.answering)
        before.batcher.close()
        self._leaving = None

    def _change_places(self, loaded: Loaded, reference: str, timeline: Timeline) -> None:
        """Put a model on the device in the place of the current one; if that fails, the current one is back."""
        before = self._serving
        before.batcher.close()  # a row that was cancelled may be in its last step
        try:
            with timeline.span("transfer", "to host memory"):
                before.loaded.model.to("cpu")
                free_memory()
            with timeline.span("transfer"):
                loaded.model.to(self._device)
            self._serving = _Serving(loaded, self._settings, reference)
        except BaseException:
            loaded.model.to("cpu")
            before.loaded.model.to(self._device)
            self._serving = _Serving(before.loaded, self._settings, before.asked_for)
            raise

    def _keep_or_drop(self, before: Loaded) -> None:
        """Keep the model before in host memory, if that is set, and drop the one that was kept."""
        kept = before if self._settings.keep_previous else None
        if kept is not None:
            try:
                kept.model.to("cpu")
            except (MemoryError, RuntimeError) as error:
                logger.warning("%s is not kept in host memory: %s", kept.key.repo_id, error)
                kept = None
        for dropped in (self._kept, before):
            if dropped is not None and dropped is not kept and dropped is not self._loaded:
                dropped.end_use()
        self._kept = kept


class _Pieces:
    """Hands pieces from the batcher's thread to a coroutine."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[TextDelta | BaseException] = asyncio.Queue()

    def put(self, piece: TextDelta | BaseException) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)
        except RuntimeError:  # the loop has ended, and with it the waiting job
            logger.debug("the job of this answer has ended")

    async def next(self) -> TextDelta:
        piece = await self._queue.get()
        if isinstance(piece, BaseException):
            raise piece
        return piece


@dataclass(frozen=True, slots=True)
class _Receiver:
    """The receiver of the pieces of one prompt."""

    index: int
    pieces: _Pieces

    def piece(self, text: str, tokens: int, finish_reason: str | None, logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        self.pieces.put(TextDelta(self.index, text, tokens, finish_reason, logprobs=logprobs))

    def failed(self, error: BaseException) -> None:
        self.pieces.put(error)


def _rows(
    request: TextRequest, loaded: Loaded, pieces: _Pieces, renderer: Renderer, adapter: str | None
) -> list[ActiveSequence]:
    rows: list[ActiveSequence] = []
    if request.echo and request.sampling.logprobs is not None and loaded.model.config.is_encoder_decoder:
        raise invalid(f"echo with logprobs is not served: {loaded.key.repo_id} continues no prompt, it answers it")
    check_token_ids(request.sampling, loaded)
    ends = ends_of(request.sampling, loaded)
    tokens: list[int] = []
    for index, prompt in enumerate(request.prompts):
        choice = index % request.choices
        if not choice:  # the others are the same prompt
            tokens = encode(prompt, loaded, renderer, request.add_special_tokens)
        sampling = fitted(len(tokens), request, loaded)
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + choice)
        rows.append(
            ActiveSequence(
                tokens,
                sampling,
                loaded.kinds.detokenizer(sampling, tokens, is_new_message=prompt.begins_message, stream=request.stream),
                _Receiver(index, pieces),
                every_token=request.stream,
                ends=ends,
                beginning=_beginning(prompt, sampling, loaded) if request.echo else "",
                scores_prompt=request.echo and sampling.logprobs is not None and not prompt.messages,
                text_of=loaded.kinds.text_of,
                adapter=adapter,
            )
        )
    return rows


def _beginning(prompt: Prompt, sampling: Sampling, loaded: Loaded) -> str:
    """The prompt as an answer repeats it."""
    if not prompt.tokens:
        return prompt.beginning
    decoded: str = loaded.tokenizer.decode(
        list(prompt.tokens),
        skip_special_tokens=sampling.skip_special_tokens,
        clean_up_tokenization_spaces=False,
    )
    return decoded
