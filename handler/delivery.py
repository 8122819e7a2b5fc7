"""The delivery of one answer to RunPod: chunks of a stream as they come, progress now and then, and the output.

RunPod takes no result beyond a size (20 MB are reported): the SDK would log that, and the job would end without an
output and without an error. So the size is looked at here, and such a job gets an error that its sender can read.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from handler.answers import Responder
from handler.errors import Code, JobError
from modelstore.units import size

logger = logging.getLogger(__name__)

P = TypeVar("P")
Job = Mapping[str, Any]

PROGRESS_EVERY_S = 5.0
_FAIL_S = 10.0  # for the last chunks of a stream that fails


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


class Delivery:
    """One job's answer on its way. Call `close` at the end."""

    def __init__(self, job: Job, channel: JobChannel, *, most_bytes: int) -> None:
        """`most_bytes`: the largest chunk, and the largest output, that may be sent."""
        self._job = job
        self._channel = channel
        self._most_bytes = most_bytes
        self._responder: Responder[Any] | None = None
        self._sent: list[Any] = []
        self._waiting: list[Any] = []
        self._sending: asyncio.Task[None] | None = None
        self.first_piece_at: float | None = None  # on time.monotonic's clock: a text's first token

    async def run(self, pieces: AsyncIterator[P], responder: Responder[P]) -> Any:
        """Take all pieces, and send the chunks that the responder makes of each; chunks that come while others are sent
        go out together. A job that is not streamed gets its progress now and then. Returns the job's output. Raises
        JobError if a chunk is too large, or the output, which of a stream is all of its chunks."""
        self._responder = responder
        last_progress_at = time.monotonic()
        async with aclosing(pieces) as source:  # type: ignore[type-var]
            async for piece in source:
                self.first_piece_at = self.first_piece_at or time.monotonic()
                self._waiting += responder.chunks(piece)
                if self._waiting and (self._sending is None or self._sending.done()):
                    if self._sending is not None:
                        self._sending.result()
                    self._sending = asyncio.create_task(self._send_waiting(responder))
                elif not self._sent and not self._waiting and time.monotonic() - last_progress_at >= PROGRESS_EVERY_S:
                    last_progress_at = time.monotonic()
                    if (progress := responder.progress()) is not None:
                        await self._channel.progress(self._job, progress)
        if self._sending is not None:
            await self._sending
        if not responder.streams:
            output = responder.output()
            check_size(output, self._most_bytes)
            return output
        await self._send_waiting(responder)
        last = responder.last_chunks()
        check_size([*self._sent, *last], self._most_bytes)  # before the end is sent: a stream ends once
        self._waiting = last
        await self._send_waiting(responder)
        return self._sent

    async def fail(self, error: JobError) -> None:
        """End a stream of which chunks were sent: the error is its last one. The job itself fails besides."""
        responder = self._responder
        if responder is None or not responder.streams or not (self._sent or self._waiting):
            return
        try:
            async with asyncio.timeout(_FAIL_S):
                if self._sending is not None and not self._sending.done():
                    await asyncio.wait({self._sending})
                with suppress(JobError):  # of a chunk that is too large, as the error says
                    await self._send_waiting(responder)
                self._waiting = responder.failed_chunks(error)
                await self._send_waiting(responder)
        except TimeoutError:
            logger.warning("job %s: RunPod took no end of its stream", self._job.get("id"))

    def close(self) -> None:
        """Nothing more is sent."""
        if self._sending is not None:
            self._sending.cancel()

    async def _send_waiting(self, responder: Responder[Any]) -> None:
        if not self._waiting:
            return
        chunks, self._waiting = responder.merge(self._waiting), []
        for chunk in chunks:
            check_size(chunk, self._most_bytes)
        self._sent += chunks
        await self._channel.stream(self._job, chunks)


def check_size(value: Any, most_bytes: int) -> None:
    """Raise JobError if `value`, an output or a chunk of a stream, has too many bytes to be sent."""
    count = len(json.dumps(value, ensure_ascii=False).encode())
    if count > most_bytes:
        raise JobError(
            Code.RESULT_TOO_LARGE,
            f"the result has {size(count)}, and at most {size(most_bytes)} are sent (MODELSTORE_MAX_RESULT): ask for "
            "less; images are smaller as JPEG or WEBP, or as addresses in a bucket (BUCKET_ENDPOINT_URL)",
        )
