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

import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping
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

from handler.delivery import JobChannel
from handler.engines import Engine
from handler.first_answer import FirstAnswer
from handler.http_protocol import HEAD_S, LimitedProtocol
from handler.http_requests import MOST_BYTES, Requests
from handler.listening import Listening
from handler.termination import Termination
from handler.worker import Worker, follow_aliases
from modelstore.settings import Settings
from modelstore.units import one_line

logger = logging.getLogger(__name__)

_MOST_JOB_S = 325.0  # RunPod's load balancer ends a request after 330 s, without a word
_LEAVES_AFTER_S = 10.0  # a load balancer has seen by then that this worker is not healthy
_ENDS_AFTER_S = 2.0  # the same after a signal, whose sender may not wait long


def limited(settings: Settings) -> Settings:
    """The settings with the limits of HTTP, and of RunPod's load balancer, if this worker is behind it."""
    if settings.max_result_bytes == Settings.__dataclass_fields__["max_result_bytes"].default:
        settings = replace(settings, max_result_bytes=MOST_BYTES)
    if settings.on_runpod:
        settings = replace(settings, max_job_s=min(settings.max_job_s or _MOST_JOB_S, _MOST_JOB_S))
    return settings


def _error_answer(_request: Request, error: Exception) -> Response:
    """An error that is no job's, in OpenAI's form."""
    assert isinstance(error, HTTPException)
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    body = {"error": {"message": error.detail, "type": kind, "param": None, "code": None}}
    return JSONResponse(body, error.status_code, error.headers)


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

    async def model(request: Request) -> Response:
        requests.check_key(request)
        name = request.path_params["name"]
        job = {"id": "models", "input": {"openai_route": "/v1/models"}}
        output, error = await worker.run_job(job, JobChannel())
        listed = output["data"] if error is None else ()
        for each in listed:
            if each["id"] == name:
                return JSONResponse(each)
        raise HTTPException(404, one_line(f"{name} is not served here: GET /v1/models lists what is", 300))

    return Starlette(
        routes=[
            Route(settings.health_path, health),
            Route("/metrics", metrics),
            Route("/generate", requests.generate, methods=["POST"]),
            Route("/v1/models", requests.openai, methods=["GET"]),
            Route("/v1/models/{name:path}", model, methods=["GET"]),
            Route("/v1/{route:path}", requests.openai, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _error_answer},
    )


class _Server(uvicorn.Server):
    """Ends some time after a signal, or with the last request of a worker that takes no more."""

    def __init__(self, config: uvicorn.Config, worker: Worker, requests: Requests, ending: Callable[[], None]) -> None:
        """`ending` is called when it begins to end."""
        super().__init__(config)
        self._worker = worker
        self._requests = requests
        self._ending = ending
        self._retiring_since: float | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone: uvicorn would end the process by them, before the engine is closed."""
        yield

    async def on_tick(self, counter: int) -> bool:
        now, closing_since = time.monotonic(), self._requests.closing_since
        if closing_since is not None and now - closing_since > _ENDS_AFTER_S:
            self.should_exit = True
        if self._worker.retiring:
            self._retiring_since = self._retiring_since or now
            if now - self._retiring_since > _LEAVES_AFTER_S and self._requests.is_idle:
                self.should_exit = True
        else:
            self._retiring_since = None
        if self.should_exit:
            self._ending()
        return await super().on_tick(counter)


def serve_http(
    engine: Engine, settings: Settings, timeline: Mapping[str, Any], listening: Listening, first_answer: FirstAnswer
) -> None:
    """Take requests until a signal, or the worker itself, ends that; those that were taken are answered. Raises
    SystemExit with status 1 if the worker cannot answer any more."""
    settings = limited(settings)
    worker = Worker(engine, settings, timeline=timeline, first_answer=first_answer)
    requests = Requests(worker, settings)
    follow_aliases(engine, settings, worker)
    termination = Termination(lambda: requests.is_idle, engine.close)
    server = _Server(configured(worker, requests, settings), worker, requests, termination.begin)

    def end(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and requests.closing_since is not None:
            server.should_exit = server.force_exit = True
        requests.closing_since = requests.closing_since or time.monotonic()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    termination.watch_signals()
    logger.info("requests are taken at %s", listening.address.url)
    try:
        server.run(listening.end())
        broken = worker.broken
    finally:
        termination.close()
    if broken:
        logger.error("the worker ends: %s", broken)
        raise SystemExit(1)


def configured(worker: Worker, requests: Requests, settings: Settings) -> uvicorn.Config:
    """How uvicorn serves it."""
    return uvicorn.Config(
        application(worker, requests, settings),
        http=LimitedProtocol,  # of h11, whose parser bounds the head of a request, which httptools does not
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=int(HEAD_S),
    )
