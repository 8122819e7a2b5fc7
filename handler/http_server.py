"""The same worker over HTTP, for RunPod's load-balancing endpoints and for anyone's own machine: `--http`.

    POST /v1/…        OpenAI's routes; a stream comes as server-sent events
    GET  /v1/models
    POST /generate    a job's input, in {"input": {…}} or by itself; answered as RunPod's /runsync does, or, if it asks
                      for a stream, by its chunks as server-sent events
    GET  /ping        204 while the worker starts, 200 when it is ready, 503 when it takes no more requests
    GET  /metrics     counts of jobs, for Prometheus

A request is a job: it goes the way of those that come from RunPod's queue, with the same fields and the same errors.
The work on it ends if its client goes away.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import signal
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from handler import openai_routes
from handler.delivery import Job, JobChannel
from handler.engines import Engine
from handler.errors import JobError
from handler.listening import Listening, allow_many_connections
from handler.termination import Termination
from handler.worker import Worker, follow_aliases
from modelstore.settings import Settings
from modelstore.units import one_line, size

logger = logging.getLogger(__name__)

MOST_BYTES = 30_000_000  # of a request and of an answer, as RunPod's load balancer has it
_MOST_JOB_S = 325.0  # it ends a request after 330 s, without a word
_MOST_WAITING = 1000
_MOST_WAITING_BYTES = 256_000_000
_BODY_S = 60.0  # for a body to arrive
_SEND_S = 60.0  # for the end of an answer to be taken
_KEEP_ALIVE_S = 75
_LEAVES_AFTER_S = 10.0  # a load balancer has seen by then that this worker is not healthy
_LARGE_BYTES = 1 << 20  # a body that is parsed in a thread
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


def limited(settings: Settings) -> Settings:
    """The settings with the limits of HTTP, and of RunPod's load balancer, if this worker is behind it."""
    if settings.max_result_bytes == Settings.__dataclass_fields__["max_result_bytes"].default:
        settings = replace(settings, max_result_bytes=MOST_BYTES)
    if settings.on_runpod:
        settings = replace(settings, max_job_s=min(settings.max_job_s or _MOST_JOB_S, _MOST_JOB_S))
    return settings


