"""Requests over HTTP as jobs of a worker: read within limits, answered whole or as a stream of server-sent events.

Every refusal of this file is a Starlette HTTPException; all other answers come from the worker.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from handler import openai_routes
from handler.delivery import Job, JobChannel
from handler.errors import Code, JobError
from handler.worker import Worker
from modelstore.settings import Settings
from modelstore.units import one_line, size

logger = logging.getLogger(__name__)

MOST_BYTES = 30_000_000  # of a request and of an answer, as RunPod's load balancer has it
_MOST_WAITING = 1000
_MOST_HELD_BYTES = 256_000_000
_MOST_VALUES = 1_000_000  # in a body, which costs memory and the time to parse it
_VALUE_BYTES = 64
_BODY_S = 60.0  # for a body to arrive
_PIECE_BYTES = 1 << 16  # of an answer
_TAKEN_S = 330.0  # for a whole answer to be taken, as long as RunPod's load balancer waits for a request
_CLOSE = {"Connection": "close"}  # its body is not read to the end
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class _ResponseChannel(JobChannel):
    """The way to a client: the chunks of a stream, as server-sent events. It waits for a client that reads slowly."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_begun = False

    async def stream(self, job: Job, chunks: list[Any]) -> None:
        if not self.has_begun:
            self.has_begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
        text = "".join(each if isinstance(each, str) else f"data: {json.dumps(each)}\n\n" for each in chunks)
        await _send_pieces(self._send, text.encode())

    async def end(self) -> None:
        """The end of the stream."""
        await self._send({"type": "http.response.body", "body": b""})


class Requests:
    """Takes requests from many clients, and holds as many as fit into a known amount of memory; as many at once as the
    worker answers are jobs, and the others wait."""

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self._worker = worker
        self._key = settings.api_key
        self._limit_s = settings.max_job_s or None
        self._slots = asyncio.Semaphore(worker.concurrency(0))
        self._held_bytes = 0
        self._unanswered = 0
        self.waiting = 0
        self.closing_since: float | None = None

    @property
    def is_healthy(self) -> bool:
        """Whether more requests should come."""
        return self.closing_since is None and not self._worker.retiring

    @property
    def is_idle(self) -> bool:
        """Whether each request is answered."""
        return not self._unanswered and self._worker.is_idle

    def check_key(self, request: Request) -> None:
        """Raise HTTPException if a key is set, and the request has another one."""
        if self._key is None:
            return
        kind, _space, text = request.headers.get("authorization", "").partition(" ")
        texts = (text.strip() if kind.lower() == "bearer" else "", request.headers.get("x-api-key", ""))
        # On RunPod, Authorization holds the platform's own key.
        if not any(hmac.compare_digest(each.encode(), self._key.encode()) for each in texts):
            raise HTTPException(401, "the API key is missing or wrong: send it as Authorization: Bearer, or X-API-Key")

    def check_open(self) -> None:
        """Raise HTTPException if no more requests are taken, or too many wait."""
        if self._worker.broken:
            raise HTTPException(503, "this worker takes no more requests: send it again", {"Retry-After": "1"})
        if self.waiting >= _MOST_WAITING or self._held_bytes >= _MOST_HELD_BYTES:
            raise _too_many()

    async def openai(self, request: Request) -> ASGIApp:
        """A request on one of OpenAI's routes."""
        return await self._accept(request, is_openai=True)

    async def generate(self, request: Request) -> ASGIApp:
        """A job's input."""
        return await self._accept(request, is_openai=False)

    async def _accept(self, request: Request, *, is_openai: bool) -> ASGIApp:
        """The answer to a request, which holds a place in the queue from now on."""
        self.check_key(request)
        self.check_open()
        self.waiting += 1
        self._unanswered += 1
        try:
            data, size_bytes = await self._body(request) if request.method == "POST" else (None, 0)
        except BaseException:
            self.waiting -= 1
            self._unanswered -= 1
            raise
        if is_openai:
            data = {"openai_route": request.url.path, "openai_input": data}
        elif data is not None and isinstance(data.get("input"), dict):
            data = data["input"]
        job = {"id": uuid.uuid4().hex, "input": data}

        async def respond(_scope: Scope, receive: Receive, send: Send) -> None:
            work = asyncio.create_task(self._run_and_send(job, size_bytes, send))
            leaving = asyncio.create_task(_wait_for_disconnect(receive))
            try:
                await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                leaving.cancel()
                if not work.done():
                    work.cancel()
                await asyncio.wait({work})
                self._unanswered -= 1
            if not work.cancelled():
                work.result()

        return respond

    async def _body(self, request: Request) -> tuple[dict[str, Any], int]:
        """The JSON object that a request carries, and the bytes that it takes in memory, which count as held from now
        on. Raises HTTPException."""
        if request.headers.get("content-type", "").strip().lower().startswith("multipart/"):
            raise HTTPException(415, "forms are not served: send JSON", _CLOSE)
        stated = request.headers.get("content-length", "")
        if stated.isdigit() and int(stated[:20]) > MOST_BYTES:
            raise _too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_S):
                async for part in request.stream():
                    body += part
                    self._held_bytes += len(part)
                    if len(body) > MOST_BYTES:
                        raise _too_large()
                    if self._held_bytes > _MOST_HELD_BYTES:
                        raise _too_many()
            values = sum(body.count(each) for each in (b",", b"[", b"{"))
            if values > _MOST_VALUES:
                raise HTTPException(400, f"a request has at most {_MOST_VALUES} values, not {values}")
            data = json.loads(body)
            if not isinstance(data, dict):
                raise HTTPException(400, "the body must be a JSON object")
        except BaseException as error:
            self._held_bytes -= len(body)
            if isinstance(error, ClientDisconnect):
                raise HTTPException(400, "the client went away") from error  # nobody reads this
            if isinstance(error, TimeoutError):
                text = f"the body has not arrived within {_BODY_S:g} s: send it again"
                raise HTTPException(408, text, _CLOSE) from error
            if isinstance(error, ValueError | RecursionError):
                raise HTTPException(400, one_line(f"the body is no JSON: {error}", 200)) from error
            raise
        self._held_bytes += _VALUE_BYTES * values
        return data, len(body) + _VALUE_BYTES * values

    async def _run_and_send(self, job: Job, size_bytes: int, send: Send) -> None:
        """Answer a job when it is its turn. The limit of its time counts from its arrival."""
        arrived_at = time.monotonic()
        channel, has_slot = _ResponseChannel(send), False
        output: Any = None
        error: JobError | None = None
        try:
            try:
                async with asyncio.timeout(self._limit_s):
                    has_slot = _takes_a_slot(job) and await self._slots.acquire()
            except TimeoutError:
                text = f"its turn has not come within {self._limit_s:g} s: send it later, or add workers"
                error = JobError(Code.TIMEOUT, text)
            finally:
                self.waiting -= 1
                self._held_bytes -= size_bytes
            began_at = time.monotonic()
            if error is None:
                left_s = self._limit_s and max(self._limit_s - (began_at - arrived_at), 0.001)
                output, error = await self._worker.run_job(job, channel, limit_s=left_s)
        finally:
            if has_slot:
                self._slots.release()
        times = {
            "delayTime": round(1000 * (began_at - arrived_at)),
            "executionTime": round(1000 * (time.monotonic() - began_at)),
        }
        if channel.has_begun:
            await channel.end()
        else:
            body, status = _whole_answer(job, output, error, times)
            output = None  # the client may take its bytes for long
            await self._send_whole(send, body, status)

    async def _send_whole(self, send: Send, body: bytes, status: int) -> None:
        """Send an answer, whose bytes count as held until they are taken. A client that takes too long gets no more."""
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        self._held_bytes += len(body)
        try:
            async with asyncio.timeout(_TAKEN_S):
                await send({"type": "http.response.start", "status": status, "headers": headers})
                await _send_pieces(send, body)
                await send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            logger.warning(
                "an answer of %s was not taken within %g s: its connection is closed", size(len(body)), _TAKEN_S
            )
        finally:
            self._held_bytes -= len(body)


