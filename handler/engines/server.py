"""An engine's server in a process of its own: how it is run, how it is asked, and how it gets its weights.

A server such as vLLM brings a loader of its own, which maps the files: over a network volume that is the slow way.
It is given a folder of links instead, whose weights lead to the memory that they were read into at the volume's rate,
and verified on the way. Once it has loaded, the links lead to the volume, and the memory is free.
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
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp

from handler.errors import Code, JobError
from handler.jobs import ServerFields
from modelstore.environment import server_environment
from modelstore.errors import ServerFailed
from modelstore.load.reader import Reading
from modelstore.logs import LINE_CHARACTERS
from modelstore.units import one_line
from modelstore.volume.snapshots import Snapshot

logger = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.05
_END_S = 20.0
_ENDS_WITHIN_S = 2.0
_LINE_BYTES = 1 << 22  # an event of a stream is one line
_URL = "http://server"
_BAD_REQUESTS = (400, 404, 405, 413, 422)


class Server:
    """A server of OpenAI's routes in a process of its own, reached over a socket file.

    Its output goes to our log, and the last lines are kept: they say why it ended.
    """

    def __init__(self, name: str, command: Sequence[str], *, hint: str) -> None:
        """`name`: for logs and errors; `command`: a program that reads one line, a JSON list of arguments, and serves;
        `hint`: the remedy if it does not. It is started at once, so that it imports meanwhile."""
        self._name = name
        self._hint = hint
        self._end_reason = ""
        self._fields: ServerFields | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="modelstore-server-")
        self.socket = str(Path(self._folder.name) / "socket")
        self._last_lines: collections.deque[str] = collections.deque(maxlen=200)
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=server_environment(),
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, name="server-log", daemon=True)
        self._listener.start()

    def serve(self, arguments: list[str]) -> None:
        """Hand over the arguments, the socket as the last; returns when the server answers. Raises ServerFailed."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `_answers` says why it has ended
            self._process.stdin.write(json.dumps([*arguments, self.socket]) + "\n")
            self._process.stdin.flush()
        asyncio.run(self._answers())

    @property
    def ended(self) -> str:
        """Why it has ended; empty while it runs."""
        if self._process.poll() is None:
            return ""
        if not self._end_reason:
            self._listener.join(1)  # once: the last lines are in the pipe
            lines = [line for line in self._last_lines if "Error" in line] or list(self._last_lines)
            status = f"{self._name} has ended with status {self._process.returncode}"
            self._end_reason = f"{status}: {lines[-1] if lines else 'it printed nothing'}"
        return self._end_reason

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
            self._last_lines.append(line.strip()[:2000])
            print(f"{self._name.lower()}: {one_line(line, LINE_CHARACTERS)}", file=sys.stderr, flush=True)

    async def _answers(self) -> None:
        async with self.session() as session:
            while not (ended := self.ended):
                with suppress(aiohttp.ClientError):
                    async with session.get(f"{_URL}/health") as response:
                        if response.status == 200:
                            return
                await asyncio.sleep(_LOOK_AGAIN_S)
        raise ServerFailed(f"{ended}: {self._hint}")

    @asynccontextmanager
    async def request(
        self, method: str, route: str, body: Mapping[str, Any] | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response to one request; the server stops if the block is left before the end. Raises JobError."""
        if self.ended:
            raise JobError(Code.INTERNAL_ERROR, self.ended)
        try:
            async with (
                self.session() as session,
                session.request(method, f"{_URL}{route}", json=body) as response,
            ):
                await self._check(response)
                yield response
        except aiohttp.ClientError as error:
            with suppress(TimeoutError):  # it breaks off a moment before it has ended
                async with asyncio.timeout(_ENDS_WITHIN_S):
                    while not self.ended:
                        await asyncio.sleep(_LOOK_AGAIN_S)
            raise JobError(Code.INTERNAL_ERROR, self.ended or f"{self._name} broke off: {error}") from error

    async def fields(self) -> ServerFields:
        """The fields that its own schema has for each route; none if it shows no schema. Raises JobError."""
        if self._fields is None:
            try:
                async with self.request("GET", "/openapi.json", None) as response:
                    self._fields = ServerFields(self._name, _fields_of(await response.json()))
            except JobError as error:
                if self.ended:
                    raise
                logger.warning("%s shows no schema, so it checks the fields of a request itself: %s", self._name, error)
                self._fields = ServerFields(self._name, {})
        return self._fields

    async def answer(self, route: str, body: Mapping[str, Any] | None) -> AsyncIterator[str | dict[str, Any]]:
        """One of OpenAI's routes: the events of a stream as they come, or the one object. Raises JobError."""
        async with self.request("GET" if body is None else "POST", route, body) as response:
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

    async def _check(self, response: aiohttp.ClientResponse) -> None:
        """Raise JobError if the status says that the request failed."""
        if response.status < 400:
            return
        try:
            message = error_message(json.loads(await response.text()))
        except ValueError:
            message = f"{self._name} answered with status {response.status}"
        if response.status in _BAD_REQUESTS:
            raise JobError(Code.MODEL_NOT_ALLOWED if "does not exist" in message else Code.INVALID_INPUT, message)
        raise JobError(Code.INTERNAL_ERROR, message)


class MemoryBackedSnapshot:
    """A folder like the snapshot's, made of links, for processes of the same user on this host."""

    def __init__(self, snapshot: Snapshot, reading: Reading) -> None:
        """Returns once everything that was read has arrived.

        Raises DigestMismatch if a file does not match the manifest, OSError if the volume fails.
        """
        reading.wait_all()
        self._snapshot = snapshot
        self._reading = reading
        self._folder = TemporaryDirectory(prefix="modelstore-")
        self.path = Path(self._folder.name)
        self._link(self._in_memory)

    def release_memory(self) -> None:
        """Let the links lead to the volume, and free the memory once no process maps it."""
        self._link(self._on_volume)
        self._reading.close()

    def close(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()

    def _on_volume(self, path: str) -> Path:
        return self._snapshot.path / path

    def _in_memory(self, path: str) -> Path:
        read = path.endswith(".safetensors") and self._reading.holds(path)
        fd = self._reading.descriptor(path) if read else -1
        return self._on_volume(path) if fd < 0 else Path(f"/proc/{os.getpid()}/fd/{fd}")

    def _link(self, target: Callable[[str], Path]) -> None:
        for file in self._snapshot.manifest.files:
            link = self.path / file.path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(target(file.path))


def _fields_of(schema: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """The names of the fields of each route with a body, such as `completions`, in an OpenAPI schema."""
    fields: dict[str, frozenset[str]] = {}
    for path, methods in schema.get("paths", {}).items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {})
        names = _properties(content.get("application/json", {}).get("schema", {}), schema)
        if names:
            fields[path.removeprefix("/v1/").strip("/")] = frozenset(names)
    return fields


def _properties(part: Mapping[str, Any], schema: Mapping[str, Any]) -> set[str]:
    """The names of an object's properties, also if it is one of several, or stands elsewhere in the schema."""
    if "$ref" in part:
        part = schema["components"]["schemas"][part["$ref"].rpartition("/")[2]]
    names = set(part.get("properties", {}))
    for each in (*part.get("anyOf", ()), *part.get("oneOf", ()), *part.get("allOf", ())):
        names |= _properties(each, schema)
    return names


def error_message(answer: Mapping[str, Any]) -> str:
    """The text of an error in OpenAI's form."""
    error = answer.get("error", answer)
    return str(error.get("message", error) if isinstance(error, dict) else error)[:2000]
