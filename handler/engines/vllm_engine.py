"""vLLM, by its own command and its own routes.

`vllm serve` runs in a process of its own, started before the snapshot is looked up, so that it imports while the bytes
are read; it then loads them from this process's memory (handler.engines.server). Jobs go to it over a socket file, each
prompt as a request that it batches with all others; OpenAI's routes are passed on as they are.
"""

from __future__ import annotations

import asyncio
import collections
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import aiohttp

from handler.engines.server import SharedFolder
from handler.jobs import Code, JobError, Piece, Prompt, TextRequest, invalid, not_served
from modelstore.dtypes import DTYPES
from modelstore.errors import IntegrityError, ModelStoreError, NotFound, Refused
from modelstore.logs import LINE_CHARACTERS
from modelstore.settings import Settings, server_environment
from modelstore.timeline import Span, Timeline
from modelstore.units import one_line
from modelstore.volume.layout import Layout
from modelstore.volume.snapshots import Catalog, Snapshot, check_code
from modelstore.warmstart import Begun

logger = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.05
_END_S = 20.0
_ENDS_WITHIN_S = 2.0
_LINE_BYTES = 1 << 22  # an event of a stream is one line
_URL = "http://vllm"
_BAD_REQUESTS = (400, 404, 405, 413, 422)


class ServerFailed(ModelStoreError):
    """vLLM has ended by itself."""


