"""The RunPod loop: one loaded engine, the handler that the SDK calls, and what becomes of errors.

The handler is a coroutine and no generator, though it streams: the SDK turns a generator's typed error into a bare
text, drops what had been aggregated, ignores its refresh_worker, and wraps every plain answer in a list. Chunks of a
stream go out by the SDK's own `stream_result` as they come, and all of them once more as the job's output, as the SDK
does it with `return_aggregate_stream`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from handler import openai_routes
from handler.alias_follower import AliasFollower
from handler.engines import Engine, ImageEngine, OpenAIEngine, TextEngine
from handler.images import Images, Step, parse_image
from handler.jobs import (
    Answer,
    Code,
    JobError,
    Limits,
    Piece,
    input_of,
    is_out_of_memory,
    merged,
    parse_text,
    shown,
)
from handler.termination import Termination
from modelstore.settings import Settings

logger = logging.getLogger(__name__)

Job = Mapping[str, Any]
T = TypeVar("T")

_PROGRESS_EVERY_S = 5.0


class Wire:
    """What goes to RunPod while a job runs. This one says nothing: there is nobody to tell in a local run."""

    async def stream(self, job: Job, chunks: list[Any]) -> None:
        """Send chunks of a stream; returns when they are there."""

    async def progress(self, job: Job, progress: Mapping[str, Any]) -> None:
        """Send a progress update; returns when it is there, so that it cannot come after the result."""


class RunPodWire(Wire):
    """By the SDK's own functions, over one HTTP session."""

    def __init__(self) -> None:
        self._session: Any = None

    def _opened(self) -> Any:
        if self._session is None:
            from runpod.http_client import AsyncClientSession

            self._session = AsyncClientSession()
        return self._session

    async def stream(self, job: Job, chunks: list[Any]) -> None:
        from runpod.serverless.modules.rp_http import stream_result

        for chunk in chunks:
            await stream_result(self._opened(), {"output": chunk}, job)

    async def progress(self, job: Job, progress: Mapping[str, Any]) -> None:
        from runpod.serverless.modules.rp_http import send_result

        await send_result(self._opened(), {"status": "IN_PROGRESS", "output": dict(progress)}, job)


