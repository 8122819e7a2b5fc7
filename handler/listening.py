"""The ports of a worker that serves HTTP: open from the start of the process on, so that a load balancer, which asks
for its health meanwhile, can tell a worker that starts from one that is gone.

Until the worker is ready a small loop in a thread answers: 204 to a question for its health, 503 to all else.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import resource
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from modelstore.errors import InvalidSetting, UsageError
from modelstore.settings import Settings

logger = logging.getLogger(__name__)

_BACKLOG = 2048
_REQUEST_S = 5.0
_SETTLE_S = 0.01
_REQUEST_BYTES = 1 << 14
_HEAD_END = b"\r\n\r\n"
_FILES = 65_536  # each connection takes one
_STARTING = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"
_BODY = b'{"error": {"message": "the worker is starting", "type": "server_error", "param": null, "code": "starting"}}'
_NOT_YET = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 5\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
)


@dataclass(frozen=True, slots=True)
class Address:
    """The address, and the ports, of which the second is for questions of health; it may be the first one."""

    host: str
    port: int
    health_port: int

    @classmethod
    def of(cls, arguments: Sequence[str], settings: Settings) -> Address:
        """The address that a command line with --http and the settings name. On RunPod it is every interface, and port
        80; elsewhere this machine's own, and port 8000. Raises UsageError and InvalidSetting."""
        parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
        parser.add_argument("--http", action="store_true")
        parser.add_argument("--host")
        parser.add_argument("--port")
        try:
            options, others = parser.parse_known_args(arguments)
        except argparse.ArgumentError as error:
            raise UsageError(f"{error}: write it like --http --port 8000") from error
        if others:
            raise UsageError(f"{others[0]} is not known beside --http: use --host and --port")
        host = options.host or ("0.0.0.0" if settings.on_runpod else "127.0.0.1")  # noqa: S104
        usual = "80" if settings.on_runpod else "8000"
        port = _port("--port", options.port) if options.port else _port("PORT", settings.http_port or usual)
        health = settings.health_port or ("80" if settings.on_runpod else str(port))
        return cls(host, port, _port("PORT_HEALTH", health))

    @property
    def url(self) -> str:
        """The address of requests."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"


class Listening:
    """The open ports, and the answers to questions of health until the worker is ready."""

    def __init__(self, address: Address, health_path: str) -> None:
        """Raises InvalidSetting if the path is none, or a port cannot be opened. No thread runs before `begin`."""
        if not health_path.startswith("/") or not health_path.isascii() or set(health_path) & set(" ?#{}"):
            raise InvalidSetting(f"HEALTH_CHECK_PATH={health_path[:40]!r} is not a path: write it like /ping")
        self._health_path = health_path
        self._thread: threading.Thread | None = None
        self._heads: dict[asyncio.StreamWriter, bytearray] = {}  # of requests, as far as they have arrived
        self._end: Callable[[], object] = lambda: None
        self.address = address
        _allow_many_connections()
        self.sockets = [_opened(address.host, port) for port in dict.fromkeys((address.port, address.health_port))]

    def begin(self) -> None:
        """Answer from now on."""
        began = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(began),), name="health", daemon=True)
        self._thread.start()
        began.wait()

    def end(self) -> list[socket.socket]:
        """Answer no more; returns the ports, still open. Connections that come meanwhile wait."""
        if self._thread is not None:
            self._end()
            self._thread.join()
        return self.sockets

    async def _serve(self, began: threading.Event) -> None:
        ending = asyncio.Event()
        self._end = partial(asyncio.get_running_loop().call_soon_threadsafe, ending.set)
        began.set()
        serve = partial(asyncio.start_server, self._answer, limit=_REQUEST_BYTES, backlog=_BACKLOG)
        # Copies, because a server closes its own, and the ports stay open.
        servers = [await serve(sock=each.dup()) for each in self.sockets]
        await ending.wait()
        # A server that is closed forgets the connections that it has accepted a moment before, so it only stops to
        # accept, and those that it has get their answer.
        for each in (each for server in servers for each in server.sockets):
            asyncio.get_running_loop().remove_reader(each.fileno())
        await asyncio.sleep(_SETTLE_S)
        for server in servers:
            server.close()
        for connection, head in self._heads.items():
            if head and _HEAD_END not in head:
                connection.write(self._answer_to(head))
            connection.close()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = self._heads[writer] = bytearray()
        try:
            async with asyncio.timeout(_REQUEST_S):
                while _HEAD_END not in head:
                    part = await reader.read(_REQUEST_BYTES)
                    if not part or len(head) > _REQUEST_BYTES:
                        return
                    head += part
                writer.write(self._answer_to(head))
                await writer.drain()
                if head.startswith(b"POST"):  # a body that nobody reads would reset the connection
                    writer.write_eof()
                    while await reader.read(_REQUEST_BYTES):
                        pass
        except (OSError, TimeoutError):
            pass  # that was no request
        finally:
            del self._heads[writer]
            writer.close()

    def _answer_to(self, head: bytes | bytearray) -> bytes:
        """The answer to a request, of which the first line may be all that there is."""
        parts = bytes(head).partition(b"\r\n")[0].split(b" ")
        is_health = len(parts) > 2 and parts[1].partition(b"?")[0].decode("latin-1") == self._health_path
        return _STARTING if is_health else _NOT_YET


def _port(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text[:6]) < 65536):
        raise InvalidSetting(f"{name} {text[:40]!r} is not a port: give a number from 1 to 65535")
    return int(text)


def _allow_many_connections() -> None:
    """Let this process have as many open files as it may, up to a number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _opened(host: str, port: int) -> socket.socket:
    try:
        family, _kind, _protocol, _name, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:  # UnicodeError: a host name with a part that is too long
        number = getattr(error, "errno", None) or 0
        reason = os.strerror(number) if number > 0 else str(error)
        raise InvalidSetting(f"{host} port {port} cannot be opened: {reason}; set PORT to a free one") from error
