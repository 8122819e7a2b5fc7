"""A stand-in for RunPod: the worker's side of its protocol and the public API over it. Real HTTP, unmodified SDK.

    worker   job-take, job-take-batch, job-stop (long polls), job-done, job-stream, ping
    client   run, runsync, status, stream, cancel, health, purge-queue, openai/v1/…
    owner    REST, version 2: see runpod_owner.py

Jobs of a worker that stops to ping go back to the queue, if a test asks for it.
"""

from __future__ import annotations

import json
import queue
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.runpod_owner import PREFIXES, Account, Problem

ENDPOINT = "endpoint-1"
KEY = "rpa_key"
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
_POLL_S = 0.5
_RELAY_S = 0.05  # from a worker's chunk to the client of OpenAI's routes


@dataclass
class Job:
    """One job, as the platform sees it."""

    id: str
    input: object
    status: str = "IN_QUEUE"
    worker: str = ""
    taken: int = 0
    output: Any = None
    error: Any = None
    stream: list[Any] = field(default_factory=list)
    streamed: int = 0
    progress: list[Any] = field(default_factory=list)
    after_the_end: list[Any] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)  # the worker of each final result, also of those that came late
    stops_pod: bool = False

    def as_json(self) -> dict[str, Any]:
        said: dict[str, Any] = {"id": self.id, "status": self.status, "delayTime": 1, "executionTime": 1}
        if self.worker:
            said["workerId"] = self.worker
        said |= {name: value for name in ("output", "error") if (value := getattr(self, name)) is not None}
        return said