class Server:
    """A `vllm serve` process. What it prints goes to our log, and the end of that is kept for the reason of its end."""

    def __init__(self, python: Path | None) -> None:
        """`python`: the interpreter of the environment that has vLLM, by default this one.

        Raises NotFound where that is not there.
        """
        if find_spec("vllm") is None if python is None else not os.access(python, os.X_OK):
            where = "in this environment" if python is None else f"under {python}"
            raise NotFound(f"there is no vLLM {where}: let MODELSTORE_VLLM_PYTHON name the interpreter that has it")
        self._folder = tempfile.TemporaryDirectory(prefix="modelstore-vllm-")
        self.socket = str(Path(self._folder.name) / "socket")
        self._said: collections.deque[str] = collections.deque(maxlen=200)
        self._process = subprocess.Popen(
            [str(python or sys.executable), str(Path(__file__).with_name("vllm_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=server_environment(),
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, name="vllm-log", daemon=True)
        self._listener.start()

    def serve(self, arguments: list[str]) -> None:
        """Have it serve; returns when it answers. Raises ServerFailed."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # why it has ended is found below
            self._process.stdin.write(json.dumps(["serve", *arguments, "--uds", self.socket]) + "\n")
            self._process.stdin.flush()
        asyncio.run(self._answers())

    @property
    def ended(self) -> str:
        """Why it has ended; empty while it runs."""
        if self._process.poll() is None:
            return ""
        self._listener.join(1)
        errors = [line for line in self._said if "Error" in line] or list(self._said)
        return f"vLLM has ended with status {self._process.returncode}: {errors[-1] if errors else 'it said nothing'}"

    def session(self) -> aiohttp.ClientSession:
        """Connections to it, of the running event loop."""
        connector = aiohttp.UnixConnector(self.socket, limit=0)
        timeout = aiohttp.ClientTimeout(total=None)  # the worker limits a job's time
        return aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=_LINE_BYTES)

    def end(self) -> None:
        """Return when the process has ended."""
        self._process.terminate()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with suppress(ProcessLookupError):  # its engine may have been left behind, with the GPU
            os.killpg(self._process.pid, signal.SIGKILL)
        self._listener.join(_END_S)
        pipes = [self._process.stdin, None if self._listener.is_alive() else self._process.stdout]
        for pipe in pipes:
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self._folder.cleanup()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.append(line.strip()[:2000])
            print(f"vllm: {one_line(line, LINE_CHARACTERS)}", file=sys.stderr, flush=True)

    async def _answers(self) -> None:
        async with self.session() as session:
            while not (ended := self.ended):
                with suppress(aiohttp.ClientError):
                    async with session.get(f"{_URL}/health") as response:
                        if response.status == 200:
                            return
                await asyncio.sleep(_LOOK_AGAIN_S)
        raise ServerFailed(f"{ended}: mend MODELSTORE_VLLM_ARGS, or use ENGINE=text")


class VllmEngine:
    """Answers by a vLLM server; texts, and OpenAI's routes."""

    def __init__(self, server: Server, folder: SharedFolder, begun: Begun) -> None:
        self._server = server
        self._folder = folder
        self._snapshot: Snapshot = begun.snapshot
        self._settings: Settings = begun.settings
        self._in_use = begun.in_use

    @classmethod
    def load(cls, server: Server, begun: Begun) -> VllmEngine:
        """Have the server load a snapshot whose bytes are in flight."""
        snapshot, timeline = begun.snapshot, begun.timeline
        reading = begun.reading
        folder = SharedFolder(snapshot, reading)
        ended = reading.ended or time.monotonic()
        timeline.add(Span("read", reading.began - timeline.began, ended - timeline.began, reading.size_bytes))
        engine = cls(server, folder, begun)
        names = dict.fromkeys((snapshot.key.repo_id, str(begun.settings.model)))
        dtype = DTYPES[snapshot.key.dtype].torch_name or "auto"
        check_code(snapshot, trusted=begun.trusted)
        arguments = [str(folder.path), "--served-model-name", *names, "--dtype", dtype]
        arguments += ["--trust-remote-code"] if begun.trusted else []
        most = {"max_new_tokens": begun.settings.max_tokens}  # where a request names no length, and at most
        arguments += ["--override-generation-config", json.dumps(most)]
        arguments += ["--disable-uvicorn-access-log", "--uvicorn-log-level", "warning"]
        try:
            with timeline.span("build"):
                server.serve([*arguments, *begun.settings.vllm_args])
        except BaseException:
            folder.close()
            raise
        folder.let_go()
        return engine

    @property
    def model(self) -> str:
        """See Engine."""
        return self._snapshot.key.repo_id

    def serves(self, name: str) -> bool:
        """See Engine."""
        return name in (self.model, str(self._settings.model))

    @property
    def broken(self) -> str:
        """See Engine."""
        return self._server.ended

    def check(self) -> None:
        """See Engine."""
        Catalog(Layout(self._settings.root)).check_unchanged(self._snapshot)
        if self.broken:
            raise IntegrityError(self.broken)

    def status(self) -> dict[str, Any]:
        """See Engine."""
        key = self._snapshot.key
        return {"engine": "vllm", "model": key.repo_id, "commit": key.commit, "dtype": key.dtype}

    def swap(self, reference: str) -> Timeline:
        """See Engine."""
        raise Refused(f"vLLM serves one model in its life: {reference} takes a new worker")

    def close(self) -> None:
        """See Engine."""
        self._server.end()
        self._folder.close()
        self._in_use.end()

    async def generate(self, request: TextRequest) -> AsyncIterator[Piece]:
        """See Engine."""
        if request.model is not None and not self.serves(request.model):
            raise not_served(request.model, self.model)
        pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue()

        async def run(index: int, prompt: Prompt) -> None:
            try:
                async with aclosing(self._continued(index, prompt, request)) as source:  # type: ignore[type-var]
                    reason = None
                    async for piece in source:
                        reason = piece.finish_reason
                        pieces.put_nowait(piece)
                if reason is None:
                    raise JobError(Code.INTERNAL_ERROR, "vLLM ended the answer early: send the job again")
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # else the request would wait for pieces for ever
                pieces.put_nowait(error)

        tasks = [asyncio.create_task(run(index, prompt)) for index, prompt in enumerate(request.prompts)]
        try:
            left = len(tasks)
            while left:
                piece = await pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                left -= piece.finish_reason is not None
                yield piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def openai(self, route: str, body: Mapping[str, Any] | None) -> AsyncIterator[str | dict[str, Any]]:
        """See OpenAIEngine."""
        async with self._asked("GET" if body is None else "POST", route, body) as response:
            if response.content_type == "text/event-stream":
                event = ""
                async for line in response.content:
                    event += line.decode()
                    if event.strip() and not line.strip():  # an event ends with an empty line
                        yield event
                        event = ""
                if event.strip():
                    yield event
            else:
                yield await response.json()

    @asynccontextmanager
    async def _asked(
        self, method: str, route: str, body: Mapping[str, Any] | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The server's answer; whoever leaves before its end has the server stop. Raises JobError."""
        if self.broken:
            raise JobError(Code.INTERNAL_ERROR, self.broken)
        try:
            async with (
                self._server.session() as session,
                session.request(method, f"{_URL}{route}", json=body) as response,
            ):
                await _check(response)
                yield response
        except aiohttp.ClientError as error:
            with suppress(TimeoutError):  # it breaks off a moment before it has ended
                async with asyncio.timeout(_ENDS_WITHIN_S):
                    while not self.broken:
                        await asyncio.sleep(_LOOK_AGAIN_S)
            raise JobError(Code.INTERNAL_ERROR, self.broken or f"vLLM broke off: {error}") from error

    async def _continued(self, index: int, prompt: Prompt, request: TextRequest) -> AsyncIterator[Piece]:
        """The pieces of one prompt."""
        asked = await self._fitted(prompt, request)
        route = "completions" if prompt.text is not None else "chat/completions"
        counted = {"include_usage": True, "continuous_usage_stats": True}
        said = 0
        async with self._asked("POST", f"/v1/{route}", asked | {"stream": True, "stream_options": counted}) as response:
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[len("data: ") :])
                if "error" in event:
                    raise JobError(Code.INTERNAL_ERROR, _message(event))
                for choice in event["choices"]:
                    text = choice["text"] if prompt.text is not None else choice["delta"].get("content")
                    reason, usage = choice.get("finish_reason"), event["usage"]
                    if text or reason:
                        new, said = usage["completion_tokens"] - said, usage["completion_tokens"]
                        prompt_tokens = usage["prompt_tokens"] if reason else 0
                        yield Piece(index, text or "", new, reason, prompt_tokens, self.model)

    async def _fitted(self, prompt: Prompt, request: TextRequest) -> dict[str, Any]:
        """The body of a prompt's request; where the job names no max_tokens, with what the context leaves."""
        sampling = request.sampling
        what = {"prompt": prompt.text} if prompt.text is not None else {"messages": list(prompt.messages)}
        body = {"model": self.model, **what, **sampling.parameters}
        if not request.fit:
            return body
        async with self._asked("POST", "/tokenize", {"model": self.model, **what}) as response:
            found = await response.json()
        left = found["max_model_len"] - found["count"]
        if left < 1:
            raise invalid(f"the prompt's {found['count']} tokens leave no room in {found['max_model_len']} tokens")
        return body | {"max_tokens": min(sampling.max_tokens, left)}


async def _check(response: aiohttp.ClientResponse) -> None:
    """Raise JobError where it is an answer of failure."""
    if response.status < 400:
        return
    try:
        message = _message(json.loads(await response.text()))
    except ValueError:
        message = f"vLLM answered with status {response.status}"
    if response.status in _BAD_REQUESTS:
        raise JobError(Code.MODEL_NOT_ALLOWED if "does not exist" in message else Code.INVALID_INPUT, message)
    raise JobError(Code.INTERNAL_ERROR, message)


def _message(answer: Mapping[str, Any]) -> str:
    error = answer.get("error", answer)
    return str(error.get("message", error) if isinstance(error, dict) else error)[:2000]
