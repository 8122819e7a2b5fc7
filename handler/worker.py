"""The RunPod loop: one loaded engine, the handler that the SDK calls, and what becomes of errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from handler.engines import Engine
from handler.jobs import Code, JobError, completed, parse_job

logger = logging.getLogger(__name__)

Handler = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def make_handler(engine: Engine) -> Handler:
    """The handler for `runpod.serverless.start`: never raises but for cancellation, one generation at a time.

    It is a coroutine and generates in a thread, because the SDK runs handlers on its event loop: a plain function would
    hold up pings and stop signals for as long as it runs.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="generate")

    async def handler(job: Mapping[str, Any]) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(thread, answer, engine, job)

    return handler


def answer(engine: Engine, job: Mapping[str, Any]) -> dict[str, Any]:
    """The output of one job, or its error."""
    try:
        request = parse_job(job, model=engine.model)
        return completed(engine.generate(request), request, model=engine.model)
    except JobError as error:
        logger.info("job %s: %s: %s", job.get("id"), error.code, error)
        return error.payload()
    except Exception as error:  # whatever a job does, the worker lives on
        failed = _job_error(error)
        logger.exception("job %s: %s", job.get("id"), failed.code)
    # Out of the except block: the traceback, and with it the tensors in its frames, is gone when memory is freed.
    if failed.code is Code.OOM:
        engine.free_memory()
    return failed.payload()


def _job_error(error: Exception) -> JobError:
    text = str(error)
    if isinstance(error, MemoryError) or any(phrase in text.lower() for phrase in _OUT_OF_MEMORY):
        return JobError(Code.OOM, "out of memory: send a shorter prompt or a smaller max_tokens")
    return JobError(Code.INTERNAL_ERROR, f"{type(error).__name__}: {text[:500]}")


def serve(engine: Engine) -> None:
    """Take jobs until the SDK ends the process."""
    import runpod

    runpod.serverless.start({"handler": make_handler(engine)})
