"""What reads the blocks of a reading: threads of this process, or the reader process beside it.

The process runs `blocks.py` as a program, with the standard library and xxhash alone as long as no file is compressed,
and ends with its socket.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from modelstore.environment import bare_environment
from modelstore.load import blocks

logger = logging.getLogger(__name__)

_FD = 3  # of the socket, in the reader process
_LIBRARIES = ("xxhash", "numpy", "zstandard")  # the last two for compressed files; each may lie in a folder of its own


class Listener(Protocol):
    """The receiver of the reports: a reading. Called from the thread that listens to the process."""

    @property
    def over(self) -> bool:
        """Whether all blocks have been reported, or one has failed."""

    def report(self, kind: int, index: int, block: int, detail: int, now: float, decoding_s: float) -> None:
        """The outcome of a block: see `blocks.REPORT`."""

    def failed(self, error: Exception) -> None:
        """The process has failed, or ended before all blocks were read."""


class BlockSource(Protocol):
    """Reads files block by block, and reports each to its listener. A file has memory of its own, behind `memory_fd` if
    that is not -1, or none: its blocks go to the ring."""

    def add(self, index: int, fd: int, memory: memoryview | None, memory_fd: int, **record: Any) -> None:
        """Read a file, which stays the caller's to close; `record`: the further arguments of `blocks.File`."""

    def use_ring(self, memory: memoryview, memory_fd: int, slot_bytes: int) -> None:
        """Take the memory for files without memory of their own."""

    def release(self, slot: int) -> None:
        """A slot of the ring may be used again."""

    def no_more(self) -> None:
        """All files were added."""

    def close(self, *, wait: bool) -> None:
        """End, at once, even if it still reads; without `wait`, what has done its work ends by itself."""


class ReaderThreads:
    """Threads of this process that read: a BlockSource."""

    def __init__(self, listener: Listener) -> None:
        self._reader = blocks.BlockReader(listener.report)

    def add(self, index: int, fd: int, memory: memoryview | None, memory_fd: int, **record: Any) -> None:
        self._reader.add(blocks.File(index, os.dup(fd), memory=memory, **record))

    def use_ring(self, memory: memoryview, memory_fd: int, slot_bytes: int) -> None:
        self._reader.use_ring(memory, slot_bytes)

    def release(self, slot: int) -> None:
        self._reader.release(slot)

    def no_more(self) -> None:
        self._reader.no_more()

    def close(self, *, wait: bool) -> None:
        self._reader.stop()
        if wait:
            self._reader.join()


class ReaderProcess:
    """The reader process, and the thread that listens to it: a BlockSource. It ends with its socket."""

    def __init__(self, listener: Listener, pid: int, sock: socket.socket) -> None:
        self._pid = pid
        self._socket = sock
        self._listener: Listener | None = listener
        self._sending = threading.Lock()
        self._thread = threading.Thread(target=self._listen, args=(listener,), name="read", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, listener: Listener) -> ReaderProcess | None:
        """Start one; None, with a warning, if this machine does not allow it."""
        origins = {name: spec.origin for name in _LIBRARIES if (spec := find_spec(name)) is not None and spec.origin}
        if "xxhash" not in origins:
            return None
        folders = dict.fromkeys(str(Path(origin).parents[1]) for origin in origins.values())
        channel, child_channel = socket.socketpair()
        program = [sys.executable, "-I", "-S", blocks.__file__, str(_FD), os.pathsep.join(folders)]
        try:
            actions = [(os.POSIX_SPAWN_DUP2, child_channel.fileno(), _FD)]
            pid = os.posix_spawn(sys.executable, program, bare_environment(), file_actions=actions, setsigmask=[])
        except (OSError, ValueError) as error:
            logger.warning("no reader process can be started (%s): threads read instead", error)
            channel.close()
            return None
        finally:
            child_channel.close()
        return cls(listener, pid, channel)

    def add(self, index: int, fd: int, memory: memoryview | None, memory_fd: int, **record: Any) -> None:
        self._send(lambda: blocks.send_file(self._socket, index, fd, memory_fd, **record))

    def use_ring(self, memory: memoryview, memory_fd: int, slot_bytes: int) -> None:
        self._send(lambda: blocks.send_ring(self._socket, memory_fd, slot_bytes))

    def release(self, slot: int) -> None:
        self._send(lambda: self._socket.sendall(blocks.MESSAGE.pack(blocks.RELEASE, slot)))

    def no_more(self) -> None:
        if self._listener is not None and self._listener.over:  # its last report came before
            self._close_channel()

    def close(self, *, wait: bool) -> None:
        self._listener = None  # which knows this object, and would keep its memory
        if wait:
            self._close_channel()
            self._thread.join()

    def _close_channel(self) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self._socket.shutdown(socket.SHUT_RDWR)

    def _send(self, send: Callable[[], None]) -> None:
        try:
            with self._sending:
                send()
        except OSError as error:  # a process that has ended is found by the listener, with the reason
            logger.debug("the reader process takes no more: %s", error)

    def _listen(self, listener: Listener) -> None:
        try:
            while not listener.over:
                data = self._socket.recv(blocks.REPORT.size, socket.MSG_WAITALL)
                if len(data) < blocks.REPORT.size:
                    break
                listener.report(*blocks.REPORT.unpack(data))
        except OSError as error:
            listener.failed(error)
        self._socket.close()
        _, status = os.waitpid(self._pid, 0)
        if not listener.over:
            how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "an error"
            listener.failed(OSError(0, f"the reader process was ended by {how}"))
