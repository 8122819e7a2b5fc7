"""Workers for tests: the real one behind a local server, and parts of one that misbehave as a test asks."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from handler.answers import Answer, TextDelta
from handler.delivery import JobChannel
from handler.errors import not_served
from handler.jobs import JobContext, TextRequest
from handler.text_jobs import text_answer
from modelstore.timeline import Timeline


@contextmanager
def serving(env: dict[str, str], *arguments: str, log: list[str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A worker that is ready; its log's lines go to `log`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "handler", *arguments],
        env=os.environ | env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    ready = threading.Event()

    def follow() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            if log is not None:
                log.append(line)
            if line.startswith('{"timeline"'):
                ready.set()
        ready.set()

    following = threading.Thread(target=follow, daemon=True)
    following.start()
    try:
        assert ready.wait(500), "it is not ready"
        assert process.poll() is None, "the worker ended"
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        following.join()
        assert process.stderr is not None
        process.stderr.close()


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


@contextmanager
def serving_http(env: dict[str, str], *, log: list[str] | None = None) -> Iterator[str]:
    """A worker that is ready and serves HTTP: its address."""
    port = free_port()
    with serving(env, "--http", "--port", str(port), log=log):
        yield f"http://127.0.0.1:{port}"


class Engine:
    """Answers with these pieces, or raises what it was given."""

    jobs_at_once = 1 << 30
    beside_the_prompt = 1 << 16
    model = "org/name"

    def __init__(self, *pieces: TextDelta, error: BaseException | None = None, takes_s: float = 0.0) -> None:
        self.pieces = pieces or (TextDelta(0, "hi", 1), TextDelta(0, " there", 1, "stop", 3))
        self.error = error
        self.takes_s = takes_s
        self.broken = ""
        self.left: list[str] = []

    async def answer(self, data: Mapping[str, Any], job: JobContext) -> Answer:
        return text_answer(self.generate, data, job)

    async def generate(self, request: TextRequest) -> AsyncIterator[TextDelta]:
        left = "early"
        try:
            if request.model is not None and not self.serves(request.model):
                raise not_served(request.model, self.model)
            for piece in self.pieces:
                await asyncio.sleep(self.takes_s)
                yield replace(piece, model=self.model)
            if self.error is not None:
                raise self.error
            left = "at the end"
        finally:
            self.left.append(left)

    def swap(self, reference: str) -> Timeline:
        raise NotImplementedError

    def status(self) -> dict[str, Any]:
        return {"engine": "text", "model": self.model, "commit": "c" * 40, "dtype": "float16"}

    def serves(self, name: str) -> bool:
        return name == self.model

    def check(self) -> None: ...

    def close(self) -> None: ...


class RecordedChannel(JobChannel):
    """Keeps what is sent, and takes its time."""

    def __init__(self, takes_s: float = 0.0) -> None:
        self.chunks: list[Any] = []
        self.updates: list[Mapping[str, Any]] = []
        self.takes_s = takes_s

    async def stream(self, job: Mapping[str, Any], chunks: list[Any]) -> None:
        await asyncio.sleep(self.takes_s)
        self.chunks += chunks

    async def progress(self, job: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
        self.updates.append(progress)
