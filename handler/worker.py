"""The RunPod loop: one loaded engine, the handler that the SDK calls, and the answer to each error.

    {"input": {"prompt" | "prompts" | "messages": …}}               a text, see jobs.py; or a picture, see images.py
    {"input": {"texts": […]}}                                       vectors, see embeddings.py
    {"input": {"openai_route": "/v1/…", "openai_input": {…}}}       a request in OpenAI's form, see openai_routes.py
    {"input": {"route": "/v1/…", "body": {…}}}                      the same, as worker-vllm takes it
    {"input": {"op": "status"}}                                     the engine, counts of jobs, the start

The handler is a coroutine and no generator, though it streams: the SDK turns a generator's typed error into a bare
text, drops the aggregated chunks, ignores its refresh_worker, and wraps every plain answer in a list. Chunks of a
stream go out by the SDK's own `stream_result` as they come, and all of them once more as the job's output, as the SDK
does it with `return_aggregate_stream`.

    Worker.handle        from the SDK; over HTTP `http_requests.py` calls `run_job`
      run_job            counts the job; the output, or the error
        _run_in_time     the limit of time; each exception becomes an error that its sender can read
          _run           Engine.answer: the pieces of an answer, and its form
            Delivery.run sends the chunks, and returns the output
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from handler import openai_routes
from handler.alias_follower import AdapterFollower, AliasFollower
from handler.delivery import Delivery, Job, JobChannel, RunPodChannel
from handler.engines import Engine, ServesAdapters
from handler.errors import Code, JobError, is_out_of_memory, shown
from handler.first_answer import FirstAnswer
from handler.jobs import JobContext, Limits, input_of
from handler.redaction import VolumePaths
from handler.termination import Termination
from modelstore.settings import Settings

logger = logging.getLogger(__name__)


class Worker:
    """Answers jobs with one engine. Nothing that a job does ends it."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        *,
        channel: JobChannel | None = None,
        timeline: Mapping[str, Any] | None = None,
        may_upload: bool = True,
        first_answer: FirstAnswer | None = None,
    ) -> None:
        """`timeline`: the record of this worker's start, for its status. `may_upload`: see JobContext. `first_answer`:
        is told of each answer."""
        self._engine = engine
        self._settings = settings
        self._limits = Limits.of(settings)
        self._paths = VolumePaths(settings.root)
        self._channel = channel or JobChannel()
        self._timeline = timeline
        self._may_upload = may_upload
        self._first_answer = first_answer
        self._replace_because = ""
        self._began = time.monotonic()
        self._counts = {"running": 0, "completed": 0, "failed": 0, "cancelled": 0}

    async def handle(self, job: Job) -> Any:
        """The handler of RunPod's SDK: the output of one job, or its error; raises nothing but cancellation."""
        output, error = await self.run_job(job, self._channel)
        if error is not None:
            output = error_output(error, job)
        return output

    async def run_job(
        self, job: Job, channel: JobChannel, *, limit_s: float | None = None
    ) -> tuple[Any, JobError | None]:
        """The output of one job, or its error; what it streams goes to `channel`. `limit_s`: the time for all of it,
        MODELSTORE_MAX_JOB_S by default. Raises nothing but cancellation."""
        self._counts["running"] += 1
        outcome = "cancelled"
        try:
            output, error = await self._run_in_time(job, channel, limit_s or self._settings.max_job_s or None)
            outcome = "completed" if error is None else "failed"
        finally:
            self._counts["running"] -= 1
            self._counts[outcome] += 1
        return output, error

    @property
    def is_idle(self) -> bool:
        """Whether no job is being answered."""
        return not self._counts["running"]

    @property
    def retiring(self) -> bool:
        """Whether this worker takes no more jobs, and ends with the last that it has."""
        return bool(self.broken or self._replace_because)

    @property
    def is_finished(self) -> bool:
        """Whether this worker takes no more jobs, and has answered all that it had."""
        return self.retiring and self.is_idle

    @property
    def broken(self) -> str:
        """Why no job can be answered; empty if all is well."""
        return self._engine.broken

    def concurrency(self, _current: int) -> int:
        """The most jobs at once. The SDK takes no new job while this number changes, until all that run have ended."""
        return 1 if self.retiring else min(self._settings.max_concurrency, self._engine.jobs_at_once)

    def replace(self, reason: str) -> None:
        """Have RunPod replace this worker once its running jobs are answered; with the next job, if it runs none."""
        logger.warning("this worker asks to be replaced: %s", reason)
        self._replace_because = reason

    async def _run_in_time(self, job: Job, channel: JobChannel, limit_s: float | None) -> tuple[Any, JobError | None]:
        clock = asyncio.timeout(limit_s)
        taken_at = time.monotonic()
        delivery = Delivery(job, channel, most_bytes=self._settings.max_result_bytes)
        try:
            async with clock:
                output = await self._run(job, delivery)
            if self._first_answer is not None:
                self._first_answer.note(job, taken_at, delivery.first_piece_at)
            return output, None
        except JobError as error:
            logger.info("job %s: %s: %s", job.get("id"), error.code, error)
            failed = error
        except BaseException as error:  # a library's panic or a SystemExit too: each job gets an answer
            if isinstance(error, asyncio.CancelledError) and _is_being_cancelled():
                delivery.close()
                raise
            if clock.expired():
                text = f"the job took longer than {limit_s:.4g} s: ask for fewer tokens, or raise MODELSTORE_MAX_JOB_S"
                failed = JobError(Code.TIMEOUT, text)
            else:
                failed = _job_error(error)
            logger.exception("job %s: %s", job.get("id"), failed.code)
        failed = JobError(failed.code, self._paths.hidden_in(str(failed)))
        try:
            await delivery.fail(failed)
        finally:
            delivery.close()
        return None, failed

    async def _run(self, job: Job, delivery: Delivery) -> Any:
        data = input_of(job, self._limits.prompt_characters + self._engine.beside_the_prompt)
        if data.get("op") is not None:
            if data["op"] != "status":
                raise JobError(Code.INVALID_INPUT, f"op must be status, not {shown(data['op'])}")
            if others := [name for name, value in data.items() if name != "op" and value is not None]:
                raise JobError(Code.INVALID_INPUT, f"{others[0][:100]} is not served beside op: leave it out")
            return self.status()
        allowed = map(str, self._settings.allowed_models)
        names = (self._engine.model, *self._settings.served_names, *self._settings.adapters, *allowed)
        context = JobContext(
            str(job.get("id")),
            self._limits,
            self._settings.served_names,
            tuple(dict.fromkeys(names)),
            may_upload=self._may_upload,
        )
        pieces, responder = await self._engine.answer(data, context)
        return await delivery.run(pieces, responder)

    def status(self) -> dict[str, Any]:
        """The answer to a {"op": "status"} job."""
        return {
            **self._engine.status(),
            "worker": self._settings.worker_id,
            "uptime_s": round(time.monotonic() - self._began, 1),
            "jobs": dict(self._counts),
            "timeline": self._paths.hidden_in(self._timeline),
        }