class RunPod:
    """Hands out jobs to whichever worker takes them, and keeps what they post."""

    def __init__(self, *, lost_after_s: float | None = None) -> None:
        """`lost_after_s`: a worker that has not pinged for so long loses its jobs to the others."""
        self.jobs: dict[str, Job] = {}
        self.results: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        self.pings: dict[str, float] = {}
        self.changed = threading.Condition()
        self.refusals: list[int] = []  # statuses for the client's next requests; 0 breaks the connection
        self.requests: list[tuple[str, str]] = []
        self._lost_after_s = lost_after_s
        self._queue: list[Job] = []
        self._stops: dict[str, list[str]] = {}
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.runpod = self
        self.url = f"http://127.0.0.1:{self._server.server_port}/v2"
        self.account = Account(KEY, self.url, worker_env=self.worker_env)

    def submit(self, job_id: str, job_input: object) -> Job:
        with self.changed:
            job = self.jobs[job_id] = Job(job_id, job_input)
            self._queue.append(job)
            self.changed.notify_all()
            return job

    def result(self, timeout_s: float = 240.0) -> tuple[str, dict[str, Any]]:
        """The next posted result: job id and body."""
        return self.results.get(timeout=timeout_s)

    def wait(self, ready: Callable[[], object], timeout_s: float = 240.0) -> bool:
        """Wait for something that a request changes."""
        with self.changed:
            return bool(self.changed.wait_for(ready, timeout_s))

    def cancel(self, job: Job) -> None:
        with self.changed:
            if job.status not in FINAL:
                if job.status == "IN_PROGRESS":
                    self._stops.setdefault(job.worker, []).append(job.id)
                job.status = "CANCELLED"
                self._queue = [other for other in self._queue if other is not job]
                self.changed.notify_all()

    def worker_env(self, worker: str) -> dict[str, str]:
        """What RunPod sets in a worker's container."""
        base = f"{self.url}/{ENDPOINT}"
        return {
            "RUNPOD_POD_ID": worker,
            "RUNPOD_ENDPOINT_ID": ENDPOINT,
            "RUNPOD_AI_API_KEY": KEY,
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?gpu=none",
            "RUNPOD_PING_INTERVAL": "1000",
            # The SDK's own checks ask for a network and 4 GB of free memory; they are RunPod's, not ours.
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }

    @property
    def env(self) -> dict[str, str]:
        return self.worker_env("pod-1")

    @property
    def client_env(self) -> dict[str, str]:
        """For the SDK's client."""
        return {
            "RUNPOD_ENDPOINT_BASE_URL": self.url,
            "RUNPOD_API_BASE_URL": self.url.removesuffix("/v2"),
            "RUNPOD_API_KEY": KEY,
        }

    @contextmanager
    def running(self) -> Iterator[RunPod]:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()

    def take(self, worker: str, most: int) -> list[Job]:
        """Up to `most` jobs for a worker, after a while none."""

        def free() -> bool:
            self._take_from_the_lost()
            return bool(self._queue)

        with self.changed:
            self.changed.wait_for(free, _POLL_S)
            taken, self._queue = self._queue[:most], self._queue[most:]
            for job in taken:
                job.status, job.worker, job.taken = "IN_PROGRESS", worker, job.taken + 1
            self.changed.notify_all()
            return taken

    def _take_from_the_lost(self) -> None:
        if self._lost_after_s is None:
            return
        before = time.monotonic() - self._lost_after_s
        for job in self.jobs.values():
            if job.status == "IN_PROGRESS" and self.pings.get(job.worker, 0.0) < before:
                job.status, job.worker = "IN_QUEUE", ""
                self._queue.append(job)

    def stops(self, worker: str) -> list[str]:
        with self.changed:
            self.changed.wait_for(lambda: self._stops.get(worker), _POLL_S)
            return self._stops.pop(worker, [])

    def done(self, worker: str, job_id: str, body: dict[str, Any]) -> None:
        with self.changed:
            job = self.jobs[job_id]
            job.answers += [worker] if body.get("status") != "IN_PROGRESS" else []
            if body.get("status") == "IN_PROGRESS":
                (job.after_the_end if job.status in FINAL else job.progress).append(body["output"])
            elif job.status in FINAL or job.worker != worker:
                job.after_the_end.append(body)
            else:
                job.output, job.error = body.get("output"), body.get("error")
                job.status = "FAILED" if job.error else "COMPLETED"
                job.stops_pod = bool(body.get("stopPod"))
            self.changed.notify_all()
        if body.get("status") != "IN_PROGRESS":
            self.results.put((job_id, body))

    def stream(self, job_id: str, body: dict[str, Any]) -> None:
        with self.changed:
            job = self.jobs[job_id]
            (job.after_the_end if job.status in FINAL else job.stream).append(body["output"])
            self.changed.notify_all()

    def health(self) -> dict[str, Any]:
        count = dict.fromkeys(("IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED"), 0)
        for job in self.jobs.values():
            count[job.status] = count.get(job.status, 0) + 1
        jobs = {
            "inQueue": count["IN_QUEUE"],
            "inProgress": count["IN_PROGRESS"],
            "completed": count["COMPLETED"],
            "failed": count["FAILED"],
        }
        return {"jobs": jobs, "workers": {"running": len(self.pings), "idle": 0}}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    runpod: RunPod

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A worker that is killed breaks its connections: that is no error here."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._route(None)

    def do_DELETE(self) -> None:
        self._route(None)

    def do_PATCH(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._route(json.loads(data) if data.strip() else {})

    def _route(self, body: Any) -> None:
        url = urlsplit(self.path)
        if url.path.split("/")[2:3] and url.path.split("/")[2] in PREFIXES:
            key = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if url.path.endswith("/logs"):
                return self._log(url.path, key)
            return self._answer(*self.server.runpod.account.answer(self.command, url.path, body, key))
        _, _v2, endpoint, action, *rest = [unquote(part) for part in url.path.split("/")]
        runpod = self.server.runpod
        if endpoint not in (ENDPOINT, *runpod.account.endpoints):
            return self._answer(404, {"error": "no such endpoint"})
        if self.headers.get("Authorization", "").removeprefix("Bearer ") != KEY:
            return self._answer(401, {"error": "unauthorized"})
        with suppress(BrokenPipeError, ConnectionResetError):
            if action in ("job-take", "job-take-batch"):
                most = int(parse_qs(url.query).get("batch_size", ["1"])[0])
                jobs = [{"id": job.id, "input": job.input} for job in runpod.take(rest[0], most)]
                return self._answer(200, jobs if action == "job-take-batch" else jobs[0]) if jobs else self._answer(204)
            if action == "job-stop":
                stops = runpod.stops(rest[0])
                return self._answer(200, {"jobsToStop": stops}) if stops else self._answer(204)
            if action == "ping":
                runpod.pings[rest[0]] = time.monotonic()
                return self._answer(200, {})
            if action == "job-done":
                if not isinstance(body.get("error"), str | None):  # runpod-python, issue 299
                    return self._answer(400, {"error": "cannot unmarshal object into field error of type string"})
                runpod.done(rest[0], rest[1], body)
                return self._answer(200, {})
            if action == "job-stream":
                runpod.stream(rest[1], body)
                return self._answer(200, {})
            return self._client(endpoint, action, rest, body)

    def _log(self, path: str, key: str) -> None:
        """The lines of a container as server-sent events, until its end or the client's."""
        account = self.server.runpod.account
        try:
            name = account.log(path, key)
        except Problem as problem:
            return self._answer(problem.status, problem.body, "application/problem+json")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        begin = int(self.headers.get("Last-Event-ID") or -1) + 1
        machines = account.machines
        assert machines is not None
        with suppress(ConnectionError):
            while True:
                has_ended = machines.status(name) != "RUNNING"
                lines = machines.lines(name)
                for number, line in enumerate(lines[begin:], begin):
                    record = {"ts": "2026-06-01T12:00:00Z", "source": "container", "line": line}
                    self.wfile.write(f"id: {number}\ndata: {json.dumps(record)}\n\n".encode())
                begin = max(begin, len(lines))
                if has_ended:
                    return None
                time.sleep(0.05)

    def _client(self, endpoint: str, action: str, rest: list[str], body: Any) -> None:
        runpod = self.server.runpod
        runpod.requests.append((self.command, action))
        if runpod.refusals:
            status = runpod.refusals.pop(0)
            if status:
                return self._answer(status, {"error": "not now"})
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if action == "health":
            return self._answer(200, runpod.health())
        if action == "purge-queue":
            waiting = [job for job in runpod.jobs.values() if job.status == "IN_QUEUE"]
            for job in waiting:
                runpod.cancel(job)
            return self._answer(200, {"removed": len(waiting), "status": "completed"})
        if action == "openai":
            return self._openai("/" + "/".join(rest), body)
        if action in ("run", "runsync"):
            if "input" not in body:
                return self._answer(400, {"error": "input is missing"})
            job = runpod.submit(f"{uuid.uuid4()}-e1", body["input"])
            runpod.account.job_arrived(endpoint)
            if action == "runsync":
                runpod.wait(lambda: job.status in FINAL)
            return self._answer(200, job.as_json())
        found = runpod.jobs.get(rest[0]) if rest else None
        if found is None:
            return self._answer(404, {"error": "no such job"})
        if action == "cancel":
            runpod.cancel(found)
        if action == "stream":
            runpod.wait(lambda: len(found.stream) > found.streamed or found.status in FINAL, _POLL_S)
            with runpod.changed:
                chunks, found.streamed = found.stream[found.streamed :], len(found.stream)
                said = {"status": found.status, "stream": [{"output": chunk} for chunk in chunks]}
            return self._answer(200, said)
        return self._answer(200, found.as_json())

    def _openai(self, route: str, body: Any) -> None:
        runpod = self.server.runpod
        job_input: dict[str, Any] = {"openai_route": route}
        if body is not None:
            job_input["openai_input"] = body
        job = runpod.submit(f"{uuid.uuid4()}-e1", job_input)
        if not (body or {}).get("stream"):
            runpod.wait(lambda: job.status in FINAL)
            return self._openai_error(job.error) if job.error else self._answer(200, job.output)
        runpod.wait(lambda: job.stream or job.status in FINAL)
        if job.error:
            return self._openai_error(job.error)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while job.streamed < len(job.stream) or job.status not in FINAL:
            runpod.wait(lambda: len(job.stream) > job.streamed or job.status in FINAL, _POLL_S)
            arrived = len(job.stream)
            time.sleep(_RELAY_S)
            while job.streamed < arrived:
                data = job.stream[job.streamed].encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                job.streamed += 1
        self.wfile.write(b"0\r\n\r\n")
        return None

    def _openai_error(self, text: str) -> None:
        """A job's error as an HTTP status and OpenAI's error object, which the worker sends as a text."""
        try:
            error = json.loads(text)
        except ValueError:
            error = {"message": text}
        return self._answer(error.pop("status", 500), {"error": error})

    def _answer(self, status: int, body: Any = None, kind: str = "application/json") -> None:
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""
