"""Several models in one worker. The model that a job names is loaded when a job first asks for it; when memory is full,
the least recently used model is unloaded."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from handler.answers import Answer, TextDelta
from handler.engines import MANY, NUMBERS
from handler.engines.batcher import free_memory
from handler.engines.chat_template import Renderer
from handler.engines.text import TextEngine
from handler.errors import Code, JobError, not_served
from handler.jobs import JobContext, TextRequest
from handler.text_jobs import text_answer
from modelstore.errors import DoesNotFit, ModelStoreError
from modelstore.pending_start import PendingStart
from modelstore.reference import parse_reference
from modelstore.servable import check_generates_text
from modelstore.settings import Settings
from modelstore.timeline import Timeline
from modelstore.volume.layout import SnapshotKey
from modelstore.warmstart import begin

logger = logging.getLogger(__name__)


class _Resident:
    """A loaded model, how many answers it makes, and when one last began."""

    def __init__(self, engine: TextEngine) -> None:
        self.engine = engine
        self.answering = 0
        self.used_at = time.monotonic()


class MultiModelEngine:
    """An engine of engines. The first is the worker's own, which answers the jobs that name no model."""

    jobs_at_once = MANY
    beside_the_prompt = NUMBERS

    def __init__(self, first: TextEngine, settings: Settings, load: Callable[[Settings], TextEngine]) -> None:
        """`load` makes the engine of a model; raises DoesNotFit if the memory has no room for it."""
        self._own = _Resident(first)
        self._others: dict[str, _Resident] = {}
        self._settings = settings
        self._load = load
        self._changed = threading.Condition()
        self._loads: dict[str, Future[None]] = {}
        self._waiting: Counter[str] = Counter()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")

    @property
    def model(self) -> str:
        """The model's name in answers of jobs that name none."""
        return self._own.engine.model

    @property
    def broken(self) -> str:
        return next((resident.engine.broken for resident in self._all() if resident.engine.broken), "")

    def check(self) -> None:
        self._own.engine.check()

    def status(self) -> dict[str, Any]:
        return self._own.engine.status() | {"other_models": list(self._others)}

    def compile(self) -> None:
        self._own.engine.compile()

    def run_uncompiled(self) -> None:
        self._own.engine.run_uncompiled()

    def swap(self, reference: str) -> Timeline:
        return self._own.engine.swap(reference)

    def adapter(self, name: str) -> SnapshotKey:
        return self._own.engine.adapter(name)

    def swap_adapter(self, name: str) -> Timeline:
        return self._own.engine.swap_adapter(name)

    def serves(self, name: str) -> bool:
        return any(resident.engine.serves(name) for resident in self._all())

    def close(self) -> None:
        self._loader.shutdown()
        for resident in self._all():
            resident.engine.close()

    async def answer(self, data: Mapping[str, Any], job: JobContext) -> Answer:
        return text_answer(self.generate, data, job)

    async def generate(self, request: TextRequest) -> AsyncIterator[TextDelta]:
        """The pieces of all the request's prompts, as they come. A job may name other models than the worker's own if
        MODELSTORE_ALLOWED_MODELS lists them."""
        if request.model is not None and request.model not in self._settings.adapters:
            request = replace(request, model=self._normal(request.model))
        while True:
            resident = await self._resident(request.model)
            asked = request if resident is self._own else replace(request, model=None)
            try:
                async with aclosing(resident.engine.generate(asked)) as pieces:  # type: ignore[type-var]
                    async for piece in pieces:
                        yield piece
                return
            except JobError as error:
                swapped = (
                    resident is self._own and request.model is not None and not resident.engine.serves(request.model)
                )
                if error.code is not Code.MODEL_NOT_ALLOWED or not swapped:
                    raise  # else the own model was exchanged meanwhile, and this one may be loaded beside it
            finally:
                self._end(resident)

    async def _resident(self, name: str | None) -> _Resident:
        """The resident model that answers for `name`, with one more answer counted. Raises JobError."""
        if name is None or self._own.engine.serves(name):
            with self._changed:
                self._own.answering += 1
            return self._own
        self._check_allowed(name)
        if (resident := self._loaded_one(name)) is not None:
            return resident
        self._count_waiting(name, 1)
        try:
            while (resident := self._loaded_one(name)) is None:
                # Shielded for the others that wait for it, if this one is cancelled.
                await asyncio.shield(asyncio.wrap_future(self._loading(name)))
            return resident
        finally:
            self._count_waiting(name, -1)

    def _count_waiting(self, name: str, change: int) -> None:
        """One more job, or one less, waits until a model is loaded. The model stays until that job has its answer."""
        with self._changed:
            self._waiting[name] += change
            if not self._waiting[name]:
                del self._waiting[name]
            self._changed.notify_all()

    def _loading(self, name: str) -> Future[None]:
        """The load of a model, one for all jobs that ask for it; in a thread of its own, because answers need the
        others."""
        with self._changed:
            loading = self._loads.get(name)
            if loading is None:
                loading = self._loads[name] = self._loader.submit(self._load_one, name)
                loading.add_done_callback(lambda _done: self._loads.pop(name, None))
            return loading

    def _end(self, resident: _Resident) -> None:
        with self._changed:
            resident.answering -= 1
            self._changed.notify_all()

    def _normal(self, name: str) -> str:
        """A model's name as this worker writes it. `main` is left out, unless the worker's own model is another
        revision of that repo, which answers to the bare name."""
        try:
            reference = parse_reference(name)
        except ModelStoreError as error:  # as `gpt-4` is none of the forms that a model has here
            raise self._not_served(name) from error
        own = self._settings.model
        is_other_revision = own is not None and own.name == reference.name and own.revision != reference.revision
        return f"{reference.name}@{reference.revision}" if is_other_revision and "@" in name else str(reference)

    def _check_allowed(self, name: str) -> None:
        if not self._settings.allowed_models or parse_reference(name) not in self._settings.allowed_models:
            raise self._not_served(name)

    def _not_served(self, name: str) -> JobError:
        settings = self._settings
        others = map(str, settings.allowed_models)
        return not_served(name, self.model, *settings.served_names, *settings.adapters, *others)

    def _all(self) -> list[_Resident]:
        return [self._own, *self._others.values()]

    def _loaded_one(self, name: str) -> _Resident | None:
        """A model that is loaded, with one more answer counted, so that it is not unloaded."""
        with self._changed:
            resident = self._others.get(name)
            if resident is not None:
                resident.answering += 1
                resident.used_at = time.monotonic()
            return resident

    def _load_one(self, name: str) -> None:
        """Load a model, giving up others until there is room."""
        while name not in self._others:
            try:
                engine = self._load(replace(self._settings, model=parse_reference(name)))
            except DoesNotFit as error:
                if not self._unload_one():
                    raise JobError(Code.MODEL_UNAVAILABLE, str(error)) from error
                continue
            except ModelStoreError as error:
                raise JobError(Code.MODEL_UNAVAILABLE, f"{type(error).__name__}: {error}") from error
            logger.info("%s is loaded beside %d other models", name, len(self._others) + 1)
            with self._changed:
                self._others[name] = _Resident(engine)

    def _worth(self, name: str) -> tuple[bool, bool, float]:
        """The reasons for keeping a loaded model: jobs that wait for it, running answers, the time of its last use."""
        resident = self._others[name]
        return name in self._waiting, resident.answering > 0, resident.used_at

    def _unload_one(self) -> bool:
        """Unload the least recently used model that a job brought, once it runs no answer; whether there was one."""
        with self._changed:
            if not self._others:
                return False
            name = min(self._others, key=self._worth)
            self._changed.wait_for(lambda: name not in self._waiting)
            resident = self._others.pop(name)  # a job that asks for it from now on waits until it is loaded again
            self._changed.wait_for(lambda: not resident.answering)
        logger.info("%s makes room for another model", name)
        resident.engine.close()
        return True


class Loader:
    """See `handler.engines.Loader`."""

    def __init__(self, settings: Settings) -> None:
        self._renderer = Renderer()

    def load(self, pending: PendingStart, import_server: Callable[[], None]) -> MultiModelEngine:
        build = partial(TextEngine.load, while_reading=import_server, renderer=self._renderer)
        engine = pending.load(build)
        self._renderer.start()
        return MultiModelEngine(engine, pending.settings, self._load_another)

    def cancel(self) -> None:
        self._renderer.close()

    def _load_another(self, settings: Settings) -> TextEngine:
        free_memory()  # memory that torch keeps for itself would count as taken
        settings = replace(settings, adapters={})  # those of the worker's own model
        pending = begin(settings, timeline=Timeline(), check_config=check_generates_text)
        try:
            return pending.load(partial(TextEngine.load, renderer=self._renderer))
        except BaseException:
            pending.in_use.end()
            raise
