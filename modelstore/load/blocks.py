"""Blocks of files into memory, by several threads, each compared with its checksum while the processor still has it.

`BlockReader` does the work, in threads of the process that makes one. As a program this file is the reader process:

    python -I -S blocks.py SOCKET FOLDERS_OF_LIBRARIES

It is started before a worker's heavy imports and reads beside them, because threads inside the importing process and
the imports slow each other down. It takes files over the socket (the descriptors of the file and of the memory to fill
come with the message), reports each block, and ends with the socket. So that it starts in no time it imports the
standard library's light modules and nothing of this package.

How a block is read: through the page cache if all of it lies there already (a memory copy), else with O_DIRECT,
which spares a network mount one copy of all bytes, else, if a mount refuses that, with a plain read. `mincore` tells
which pages are in the cache; RWF_NOWAIT does not on MooseFS, and on ext4 it starts to read the missing ones.
Whether memory comes in huge pages is left to the system: if its host takes free ones back they are seven times
slower to fill than small ones (measured), elsewhere up to three times faster.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

CHECKSUM_HEX = 16  # as in volume/manifest.py, from which this file may not import
ALIGNMENT = 4096  # as in volume/block_table.py
_SMALL = 2 << 20  # below, a second descriptor is not worth opening
MOST_AT_ONCE = 16
_ASKED_TOGETHER = 8  # blocks
_MADV_POPULATE_WRITE = 23

# The outcomes of a block; a report is the outcome, file, number, slot (-1: in place) or errno, time (monotonic), and
# seconds of decoding.
ARRIVED, WRONG, SHORT, FAILED = range(4)
REPORT = struct.Struct("<iiiidd")
# The messages to the reader process: kind and a number. FILE, RING: so many bytes of JSON follow.
MESSAGE = struct.Struct("<II")
FILE, RING, RELEASE = range(3)

_of_thread = threading.local()

Report = Callable[[int, int, int, int, float, float], None]


def rounded(size_bytes: int) -> int:
    """`size_bytes` up to the next multiple of ALIGNMENT."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