def error_output(error: JobError, job: Job) -> dict[str, Any]:
    """The handler's return value for a job that fails, in the form of its request."""
    data = job.get("input")
    is_openai = isinstance(data, dict) and openai_routes.is_request(data)
    return dict[str, Any](openai_routes.failed(error) if is_openai else error.payload())


def _is_being_cancelled() -> bool:
    """Whether the running task was cancelled from outside; else a CancelledError came from a future that was given up
    inside, and the job still wants an answer."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _job_error(error: BaseException) -> JobError:
    if is_out_of_memory(error):
        return JobError(Code.OOM, "out of memory: send a shorter prompt or a smaller max_tokens")
    return JobError(Code.INTERNAL_ERROR, f"{type(error).__name__}: {str(error)[:500]}")


def follow_aliases(engine: Engine, settings: Settings, worker: Worker) -> None:
    """From now on, exchange the model and the adapters that aliases name when those are moved."""
    if settings.model is not None and settings.model.kind == "alias":
        AliasFollower(engine, settings, worker.replace).start()
    if isinstance(engine, ServesAdapters):
        for name, reference in settings.adapters.items():
            if reference.kind == "alias":
                AdapterFollower(engine, settings, name, worker.replace).start()


def serve(engine: Engine, settings: Settings, timeline: Mapping[str, Any], first_answer: FirstAnswer) -> None:
    """Take jobs until the SDK ends the process."""
    import runpod
    from runpod.serverless.modules.worker_state import IS_LOCAL_TEST

    def model_is_as_published() -> None:
        engine.check()

    runpod.serverless.register_fitness_check(model_is_as_published)
    channel = JobChannel() if IS_LOCAL_TEST else RunPodChannel()
    worker = Worker(engine, settings, channel=channel, timeline=timeline, first_answer=first_answer)

    follow_aliases(engine, settings, worker)
    termination = Termination(lambda: worker.is_idle, engine.close)
    config: dict[str, Any] = {}

    async def handler(job: Job) -> Any:
        output = await worker.handle(job)
        if worker.is_finished:
            config["refresh_worker"] = True  # the SDK says so with this job's result, and ends
            termination.begin()
        return output

    def concurrency(current: int) -> int:
        termination.watch_signals()  # the SDK has set its own handlers by now
        return worker.concurrency(current)

    config |= {"handler": handler, "concurrency_modifier": concurrency, "return_aggregate_stream": True}
    try:
        runpod.serverless.start(config)
    finally:  # a thread that is in the middle of a tensor when Python ends would abort the process
        termination.close()
