"""One small job before a worker takes jobs, so that the first of those finds the GPU's kernels and workspaces loaded.

It goes the way of every job. If it fails, the start goes on, with a line in the log: the job was of our own making.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from handler.engines import ENGINES, Engine
from handler.worker import Worker
from modelstore.settings import EngineName, Settings
from modelstore.timeline import Timeline

logger = logging.getLogger(__name__)


def warm_up(engine: Engine, settings: Settings, timeline: Timeline) -> None:
    """Have an engine answer the first of its warm-up jobs that it takes, if MODELSTORE_WARM_UP says so; by default if
    it runs on a GPU."""
    status = engine.status()
    name: EngineName = status["engine"]
    device = str(status.get("memory", {}).get("device", "cpu"))
    is_wanted = device != "cpu" if settings.warm_up is None else settings.warm_up
    if is_wanted and ENGINES[name].warm_up_jobs:
        with timeline.span("warmup"):
            error = asyncio.run(_answered(Worker(engine, settings, may_upload=False), ENGINES[name].warm_up_jobs))
        if error is not None:
            gc.collect()  # the collector is paused in a start, and what it then finds stays for good
            logger.warning("the model could not be warmed up, so the first job takes longer: %s", error)


async def _answered(worker: Worker, inputs: Sequence[Mapping[str, Any]]) -> Any:
    """The error of the last job; None if one was answered."""
    error: Any = None
    for each in inputs:
        output = await worker.handle({"id": "warm-up", "input": dict(each)})
        error = output.get("error") if isinstance(output, dict) else None
        if error is None:
            break
    return error
