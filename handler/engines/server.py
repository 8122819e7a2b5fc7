"""An engine's server in a process of its own: how it is run, and how it is asked."""

from __future__ import annotations

import asyncio
import collections
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from handler.errors import Code, JobError
from handler.jobs import ServerFields
from modelstore.environment import server_environment
from modelstore.errors import ServerFailed
from modelstore.logs import LINE_CHARACTERS
from modelstore.timeline import Span, Timeline
from modelstore.units import one_line

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_END_S = 20.0
_ENDS_WITHIN_S = 2.0
_LINE_BYTES = 1 << 22  # an event of a stream is one line
_URL = "http://server"
_BAD_REQUESTS = (400, 404, 405, 413, 422)


@dataclass(frozen=True, slots=True)
class Milestone:
    """A line of a server's log that ends a part of its boot. `part`: the name of the part."""

    pattern: re.Pattern[str]
    part: str


class Server:
    """A server of OpenAI's routes in a process of its own, reached over a socket file.

    Its output goes to our log, and the last lines are kept: they say why it ended.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        hint: str,
        environment: dict[str, str],
        milestones: Sequence[Milestone] = (),
    ) -> None:
        """`name`: for logs and errors; `command`: a program that prints one line, a JSON object about its versions,
        reads one line, a JSON list of arguments, and serves; `hint`: the remedy if it does not. `environment`: what it
        gets besides `server_environment`; `milestones`: in their order. It is started at once, so that it imports
        meanwhile."""
        self._name = name
        self._hint = hint
        self._end_reason = ""
        self._fields: ServerFields | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="modelstore-server-")
        self.socket = str(Path(self._folder.name) / "socket")
        self._last_lines: collections.deque[str] = collections.deque(maxlen=200)
        self._milestones = collections.deque(milestones)
        self._began = self.begun_at = time.monotonic()
        self._parts: list[tuple[str, float]] = []
        self._versions: dict[str, str] = {}
        self._has_versions = threading.Event()
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=server_environment() | environment,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, name="server-log", daemon=True)
        self._listener.start()

    def versions(self) -> Mapping[str, str]:
        """The versions of what it serves with, by name; empty if it has ended."""
        self._has_versions.wait()
        return self._versions

    def begin(self, arguments: list[str]) -> None:
        """Hand over the arguments, the socket as the last."""
        self.begun_at = time.monotonic()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `wait` says why it has ended
            self._process.stdin.write(json.dumps([*arguments, self.socket]) + "\n")
            self._process.stdin.flush()

    def wait(self, check: Callable[[], None]) -> None:
        """Return when the server answers. Raises ServerFailed, and what `check` raises, which is called meanwhile."""
        asyncio.run(self._answers(check))

    def add_spans(self, timeline: Timeline) -> None:
        """Record its boot, until now, in its parts."""
        begin = self._began - timeline.began
        for part, at in [*self._parts, ("API", time.monotonic())]:
            timeline.add(Span("engine", begin, at - timeline.began, detail=part))
            begin = at - timeline.began

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
            if not self._has_versions.is_set() and line.startswith("{"):
                with suppress(ValueError):
                    self._versions = json.loads(line)
                    self._has_versions.set()
                    continue
            self._note_part(line)
            self._last_lines.append(line.strip()[:2000])
            print(f"{self._name.lower()}: {one_line(line, LINE_CHARACTERS)}", file=sys.stderr, flush=True)

        self._has_versions.set()

    def _note_part(self, line: str) -> None:
        """End the part of the boot that this line of the log ends, with those before it that had no line."""
        for count, milestone in enumerate(self._milestones, 1):
            if milestone.pattern.search(line):
                self._parts.append((milestone.part, time.monotonic()))
                for _passed in range(count):
                    self._milestones.popleft()
                return

    async def _answers(self, check: Callable[[], None]) -> None:
        async with self.session() as session:
            while not (ended := self.ended):
                check()
                with suppress(aiohttp.ClientError):
                    async with session.get(f"{_URL}/health") as response:
                        if response.status == 200:
                            return
                await asyncio.sleep(_POLL_S)
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
                        await asyncio.sleep(_POLL_S)
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
