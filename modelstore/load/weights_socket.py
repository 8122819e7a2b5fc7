"""Weights of a reading for other processes of this host, as they arrive: memory by descriptor over a socket file.

    server = WeightsServer(path, folder)                        in the process that reads
    server.serve(reading, shared_files(snapshot, reading))
    with connect(path) as weights:                              in one that loads, such as a rank of vLLM
        for file in weights.files:
            weights.wait(file, end)                             until its bytes before `end` are there, and right

Each process maps the same memory, so a host reads its weights once however many ranks load them. A message is one
packet of JSON: the files with their descriptors first, then how many bytes of a file have arrived, or the error that
ended the reading. A client's one message, after its last tensor, says that it has loaded them. Standard library only,
because the loading process need not have what this package needs to read.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelstore.errors import ProcessFailed

if TYPE_CHECKING:
    from modelstore.load.reader import Reading
    from modelstore.volume.manifest import FileRecord
    from modelstore.volume.snapshots import Snapshot

logger = logging.getLogger(__name__)

_FILES_IN_MESSAGE = 64  # the kernel passes 253 descriptors at most, and a packet is to stay below its buffer
_MESSAGE_BYTES = 1 << 17
_LOADED = b"loaded"
_RETRY_S = 0.1


def shared_files(snapshot: Snapshot, reading: Reading) -> list[FileRecord]:
    """The weights of a snapshot that other processes can map while they are read: none if the host has no room."""
    weights = (*snapshot.weights, *snapshot.weights_beside)
    return [file for file in weights if reading.holds(file.path) and reading.shared_descriptor(file.path) >= 0]


@dataclass(frozen=True, slots=True)
class _Served:
    """A reading, and those of its files that are served: the two are exchanged together."""

    number: int
    reading: Reading
    files: Sequence[FileRecord]


class WeightsServer:
    """Serves weights at a socket file, to any number of processes, until it is closed.

    If a reading fails, its clients wait for another one with the same files, in which they go on.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        """`path`: of at most 107 bytes, in a folder that is this user's alone. `folder`: the model's, which a client
        compares with the one that it was asked to load."""
        self._path = path
        self._folder = folder
        self._changed = threading.Condition()
        self._served: _Served | None = None
        self._number = 0
        self._clients = 0
        self._closed = False
        self.has_loaded = False
        self.idle_since = 0.0
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path.unlink(missing_ok=True)
        self._listening.bind(str(path))
        self._listening.listen()
        threading.Thread(target=self._accept, name="weights", daemon=True).start()

    def serve(self, reading: Reading, files: Sequence[FileRecord]) -> None:
        """Serve these files of a reading from now on."""
        with self._changed:
            self._number += 1
            self._served = _Served(self._number, reading, files)
            self._changed.notify_all()

    def close(self) -> None:
        """Take no more clients; those that wait for another reading get none."""
        with self._changed:
            self._closed, self._served = True, None  # whose memory is its clients' now
            self._changed.notify_all()
        self._path.unlink(missing_ok=True)
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listening.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _address = self._listening.accept()
            except OSError as error:  # it is closed, or this process has too many descriptors just now
                if not self._closed:
                    logger.warning("a process that wants the weights is not served: %s", error)
                    time.sleep(_RETRY_S)
                continue
            threading.Thread(target=self._serve, args=(client,), name="weights", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with self._changed:
            self._clients += 1
        try:
            with client, suppress(ConnectionError):
                self._serve_readings(client)
        except OSError as error:  # of the connection: too many descriptors are on their way, for example
            logger.warning("a process that loads the weights is not served any more: %s", error)
        finally:
            with self._changed:
                self._clients -= 1
                self.idle_since = time.monotonic()

    def _serve_readings(self, client: socket.socket) -> None:
        """Send the reading, and if it fails, the next one, to its end."""
        number, failure = 0, ""
        while (served := self._next_reading(number)) is not None:
            number, failure = served.number, self._send_reading(client, served)
            del served  # and with it the memory of a reading that failed
            if not failure:
                if client.recv(_MESSAGE_BYTES) == _LOADED:
                    self.has_loaded = True
                return
        if failure:
            _send(client, {"error": failure})

    @property
    def is_idle(self) -> bool:
        """Whether a client has loaded all weights, and none is connected."""
        return self.has_loaded and not self._clients

    def _send_reading(self, client: socket.socket, served: _Served) -> str:
        """Send all of a reading to a client; returns why the reading failed, in words: an error would keep memory.
        Raises OSError if the connection failed."""
        try:
            self._send_all(client, served)
        except ConnectionError:
            raise
        except Exception:
            try:
                served.reading.check()
            except Exception as failed:
                return f"{type(failed).__name__}: {failed}"
            raise
        return ""

    def _next_reading(self, number: int) -> _Served | None:
        """The reading after this one, once there is one; None if the server is closed before."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._served is not None and self._served.number > number))
            return self._served

    def _send_all(self, client: socket.socket, served: _Served) -> None:
        files = served.files
        for begin in range(0, max(len(files), 1), _FILES_IN_MESSAGE):
            some = files[begin : begin + _FILES_IN_MESSAGE]
            names = [[file.path, file.size_bytes] for file in some]
            is_last = begin + _FILES_IN_MESSAGE >= len(files)
            descriptors = [served.reading.shared_descriptor(file.path) for file in some]
            _send(client, {"folder": str(self._folder), "files": names, "last": is_last}, descriptors)
        for number, file in enumerate(files):
            arrived = 0
            while arrived < file.size_bytes:
                arrived = served.reading.wait_beyond(file.path, arrived)
                _send(client, {"file": number, "arrived": arrived})


@dataclass(slots=True)
class SharedFile:
    """A file of weights in memory that this process maps; its pages are private once they are written to.

    `arrived`: the bytes from the beginning on that are there.
    """

    path: str
    size_bytes: int
    memory: mmap.mmap
    arrived: int = 0


class WeightsClient:
    """A connection to a `WeightsServer`. `folder`: the model's; `files`: empty if the server reads no weights."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.folder = ""
        self.files: list[SharedFile] = []
        while not self._take_message():
            pass

    def wait(self, file: SharedFile, end: int) -> None:
        """Return when the bytes of a file before `end` are there. Raises ProcessFailed if they will not come."""
        while file.arrived < end:
            self._take_message()

    def tell_loaded(self) -> None:
        """Tell that this process has loaded all weights that it wants."""
        for file in self.files:  # the server tells of each to its end
            self.wait(file, file.size_bytes)
        with suppress(ConnectionError):
            self._connection.send(_LOADED)

    def _take_message(self) -> bool:
        """Take one message; whether it was the last with files."""
        data, descriptors, _flags, _address = socket.recv_fds(self._connection, _MESSAGE_BYTES, _FILES_IN_MESSAGE)
        if not data and not self.files:
            raise ConnectionResetError("the process that reads the weights has ended")
        if not data:
            raise ProcessFailed("the process that reads the weights has ended: its last lines in the log say why")
        message = json.loads(data)
        if "error" in message:
            raise ProcessFailed(f"the weights do not arrive: {message['error']}")
        if "file" in message:
            self.files[message["file"]].arrived = message["arrived"]
            return False
        self.folder = message["folder"]
        known = {file.path: file for file in self.files}
        if not message["files"] and known:
            raise ProcessFailed("the weights do not arrive: the model was read again without them")
        for (path, size_bytes), fd in zip(message["files"], descriptors, strict=True):
            memory = _map_private(fd, size_bytes)
            if path in known:  # another reading, in other memory
                known[path].memory, known[path].arrived = memory, 0
            else:
                self.files.append(SharedFile(path, size_bytes, memory))
        return bool(message["last"])


@contextmanager
def connect(path: Path) -> Iterator[WeightsClient]:
    """The weights that are served at a socket file. Raises OSError if nobody serves there, ProcessFailed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(str(path))
        yield WeightsClient(connection)


def _send(client: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    socket.send_fds(client, [json.dumps(message).encode()], descriptors)


def _map_private(fd: int, size_bytes: int) -> mmap.mmap:
    try:
        return mmap.mmap(fd, size_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(fd)