class File:
    """One file to read. `memory` takes all of it, rounded up to ALIGNMENT; without, its blocks go to the ring."""

    def __init__(
        self,
        index: int,
        fd: int,
        size_bytes: int,
        block_bytes: int,
        checksums: str,
        memory: memoryview | None,
        compressed: Sequence[tuple[tuple[int, int], Sequence[int]]] = (),
    ) -> None:
        """`checksums`: the XXH3-64 of each block in hex, joined; empty to take any bytes. `compressed`: for each block
        of a compressed file the offset and length of its stored bytes, and its entry of `planes.py`; the other
        arguments are of what the file holds. Closes `fd` at the end."""
        self.index = index
        self.fd = fd
        self.size_bytes = size_bytes
        self.block_bytes = block_bytes
        self.checksums = checksums
        self.memory = memory
        self.compressed = compressed
        self.blocks = -(-size_bytes // block_bytes)
        stored_bytes = sum(compressed[-1][0]) if compressed else size_bytes
        self.direct = _reopened_direct(fd) if stored_bytes >= _SMALL else None
        self.cache = CachedPages(fd, stored_bytes) if self.direct is not None else None
        self._cached_groups: dict[int, bool] = {}

    def length(self, block: int) -> int:
        """The bytes of a block."""
        return min(self.block_bytes, self.size_bytes - block * self.block_bytes)

    def stored_range(self, block: int) -> tuple[int, int]:
        """Offset and length of the bytes of a block in the file."""
        if self.compressed:
            offset, length = self.compressed[block][0]
            return offset, length
        return block * self.block_bytes, self.length(block)

    def is_cached(self, block: int) -> bool:
        """Whether all of a block lies in the page cache; of a small file, no. The system is asked for several blocks at
        once, and for one alone if it has not all of those."""
        if self.cache is None:
            return False
        group = block // _ASKED_TOGETHER
        if group not in self._cached_groups:
            begin, _length = self.stored_range(group * _ASKED_TOGETHER)
            last, length = self.stored_range(min((group + 1) * _ASKED_TOGETHER, self.blocks) - 1)
            self._cached_groups[group] = self.cache.contain(begin, last + length - begin)
        return self._cached_groups[group] or self.cache.contain(*self.stored_range(block))

    def close(self) -> None:
        self.cache = None
        for fd in (self.fd, self.direct):
            if fd is not None:
                os.close(fd)


class ReadConcurrency:
    """The number of reads at once. It is doubled as long as that makes reading a tenth faster, and tried again later. A
    block of the page cache is copied in memory: from the first of those on, there are as many reads as three quarters
    of the processors, which leaves some to the copies to a GPU (16 readers on 16 processors took 1.7 times as long as
    12, measured)."""

    WINDOW_S = 0.2
    SETTLED_WINDOWS = 15

    def __init__(self, readers: int = 0, limit: int = MOST_AT_ONCE) -> None:
        self.readers = readers or max(2, min(4, os.cpu_count() or 4))
        self._most = limit
        self._rate_before = 0.0
        self._rest = 0
        self._began: float | None = None
        self._last_read = 0.0
        self._bytes = 0
        self._blocks = 0
        self._copies = False
        self._copied_last = False
        self._before_trial = self.readers

    def note_cached_block(self) -> bool:
        """A block lies in the page cache. Returns whether `readers` has changed."""
        if self._copies:
            return False
        self._copies = True
        count: int = _of_package("modelstore.processors").processors()
        before, self.readers = self.readers, max(self.readers, min(self._most, count - count // 4))
        return self.readers != before

    def note_read(self, size_bytes: int, now: float, *, is_copy: bool = False) -> bool:
        """A block was read. Returns whether `readers` has changed."""
        # Copies tell nothing of the volume; a stretch of them ends a window that would look slow.
        if is_copy or self._began is None or (self._copied_last and now - self._last_read > self.WINDOW_S):
            self._copied_last = is_copy
            if not is_copy:
                self._began, self._bytes, self._blocks, self._last_read = now, 0, 0, now
            return False
        self._copied_last, self._last_read = False, now
        self._bytes += size_bytes
        self._blocks += 1
        if now - self._began < self.WINDOW_S or self._blocks < 2 * self.readers:
            return False
        rate = self._bytes / (now - self._began)
        self._began, self._bytes, self._blocks = now, 0, 0
        if self._rest:
            self._rest -= 1
            if self._rest:
                return False
        elif self._rate_before and rate <= 1.1 * self._rate_before:
            self.readers = self._before_trial
            self._rate_before, self._rest = 0.0, self.SETTLED_WINDOWS
            return True
        if self.readers == self._most:
            self._rate_before, self._rest = 0.0, self.SETTLED_WINDOWS
            return False
        self._rate_before, self._before_trial = rate, self.readers
        self.readers = min(self._most, 2 * self.readers)
        return True


class BlockReader:
    """Reads its files, block by block, in order.

    `report` is called from its threads, for each block, with ARRIVED and so on. After anything but ARRIVED no further
    block is begun. The files are closed when the threads end.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._pace = ReadConcurrency()
        self._changed = threading.Condition()
        self._files: list[File] = []
        self._own: deque[tuple[File, int]] = deque()  # blocks of files with memory of their own
        self._through_ring: deque[tuple[File, int]] = deque()
        self._ring: memoryview | None = None
        self._slot_bytes = 0
        # The last one first: its pages are there, pinned, and in the processor's cache.
        self._free: list[int] = []
        self._complete = False
        self._stopped = False
        self._threads: list[threading.Thread] = []
        self._running = 0

    def use_ring(self, memory: memoryview, slot_bytes: int) -> None:
        """The memory for blocks of files without memory of their own; a slot is used again after its `release`."""
        with self._changed:
            self._ring, self._slot_bytes = memory, slot_bytes
            self._free.extend(reversed(range(len(memory) // slot_bytes)))

    def release(self, slot: int) -> None:
        with self._changed:
            self._free.append(slot)
            self._changed.notify_all()

    def add(self, file: File) -> None:
        """Begin to read a file, beside those that were added before."""
        with self._changed:
            self._files.append(file)
            blocks = self._through_ring if file.memory is None else self._own
            blocks.extend((file, number) for number in range(file.blocks))
            self._start_threads()
            self._changed.notify_all()

    def no_more(self) -> None:
        """Nothing will be added: the threads end when all was read."""
        with self._changed:
            self._complete = True
            self._start_threads()
            self._changed.notify_all()

    def stop(self) -> None:
        """End after the blocks that are being read."""
        with self._changed:
            self._stopped = True
            self._start_threads()
            self._changed.notify_all()

    def join(self) -> None:
        """Return when the threads have ended."""
        for thread in self._threads:
            thread.join()

    def _start_threads(self) -> None:
        while len(self._threads) < self._pace.readers:
            number = len(self._threads)
            thread = threading.Thread(target=self._work, args=(number,), name=f"read-{number}", daemon=True)
            self._threads.append(thread)
            self._running += 1
            thread.start()

    def _work(self, number: int) -> None:
        while (work := self._take(number)) is not None:
            file, block, slot, view = work
            try:
                is_cached = file.is_cached(block)
                if is_cached:
                    with self._changed:
                        if self._pace.note_cached_block():
                            self._start_threads()
                            self._changed.notify_all()
                    if slot < 0 and not file.compressed:
                        _make_pages(view)
                kind, detail, decoding_s = self._read(file, block, slot, view, None if is_cached else file.direct)
            except BaseException:  # a bug, or no memory: without a report the caller would wait for ever
                self._report(FAILED, file.index, block, errno.EIO, time.monotonic(), 0.0)
                raise
            now = time.monotonic()
            with self._changed:
                if kind != ARRIVED:
                    self._stopped = True
                if self._pace.note_read(len(view), now, is_copy=is_cached):
                    self._start_threads()
                    self._changed.notify_all()
            self._report(kind, file.index, block, detail, now, decoding_s)
        with self._changed:
            self._running -= 1
            if not self._running:
                for file in self._files:
                    file.close()
                self._files.clear()

    def _take(self, number: int) -> tuple[File, int, int, memoryview] | None:
        """The next block and its memory; None when there will be none."""
        with self._changed:
            while True:
                if self._stopped or (self._complete and not self._own and not self._through_ring):
                    self._changed.notify_all()
                    return None
                # A full ring holds up no small file: its user may need that first.
                ready = self._own or (self._through_ring if self._free else None)
                if ready and number < self._pace.readers:
                    break
                self._changed.wait()
            file, block = ready.popleft()
            offset = block * file.block_bytes
            length = rounded(file.length(block))
            if file.memory is not None:
                return file, block, -1, file.memory[offset : offset + length]
            assert self._ring is not None
            slot = self._free.pop()
            return file, block, slot, self._ring[slot * self._slot_bytes : slot * self._slot_bytes + length]

    def _read(self, file: File, block: int, slot: int, view: memoryview, direct: int | None) -> tuple[int, int, float]:
        """Fill `view`, which is as long as the block, rounded up; through the descriptor `direct`, if it is there.
        Returns the outcome, the slot or the errno, and the seconds that decoding took."""
        offset, stored = file.stored_range(block)
        length = file.length(block)
        source = _scratch(stored) if file.compressed else view
        try:
            position = 0
            while position < stored:
                count = -1
                if direct is not None and position % ALIGNMENT == 0:
                    count = _direct_read(direct, source[position:], offset + position)
                if count < 0:
                    direct = None
                    count = _read_once_more(file.fd, source[position:stored], offset + position)
                if count == 0:
                    return SHORT, slot, 0.0
                position += count
        except OSError as error:
            return FAILED, error.errno or errno.EIO, 0.0
        began = time.monotonic()
        if file.compressed:
            try:
                _of_package("modelstore.volume.planes").decode(file.compressed[block][1], source, view[:length])
            except ValueError:
                return WRONG, slot, 0.0
        decoding_s = time.monotonic() - began
        if file.checksums:
            from xxhash import xxh3_64_hexdigest

            expected = file.checksums[block * CHECKSUM_HEX : (block + 1) * CHECKSUM_HEX]
            if xxh3_64_hexdigest(view[:length]) != expected:
                return WRONG, slot, decoding_s
        return ARRIVED, slot, decoding_s


class CachedPages:
    """The pages of a file that are in the page cache. The file is mapped once: to map a window of it for each block
    would make the threads wait for each other (a fifth of the time, measured)."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._mincore: Any = None
        try:
            import ctypes

            # The kernel says "all of it" to a process that neither owns a file nor may write it.
            if os.fstat(fd).st_uid != os.geteuid() and not os.access(f"/proc/self/fd/{fd}", os.W_OK):
                return
            self._map = mmap.mmap(fd, size_bytes, flags=mmap.MAP_PRIVATE)
            self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
            mincore = ctypes.CDLL(None).mincore
            mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
            self._mincore, self._buffer = mincore, ctypes.create_string_buffer
        except (ImportError, OSError, ValueError, AttributeError):
            return

    def contain(self, offset: int, length: int) -> bool:
        """Whether they contain all of a range, which begins at a page; no if that cannot be told. Nothing is read."""
        if self._mincore is None or offset % mmap.PAGESIZE:
            return False
        pages = self._buffer(-(-length // mmap.PAGESIZE))
        return not self._mincore(self._address + offset, length, pages) and b"\0" not in pages.raw


def _scratch(size_bytes: int) -> memoryview:
    """Memory of this thread for the stored bytes of a block, which is used again for the next one."""
    memory: memoryview | None = getattr(_of_thread, "scratch", None)
    if memory is None or len(memory) < size_bytes:
        memory = _of_thread.scratch = memoryview(mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE))
    return memory[:size_bytes]


@cache
def _of_package(name: str) -> Any:
    """A module of the package, from its file: this process may have nothing of the package on its path."""
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, Path(__file__).parent.parent.joinpath(*name.split(".")[1:]).with_suffix(".py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _make_pages(view: memoryview) -> None:
    """Have the kernel make the pages of new memory at once: one by one, as a copy comes to them, takes a tenth longer
    (measured). A kernel before 5.14 refuses, and nothing is lost."""
    import ctypes

    start = ctypes.c_char.from_buffer(view)
    ctypes.CDLL(None).madvise(ctypes.byref(start), ctypes.c_size_t(len(view)), _MADV_POPULATE_WRITE)


def _reopened_direct(fd: int) -> int | None:
    """A second descriptor of the file that passes the page cache by; None if the mount refuses."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except (OSError, AttributeError):
        return None


def _read_once_more(fd: int, view: memoryview, offset: int) -> int:
    """The bytes read; tried once more if the mount's name of the file is stale."""
    try:
        return os.preadv(fd, [view], offset)
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
    return os.preadv(fd, [view], offset)


def _direct_read(fd: int, view: memoryview, offset: int) -> int:
    """The bytes read, or -1 if the mount refuses a direct read after all."""
    try:
        return os.preadv(fd, [view], offset)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return -1


def send_file(sock: socket.socket, index: int, fd: int, memory_fd: int, **record: Any) -> None:
    """Give the reader process a file: `record` holds the arguments of `File`."""
    data = json.dumps({"index": index, **record}).encode()
    fds = [fd] if memory_fd < 0 else [fd, memory_fd]
    socket.send_fds(sock, [MESSAGE.pack(FILE, len(data))], fds)
    sock.sendall(data)


def send_ring(sock: socket.socket, memory_fd: int, slot_bytes: int) -> None:
    """Give the reader process the ring."""
    data = json.dumps({"slot_bytes": slot_bytes}).encode()
    socket.send_fds(sock, [MESSAGE.pack(RING, len(data))], [memory_fd])
    sock.sendall(data)


def _map_memory(fd: int) -> memoryview:
    memory = mmap.mmap(fd, 0)
    os.close(fd)
    return memoryview(memory)


def _serve(sock: socket.socket) -> None:
    sending = threading.Lock()

    def report(kind: int, file: int, block: int, detail: int, now: float, decoding_s: float) -> None:
        with sending:
            try:
                sock.sendall(REPORT.pack(kind, file, block, detail, now, decoding_s))
            except OSError:  # the parent has closed the reading, or ended
                os._exit(0)

    reader = BlockReader(report)
    while True:
        head, fds, _flags, _address = socket.recv_fds(sock, MESSAGE.size, 2)
        while head and len(head) < MESSAGE.size:
            chunk = sock.recv(MESSAGE.size - len(head))
            head = head + chunk if chunk else b""
        if not head:
            return
        kind, number = MESSAGE.unpack(head)
        if kind == RELEASE:
            reader.release(number)
        else:
            record = json.loads(sock.recv(number, socket.MSG_WAITALL))
            if kind == RING:
                reader.use_ring(_map_memory(fds[0]), record["slot_bytes"])
            else:
                memory = _map_memory(fds[1]) if len(fds) > 1 else None
                reader.add(File(fd=fds[0], memory=memory, **record))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the worker, whose end closes the socket
    sys.path.extend(sys.argv[2].split(os.pathsep))
    os.nice(10)  # if the processors are few, the imports go first: a start takes 0.91 of the time (1 GB/s)
    sock = socket.socket(fileno=int(sys.argv[1]))
    try:
        _serve(sock)
    except OSError:  # the parent has ended
        os._exit(0)
    os._exit(0)  # without waiting for reads that are under way: they are of no use any more


if __name__ == "__main__":
    main()
