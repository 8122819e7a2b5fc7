"""A stand-in for RunPod's side of the worker protocol: jobs are put in, results come out. Real HTTP, unmodified SDK."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_TAKE_S = 0.5


class RunPod:
    """Hands out jobs to whichever worker takes them, and keeps what they post."""

    def __init__(self) -> None:
        self.results: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        self.pings = 0
        self._jobs: queue.Queue[dict[str, Any]] = queue.Queue()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.runpod = self

    def submit(self, job_id: str, job_input: object) -> None:
        self._jobs.put({"id": job_id, "input": job_input})

    def result(self, timeout_s: float = 60.0) -> tuple[str, dict[str, Any]]:
        """The next posted result: job id and body."""
        return self.results.get(timeout=timeout_s)

    @property
    def env(self) -> dict[str, str]:
        """What RunPod sets in a worker's container."""
        url = f"http://127.0.0.1:{self._server.server_port}"
        return {
            "RUNPOD_POD_ID": "pod-1",
            "RUNPOD_ENDPOINT_ID": "endpoint-1",
            "RUNPOD_AI_API_KEY": "rpa_key",
            "RUNPOD_WEBHOOK_GET_JOB": f"{url}/v2/endpoint-1/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{url}/v2/endpoint-1/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{url}/v2/endpoint-1/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{url}/v2/endpoint-1/ping/$RUNPOD_POD_ID?gpu=none",
            "RUNPOD_PING_INTERVAL": "1000",
            # The SDK's own checks ask for a network and 4 GB of free memory; they are RunPod's, not ours.
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }

    @contextmanager
    def running(self) -> Iterator[RunPod]:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    runpod: RunPod


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        action = urlsplit(self.path).path.split("/")[3]
        runpod = self.server.runpod
        if action == "ping":
            runpod.pings += 1
            return self._answer(200, b"{}")
        try:
            job = runpod._jobs.get(timeout=_TAKE_S) if action == "job-take" else None
        except queue.Empty:
            job = None
        if job is None:
            return self._answer(204, b"")
        return self._answer(200, json.dumps(job).encode())

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        pieces = urlsplit(self.path).path.split("/")
        if pieces[3] == "job-done":
            self.server.runpod.results.put((pieces[5], json.loads(data)))
        self._answer(200, b"{}")

    def _answer(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""