class _ResponseChannel(JobChannel):
    """The way to a client: the chunks of a stream, as server-sent events, and each is taken before the next is made."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_begun = False

    async def stream(self, job: Job, chunks: list[Any]) -> None:
        if not self.has_begun:
            self.has_begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
        text = "".join(each if isinstance(each, str) else f"data: {json.dumps(each)}\n\n" for each in chunks)
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    async def end(self) -> None:
        """The end of the stream."""
        await self._send({"type": "http.response.body", "body": b""})


class Requests:
    """Takes requests from many clients, and holds as many as fit into a known amount of memory; as many at once as the
    worker answers are jobs, and the others wait."""

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self._worker = worker
        self._key = settings.api_key
        self._slots = asyncio.Semaphore(worker.concurrency(0))
        self._held_bytes = 0
        self.waiting = 0
        self.is_closing = False

    @property
    def is_healthy(self) -> bool:
        """Whether more requests should come."""
        return not (self.is_closing or self._worker.retiring)

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
        if self.is_closing or self._worker.broken:
            raise HTTPException(503, "this worker takes no more requests: send it again", {"Retry-After": "1"})
        if self.waiting >= _MOST_WAITING or self._held_bytes >= _MOST_WAITING_BYTES:
            raise HTTPException(503, "too many requests wait for this worker: send it later", {"Retry-After": "2"})

    async def openai(self, request: Request) -> ASGIApp:
        """A request on one of OpenAI's routes."""
        return await self._taken(request, is_openai=True)

    async def generate(self, request: Request) -> ASGIApp:
        """A job's input."""
        return await self._taken(request, is_openai=False)

    async def _taken(self, request: Request, *, is_openai: bool) -> ASGIApp:
        self.check_key(request)
        self.check_open()
        data, size_bytes = await self._body(request) if request.method == "POST" else (None, 0)
        if is_openai:
            data = {"openai_route": request.url.path, "openai_input": data}
        elif data is not None and isinstance(data.get("input"), dict):
            data = data["input"]
        job = {"id": uuid.uuid4().hex, "input": data}

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            work = asyncio.create_task(self._answer(job, size_bytes, scope, receive, send))
            leaving = asyncio.create_task(_gone(receive))
            try:
                await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                leaving.cancel()
                if not work.done():
                    work.cancel()
                await asyncio.wait({work})
            if not work.cancelled():
                work.result()

        return answer

    async def _body(self, request: Request) -> tuple[dict[str, Any], int]:
        """The JSON object that a request carries, and its size in bytes, which counts as held from now on. Raises
        HTTPException."""
        if request.headers.get("content-type", "").strip().lower().startswith("multipart/"):
            raise HTTPException(415, "forms are not served: send JSON")
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
            data = await asyncio.to_thread(json.loads, body) if len(body) > _LARGE_BYTES else json.loads(body)
            if not isinstance(data, dict):
                raise HTTPException(400, "the body must be a JSON object")
        except BaseException as error:
            self._held_bytes -= len(body)
            if isinstance(error, TimeoutError):
                raise HTTPException(408, f"the body has not arrived within {_BODY_S:g} s: send it again") from error
            if isinstance(error, ValueError | RecursionError):
                raise HTTPException(400, one_line(f"the body is no JSON: {error}", 200)) from error
            raise
        return data, len(body)

    async def _answer(self, job: Job, size_bytes: int, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a job when it is its turn."""
        arrived_at = time.monotonic()
        self.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1
            self._held_bytes -= size_bytes
        began_at = time.monotonic()
        channel = _ResponseChannel(send)
        try:
            output, error = await self._worker.answer(job, channel)
        finally:
            self._slots.release()
        times = {
            "delayTime": round(1000 * (began_at - arrived_at)),
            "executionTime": round(1000 * (time.monotonic() - began_at)),
        }
        try:
            async with asyncio.timeout(_SEND_S):
                if channel.has_begun:
                    await channel.end()
                else:
                    await _whole_answer(job, output, error, times)(scope, receive, send)
        except TimeoutError:
            logger.warning("job %s: its client has stopped to read", job["id"])


def _whole_answer(job: Job, output: Any, error: JobError | None, times: Mapping[str, int]) -> Response:
    """An answer that is no stream: in OpenAI's form, or as RunPod's /runsync has it, with its times in milliseconds."""
    status = 200 if error is None else openai_routes.status_of(error)
    if openai_routes.is_request(job["input"] or {}):
        return JSONResponse(output if error is None else openai_routes.error_body(error), status)
    if error is None:
        return JSONResponse({"id": job["id"], "status": "COMPLETED", **times, "output": output})
    payload = error.payload()
    failed = {"error": payload["error"], "output": {"code": payload["code"]}}
    return JSONResponse({"id": job["id"], "status": "FAILED", **times, **failed}, status)


def _too_large() -> HTTPException:
    return HTTPException(413, f"a request has at most {size(MOST_BYTES)}: send less at once")


async def _gone(receive: Receive) -> None:
    """Return when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _error_answer(_request: Request, error: Exception) -> Response:
    """An error that is no job's, in OpenAI's form."""
    assert isinstance(error, HTTPException)
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    body = {"error": {"message": error.detail, "type": kind, "param": None, "code": None}}
    # Its body may not have been read to the end.
    return JSONResponse(body, error.status_code, {**(error.headers or {}), "Connection": "close"})


def application(worker: Worker, requests: Requests, settings: Settings) -> Starlette:
    """The routes."""

    async def health(_request: Request) -> Response:
        return JSONResponse({"status": "ready"}) if requests.is_healthy else JSONResponse({"status": "ending"}, 503)

    async def metrics(request: Request) -> Response:
        requests.check_key(request)
        try:
            from handler.worker_metrics import as_text  # few are scraped
        except ModuleNotFoundError as error:
            raise HTTPException(501, "prometheus_client is not installed: add it to the image") from error
        return PlainTextResponse(as_text(worker, requests.waiting))

    return Starlette(
        routes=[
            Route(settings.health_path, health),
            Route("/metrics", metrics),
            Route("/generate", requests.generate, methods=["POST"]),
            Route("/v1/models", requests.openai, methods=["GET"]),
            Route("/v1/{route:path}", requests.openai, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _error_answer},
    )


class _Server(uvicorn.Server):
    """Ends when it is told so, or with the last request of a worker that takes no more."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self._worker = worker
        self._retiring_since: float | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone: uvicorn would end the process by them, before the engine is closed."""
        yield

    async def on_tick(self, counter: int) -> bool:
        if self._worker.retiring:
            self._retiring_since = self._retiring_since or time.monotonic()
            is_known = time.monotonic() - self._retiring_since > _LEAVES_AFTER_S
            self.should_exit = self.should_exit or (is_known and self._worker.is_idle)
        return await super().on_tick(counter)


def serve_http(engine: Engine, settings: Settings, timeline: Mapping[str, Any], listening: Listening) -> None:
    """Take requests until a signal, or the worker itself, ends that; those that were taken are answered."""
    settings = limited(settings)
    engine.check()
    worker = Worker(engine, settings, timeline=timeline)
    requests = Requests(worker, settings)
    follow_aliases(engine, settings, worker)
    allow_many_connections()
    config = uvicorn.Config(
        application(worker, requests, settings),
        http="h11",  # its parser bounds the head of a request, which httptools does not
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )
    server = _Server(config, worker)

    def end(number: int, frame: FrameType | None) -> None:
        requests.is_closing = True
        server.handle_exit(number, frame)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    termination = Termination(lambda: worker.is_idle, engine.close)
    termination.watch_signals()
    logger.info("requests are taken at http://%s:%d", listening.place.host, listening.place.port)
    try:
        server.run(listening.end())
    finally:
        termination.close()
