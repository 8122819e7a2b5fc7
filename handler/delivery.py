"""The delivery of one answer to RunPod: chunks of a stream as they come, progress now and then, and the output."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from handler.answers import Responder

P = TypeVar("P")
Job = Mapping[str, Any]

PROGRESS_EVERY_S = 5.0


class JobChannel:
    """The way to a job's sender while the job runs. This one sends nothing: a local run has no RunPod."""

    async def stream(self, job: Job, chunks: list[Any]) -> None:
        """Send chunks of a stream; returns when they are there."""

    async def progress(self, job: Job, progress: Mapping[str, Any]) -> None:
        """Send a progress update; returns when it is there, so that it cannot come after the result."""


class RunPodChannel(JobChannel):
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


async def deliver(job: Job, pieces: AsyncIterator[P], responder: Responder[P], channel: JobChannel) -> Any:
    """Take all pieces, and send the chunks that the responder makes of each; chunks that come while others are sent go
    out together. A job that is not streamed gets its progress now and then. Returns the job's output."""
    sent: list[Any] = []
    waiting: list[Any] = []
    sending: asyncio.Task[None] | None = None
    last_progress_at = time.monotonic()
    try:
        async with aclosing(pieces) as source:  # type: ignore[type-var]
            async for piece in source:
                waiting += responder.chunks(piece)
                if waiting and (sending is None or sending.done()):
                    chunks, waiting = responder.merge(waiting), []
                    sent += chunks
                    sending = asyncio.create_task(channel.stream(job, chunks))
                elif not sent and not waiting and time.monotonic() - last_progress_at >= PROGRESS_EVERY_S:
                    last_progress_at = time.monotonic()
                    if (progress := responder.progress()) is not None:
                        await channel.progress(job, progress)
        if sending is not None:
            await sending
        if not responder.streams:
            return responder.output()
        last = [responder.merge(waiting)] if waiting else []
        for chunks in (*last, responder.last_chunks()):
            if chunks:
                await channel.stream(job, chunks)
                sent += chunks
    finally:
        if sending is not None:
            sending.cancel()
    return sent