class Worker:
    """Answers jobs with one engine. Nothing that a job does ends it."""

    def __init__(
        self, engine: Engine, settings: Settings, *, wire: Wire | None = None, timeline: Mapping[str, Any] | None = None
    ) -> None:
        """`timeline`: the record of this worker's start, for its status."""
        self._engine = engine
        self._settings = settings
        self._limits = Limits(
            max_tokens=settings.max_tokens,
            prompt_characters=settings.max_prompt_characters,
            prompts=settings.max_prompts,
            steps=settings.max_steps,
            pixels=settings.max_pixels,
            images=settings.max_images,
        )
        folders = sorted({str(settings.root), str(settings.root.parent)} - {"/"}, key=len, reverse=True)
        self._volume = re.compile(rf"(?:file://)?(?:{'|'.join(map(re.escape, folders))})(?:/[^\s'\":,;()]*)?")
        self._wire = wire or Wire()
        self._timeline = timeline
        self._replace_because = ""
        self.config: dict[str, Any] = {}
        self._began = time.monotonic()
        self._counts = {"running": 0, "completed": 0, "failed": 0, "cancelled": 0}

    async def handle(self, job: Job) -> Any:
        """The output of one job, or its error; raises nothing but cancellation."""
        self._counts["running"] += 1
        how = "cancelled"
        try:
            output, error = await self._answered(job)
            how = "completed" if error is None else "failed"
        finally:
            self._counts["running"] -= 1
            self._counts[how] += 1
        if error is not None:
            error = JobError(error.code, self._without_paths(str(error)))
            output = openai_routes.failed(error) if _is_openai(job) else dict[str, Any](error.payload())
        if self.retiring and self.is_idle:
            self.config["refresh_worker"] = True  # the SDK says so with this job's result, and ends
        return output

    @property
    def is_idle(self) -> bool:
        """Whether no job is being answered."""
        return not self._counts["running"]

    @property
    def retiring(self) -> bool:
        """Whether this worker takes no more jobs, and ends with the last that it has."""
        return bool(self._engine.broken or self._replace_because)

    def concurrency(self, _current: int) -> int:
        """How many jobs to take at once. The SDK takes none before it is free where this changes."""
        most = 1 if isinstance(self._engine, ImageEngine) else self._settings.max_concurrency
        return 1 if self.retiring else most

    def replace(self, reason: str) -> None:
        """Have RunPod replace this worker once what it runs is answered; the job after that, where it runs nothing."""
        logger.warning("this worker asks to be replaced: %s", reason)
        self._replace_because = reason

    async def _answered(self, job: Job) -> tuple[Any, JobError | None]:
        limit_s = self._settings.max_job_s or None
        clock = asyncio.timeout(limit_s)
        try:
            async with clock:
                return await self._answer(job), None
        except JobError as error:
            logger.info("job %s: %s: %s", job.get("id"), error.code, error)
            return None, error
        except BaseException as error:  # a library's panic or a SystemExit too: each job gets an answer
            if isinstance(error, asyncio.CancelledError) and _is_being_cancelled():
                raise
            if clock.expired():
                text = f"the job took longer than {limit_s:g} s: ask for fewer tokens, or raise MODELSTORE_MAX_JOB_S"
                failed = JobError(Code.TIMEOUT, text)
            else:
                failed = _job_error(error)
            logger.exception("job %s: %s", job.get("id"), failed.code)
            return None, failed

    async def _answer(self, job: Job) -> Any:
        data = input_of(job, self._limits)
        if data.get("op") is not None:
            if data["op"] != "status":
                raise JobError(Code.INVALID_INPUT, f"op must be status, not {shown(data['op'])}")
            return self.status()
        if _is_openai(job):
            return await self._answer_openai(job, data)
        if isinstance(self._engine, ImageEngine):
            return await self._draw(job, data, self._engine)
        request = parse_text(data, self._limits)
        answer = Answer(request)

        def chunks(piece: Piece) -> list[Any]:
            answer.add(piece)
            return answer.chunks(piece) if request.stream else []

        def progress(piece: Piece) -> Mapping[str, Any] | None:
            return None if all(answer.reasons) else {"tokens_generated": sum(answer.tokens)}

        said = await self._consumed(job, self._text_engine().generate(request), chunks, merged, progress)
        return said if request.stream else answer.output()

    async def _draw(self, job: Job, data: Mapping[str, Any], engine: ImageEngine) -> Any:
        request = parse_image(data, self._limits)
        output: dict[str, Any] = {}

        def chunks(drawn: Step | Images) -> list[Any]:
            if isinstance(drawn, Images):
                output.update(drawn.as_json(request))
                return [output | {"progress": 1.0, "finished": True}] if request.stream else []
            return [drawn.as_json()] if request.stream else []

        def progress(drawn: Step | Images) -> Mapping[str, Any] | None:
            return drawn.as_json() if isinstance(drawn, Step) and drawn.step < drawn.steps else None

        said = await self._consumed(job, engine.draw(request), chunks, list, progress)
        return said if request.stream else output

    def _text_engine(self) -> TextEngine:
        if not isinstance(self._engine, TextEngine):
            raise JobError(Code.INVALID_INPUT, f"this worker draws with {self._engine.model}: send a prompt alone")
        return self._engine

    async def _answer_openai(self, job: Job, data: Mapping[str, Any]) -> Any:
        if isinstance(self._engine, OpenAIEngine):
            return await self._pass_on(job, data, self._engine)
        route = openai_routes.parse_route(data["openai_route"])
        if route == "models":
            return openai_routes.models(self._models(), created=int(time.time()))
        body = data.get("openai_input")
        request = openai_routes.parse_body(route, body, self._limits)
        assert isinstance(body, dict)
        answer = openai_routes.OpenAIAnswer(route, request, job_id=str(job.get("id")), created=int(time.time()))

        def events(piece: Piece) -> list[Any]:
            answer.add(piece)
            return answer.events(piece) if request.stream else []

        said = await self._consumed(
            job, self._text_engine().generate(request), events, lambda events: ["".join(events)]
        )
        if not request.stream:
            return answer.output()
        end = answer.last_events(usage=openai_routes.wants_usage(body))
        await self._wire.stream(job, end)
        return said + end

    async def _pass_on(self, job: Job, data: Mapping[str, Any], engine: OpenAIEngine) -> Any:
        route, body = openai_routes.parse_request(data["openai_route"], data.get("openai_input"), self._limits)
        whole: list[dict[str, Any]] = []

        def events(said: str | dict[str, Any]) -> list[Any]:
            if isinstance(said, str):
                return [said]
            whole.append(said)
            return []

        streamed = await self._consumed(job, engine.openai(route, body), events, lambda events: ["".join(events)])
        return whole[0] if whole else streamed

    async def _consumed(
        self,
        job: Job,
        pieces: AsyncIterator[T],
        chunks: Callable[[T], list[Any]],
        together: Callable[[list[Any]], list[Any]],
        progress: Callable[[T], Mapping[str, Any] | None] = lambda _piece: None,
    ) -> list[Any]:
        """Take all pieces; send what `chunks` makes of each, with those that came while others were sent in one go.

        `progress`: what to tell of a request that is not streamed, now and then; None where its result is next.
        Returns what was sent, which is nothing for such a request.
        """
        said: list[Any] = []
        waiting: list[Any] = []
        sending: asyncio.Task[None] | None = None
        told = time.monotonic()
        try:
            async with aclosing(pieces) as source:  # type: ignore[type-var]
                async for piece in source:
                    waiting += chunks(piece)
                    if waiting and (sending is None or sending.done()):
                        now, waiting = together(waiting), []
                        said += now
                        sending = asyncio.create_task(self._wire.stream(job, now))
                    elif not said and not waiting and time.monotonic() - told >= _PROGRESS_EVERY_S:
                        told = time.monotonic()
                        if (update := progress(piece)) is not None:
                            await self._wire.progress(job, update)
            if sending is not None:
                await sending
            if waiting:
                now = together(waiting)
                await self._wire.stream(job, now)
                said += now
        finally:
            if sending is not None:
                sending.cancel()
        return said

    def _models(self) -> list[str]:
        """The names that a job may give: the worker's own model, and those that it may load beside it."""
        allowed = [str(reference) for reference in self._settings.allowed_models]
        return list(dict.fromkeys((self._engine.model, *allowed)))

    def status(self) -> dict[str, Any]:
        """What a {"op": "status"} job is told."""
        return {
            **self._engine.status(),
            "worker": self._settings.worker_id,
            "uptime_s": round(time.monotonic() - self._began, 1),
            "jobs": dict(self._counts),
            "timeline": self._told(self._timeline),
        }

    def _told(self, value: Any) -> Any:
        """A record as a job's author gets to see it."""
        if isinstance(value, dict):
            return {name: self._told(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self._told(each) for each in value]
        return self._without_paths(value) if isinstance(value, str) else value

    def _without_paths(self, text: str) -> str:
        """A text for a job's author, who need not know how the volume is laid out: paths of it are cut."""
        return self._volume.sub("<volume>", text)


def _is_openai(job: Job) -> bool:
    data = job.get("input")
    return isinstance(data, dict) and data.get("openai_route") is not None


def _is_being_cancelled() -> bool:
    """Whether the running task was cancelled from outside; else a CancelledError came from a future that was given up
    inside, and the job still wants an answer."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _job_error(error: BaseException) -> JobError:
    if is_out_of_memory(error):
        return JobError(Code.OOM, "out of memory: send a shorter prompt or a smaller max_tokens")
    return JobError(Code.INTERNAL_ERROR, f"{type(error).__name__}: {str(error)[:500]}")


def serve(engine: Engine, settings: Settings, timeline: Mapping[str, Any]) -> None:
    """Take jobs until the SDK ends the process."""
    import runpod
    from runpod.serverless.modules.worker_state import IS_LOCAL_TEST

    def model_is_as_published() -> None:
        engine.check()

    runpod.serverless.register_fitness_check(model_is_as_published)
    worker = Worker(engine, settings, wire=Wire() if IS_LOCAL_TEST else RunPodWire(), timeline=timeline)

    if settings.model is not None and settings.model.kind == "alias":
        AliasFollower(engine, settings, worker.replace).start()

    termination = Termination(lambda: worker.is_idle, engine.close)

    async def handler(job: Job) -> Any:
        output = await worker.handle(job)
        if worker.config.get("refresh_worker"):
            termination.begin()
        return output

    def concurrency(current: int) -> int:
        termination.watch_signals()  # the SDK has set its own handlers by now
        return worker.concurrency(current)

    worker.config |= {"handler": handler, "concurrency_modifier": concurrency, "return_aggregate_stream": True}
    try:
        runpod.serverless.start(worker.config)
    finally:  # a thread that is in the middle of a tensor when Python ends would abort the process
        termination.close()
