"""A start that fails tells its reason to the jobs that wait for this endpoint, once, before the process ends.

Else nobody would: the worker's log has it, RunPod starts the worker again, and the jobs wait on.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from handler.errors import Code, JobError
from handler.redaction import VolumePaths

logger = logging.getLogger(__name__)

_ASK_S = 5.0  # RunPod holds the question for jobs open while there are none
_TELL_S = 20.0
_MOST_JOBS = 100


def tell_waiting_jobs(reason: str, paths: VolumePaths | None) -> None:
    """Take the jobs that wait at this moment, and fail them with the reason. `paths`: of the volume, which it does not
    show. A process that is not RunPod's has none."""
    if not os.environ.get("RUNPOD_WEBHOOK_GET_JOB"):
        return
    text = f"the worker's start failed: {reason}"
    error = JobError(Code.MODEL_UNAVAILABLE, text if paths is None else paths.hidden_in(text))
    try:
        count = asyncio.run(_tell(error))
    except Exception as failure:  # the reason of the start is what counts
        logger.warning("no waiting job was told of it: %s: %s", type(failure).__name__, failure)
        return
    logger.info("%d waiting jobs were told the reason", count)


async def _tell(error: JobError) -> int:
    """Fail the waiting jobs; returns how many they were."""
    from runpod.http_client import AsyncClientSession
    from runpod.serverless.modules.rp_http import send_result
    from runpod.serverless.modules.rp_job import get_job

    from handler.worker import error_output

    async with AsyncClientSession() as session:
        try:
            async with asyncio.timeout(_ASK_S):
                jobs: list[dict[str, Any]] = await get_job(session, _MOST_JOBS) or []
        except TimeoutError:
            return 0
        async with asyncio.timeout(_TELL_S):
            for job in jobs:
                output = error_output(error, job)
                await send_result(session, {"error": output.pop("error"), "output": output}, job)
        return len(jobs)