def _takes_a_slot(job: Job) -> bool:
    """Whether answering a job is work."""
    data = job["input"] or {}
    return data.get("op") is None and data.get("openai_route") != "/v1/models"


def _whole_answer(job: Job, output: Any, error: JobError | None, times: Mapping[str, int]) -> tuple[bytes, int]:
    """An answer that is no stream, and its HTTP status: in OpenAI's form, or as RunPod's /runsync has it; `times` in
    milliseconds."""
    is_openai = openai_routes.is_request(job["input"] or {})
    if error is None:
        try:
            completed = {"id": job["id"], "status": "COMPLETED", **times, "output": output}
            return _encoded(output if is_openai else completed), 200
        except ValueError:
            error = JobError(Code.INTERNAL_ERROR, "the model's answer holds NaN or infinity, which JSON has not")
    if is_openai:
        return _encoded(openai_routes.error_body(error)), openai_routes.status_of(error)
    payload = error.payload()
    failed = {"error": payload["error"], "output": {"code": payload["code"]}}
    return _encoded({"id": job["id"], "status": "FAILED", **times, **failed}), openai_routes.status_of(error)


def _encoded(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False).encode()


async def _send_pieces(send: Send, body: bytes) -> None:
    """Send bytes piece by piece, each when there is room for it: see `http_protocol.TAKEN_S`."""
    for begin in range(0, len(body), _PIECE_BYTES):
        piece = body[begin : begin + _PIECE_BYTES]
        await send({"type": "http.response.body", "body": piece, "more_body": True})


def _too_large() -> HTTPException:
    return HTTPException(413, f"a request has at most {size(MOST_BYTES)}: send less at once", _CLOSE)


def _too_many() -> HTTPException:
    return HTTPException(503, "too many requests wait for this worker: send it later", {"Retry-After": "2"})


async def _wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
