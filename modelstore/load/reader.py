"""The bytes of a snapshot's files into host memory, at the volume's rate, verified in the same pass.

Standard library only but for the checksum, so that a read can be in flight before any heavy import. Never mmap of the
volume: over a network file system each page fault would be a round trip. `blocks.py` reads, in threads of this process
if loading is its only work, or in a process of its own beside other work of this one (imports, answering
jobs), into memory that both map. All files are opened before the first byte is read: a snapshot that is evicted
meanwhile stays readable to the end.

A file's bytes arrive in memory of its own, or, for a device that takes them away as they come, block by block in a ring
of slots, so that a model of any size passes through the same few hundred MB of host memory.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import resource
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modelstore.errors import BadSafetensors, DigestMismatch, NoWeights, RootUnusable, SnapshotNotFound
from modelstore.load import blocks
from modelstore.load.reader_process import BlockSource, ReaderProcess, ReaderThreads
from modelstore.timeline import Span, Timeline
from modelstore.volume import durable
from modelstore.volume.block_table import Entry, stored_ranges
from modelstore.volume.content import check_decoder, read_content
from modelstore.volume.header import LENGTH_BYTES, Header, header_length, parse_header
from modelstore.volume.manifest import FileRecord
from modelstore.volume.snapshots import Snapshot

logger = logging.getLogger(__name__)

RING_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class LoadedBlock:
    """A block whose bytes are there, and right: `length` bytes of the file at `offset`; `slot` -1 outside the ring."""

    path: str
    offset: int
    length: int
    slot: int


@dataclass(slots=True)
class _Opened:
    record: FileRecord
    folder: Path
    fd: int
    block_bytes: int
    memory: memoryview | None
    memory_fd: int = -1
    blocks_left: int = field(init=False)
    first_blocks: int = 0  # without a gap from the first on
    others: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.blocks_left = -(-self.record.size_bytes // self.block_bytes)

    def length(self, block: int) -> int:
        return min(self.block_bytes, self.record.size_bytes - block * self.block_bytes)

    def arrived(self, block: int) -> None:
        self.blocks_left -= 1
        self.others.add(block)
        while self.first_blocks in self.others:
            self.others.remove(self.first_blocks)
            self.first_blocks += 1

    @property
    def compressed(self) -> list[tuple[tuple[int, int], Entry]]:
        """For each block of a compressed file the range of its stored bytes, and its entry."""
        table = self.record.table
        if not table:
            return []
        return list(zip(stored_ranges(table, self.record.size_bytes, self.block_bytes), table, strict=True))

    def read(self, length: int, offset: int) -> bytes:
        """Bytes of the file, ahead of its blocks, and not verified. Raises DigestMismatch if they cannot be decoded."""
        if self.memory is not None and not self.blocks_left:
            return bytes(self.memory[offset : offset + length])
        return read_content(self.fd, self.record, length, offset, self.block_bytes)

    @property
    def first_bytes(self) -> int:
        return min(self.first_blocks * self.block_bytes, self.record.size_bytes)


class Reading:
    """A read in flight. `wait` for one file, `wait_all` for all files that were added, or take blocks as they come.

    The memory belongs to the holders of the views: it is freed with the last of them.
    """

    def __init__(self, *, verify: bool = True, beside: bool = False, ring_bytes: int = 0) -> None:
        """`beside`: in a process of its own. `ring_bytes`: host memory for all the weights together, whose blocks are
        then to be taken away with `next_arrival` and `release`; without it each file has memory of its own."""
        self.began = 0.0
        self.ended: float | None = None
        self.decoding_s = 0.0  # of all threads together
        self._verify = verify
        self._ring_bytes = ring_bytes
        self._ring: memoryview | None = None
        self._slot_bytes = 0
        self._files: list[_Opened] = []
        self._changed = threading.Condition()
        self._error: Exception | None = None
        self._complete = False
        self._arrivals: deque[LoadedBlock] = deque()
        process = ReaderProcess.start(self) if beside and _has_shared_memory() else None
        self._shares_memory = process is not None
        self._source: BlockSource | None = process or ReaderThreads(self)

    def as_span(self, timeline: Timeline) -> Span:
        """The read as a span of a start; it ends now if it has not ended yet."""
        ended = time.monotonic() if self.ended is None else self.ended
        span = Span("read", self.began - timeline.began, ended - timeline.began, self.stored_bytes)
        if self.stored_bytes != self.size_bytes:
            span.plain_bytes, span.decoding_s = self.size_bytes, self.decoding_s
        return span

    @property
    def size_bytes(self) -> int:
        """Bytes of all files that were added, as the model has them."""
        return sum(opened.record.size_bytes for opened in self._files)

    @property
    def stored_bytes(self) -> int:
        """Bytes of these files on the volume."""
        return sum(opened.record.on_volume.size_bytes for opened in self._files)

    @property
    def uses_ring(self) -> bool:
        """Whether weights that are added pass through a ring."""
        return self._ring_bytes > 0

    def holds(self, path: str) -> bool:
        """Whether the file was added."""
        return any(opened.record.path == path for opened in self._files)

    def add(self, folder: Path, files: Sequence[FileRecord], *, block_bytes: int) -> None:
        """Open files, contents of a snapshot, all of them before one is read, and read them. Raises SnapshotNotFound if
        one is not there, NotFound if one is compressed and the library for that is not installed."""
        if any(record.table for record in files):
            check_decoder()
        self.began = self.began or time.monotonic()
        for record, fd in zip(files, _open_all(folder, files), strict=True):
            in_ring = self._ring_bytes > 0 and record.path.endswith(".safetensors")
            if in_ring and self._ring is None:
                self._make_ring(block_bytes)
            memory, memory_fd = (None, -1) if in_ring else self._shared_memory(record.size_bytes)
            opened = _Opened(record, folder, fd, block_bytes, memory, memory_fd)
            with self._changed:
                index = len(self._files)
                self._files.append(opened)
            if opened.blocks_left and self._source is not None:
                self._source.add(
                    index,
                    fd,
                    memory,
                    memory_fd,
                    size_bytes=record.size_bytes,
                    block_bytes=block_bytes,
                    checksums=record.blocks if self._verify else "",
                    compressed=opened.compressed,
                )

    def adopt(self, folder: Path, record: FileRecord, memory: memoryview, *, block_bytes: int) -> None:
        """Take a file of `folder` whose bytes are in `memory` already, and right: all its blocks have arrived."""
        self.began = self.began or time.monotonic()
        opened = _Opened(record, folder, -1, block_bytes, memory)
        with self._changed:
            self._files.append(opened)
            for block in range(opened.blocks_left):
                self._arrivals.append(LoadedBlock(record.path, block * block_bytes, opened.length(block), -1))
                opened.arrived(block)
            self._changed.notify_all()

    def no_more(self) -> None:
        """All files were added."""
        with self._changed:
            self._complete = True
            self._end_if_done()
            self._changed.notify_all()
        if self._source is not None:
            self._source.no_more()

    def header(self, path: str) -> tuple[Header, bytes]:
        """The header of a safetensors file, and its bytes, read ahead of the blocks that hold them: compare the two
        when those have arrived. Raises DigestMismatch if they are no header: a published file has one."""
        opened = self._opened(path)
        size, where = opened.record.size_bytes, str(opened.folder / path)

        try:
            prefix = opened.read(LENGTH_BYTES, 0)
            raw = opened.read(header_length(prefix, file_bytes=size, where=where), LENGTH_BYTES)
            return parse_header(raw, file_bytes=size, where=where), prefix + raw
        except BadSafetensors as error:
            raise DigestMismatch(str(error)) from error

    def memory(self, path: str) -> memoryview:
        """The memory of a file, whether its bytes have arrived or not."""
        opened = self._opened(path)
        if opened.memory is None:
            raise ValueError(f"{path} goes through the ring")
        return opened.memory[: opened.record.size_bytes]

    def wait(self, path: str) -> memoryview:
        """The bytes of one file, once all of it has arrived.

        Raises DigestMismatch if a block is not what the manifest says, OSError if the volume fails.
        """
        opened = self._opened(path)
        self._until(lambda: not opened.blocks_left)
        return self.memory(path)

    def shared_descriptor(self, path: str) -> int:
        """A descriptor of the memory that a file's bytes arrive in, for another process, until this reading is closed;
        -1 if no other process can see that memory. It is a little longer than the file."""
        return self._opened(path).memory_fd

    def descriptor(self, path: str) -> int:
        """A descriptor of the memory that holds one file, all of it and nothing else, once it has arrived: another
        process may open it as /proc/PID/fd/N until this reading is closed. -1 if no such process can see the memory.

        Raises as `wait` does.
        """
        opened = self._opened(path)
        if opened.memory_fd >= 0:
            self.wait(path)
            os.ftruncate(opened.memory_fd, opened.record.size_bytes)  # its memory is a little longer
        return opened.memory_fd

    def wait_beyond(self, path: str, size_bytes: int) -> int:
        """The number of a file's bytes that have arrived without a gap from its first on, once there are more than
        `size_bytes`. Raises as `wait` does."""
        opened = self._opened(path)
        self._until(lambda: opened.first_bytes > size_bytes)
        return opened.first_bytes

    def check(self) -> None:
        """Raise the error that has ended the reading, if there is one."""
        if self._error is not None:
            raise self._error

    def wait_small_files(self, snapshot: Snapshot) -> None:
        """Return when all files but the weights have arrived: a config is parsed only once its bytes are known to be
        right. Raises as `wait` does."""
        for file in snapshot.manifest.contents:
            if not file.path.endswith(".safetensors"):
                self.wait(file.path)

    def wait_all(self) -> None:
        """Return when everything has arrived; raises as `wait` does."""
        self._until(lambda: self.ended is not None)

    def next_arrival(self, *, wait: bool) -> LoadedBlock | None:
        """The next block that has arrived; None if there is none yet, or with `wait`, if none will come.

        Raises as `wait` does.
        """
        if wait:
            self._until(lambda: bool(self._arrivals) or self.ended is not None)
        with self._changed:
            if self._error is not None:
                raise self._error
            return self._arrivals.popleft() if self._arrivals else None

    def memory_behind(self, arrival: LoadedBlock) -> tuple[memoryview, int, int]:
        """All of the host memory that a block's bytes are in, for a device that wants it pinned; the block's place in
        it, and the number of bytes from one block's place to the next."""
        if arrival.slot >= 0:
            assert self._ring is not None
            return self._ring, arrival.slot * self._slot_bytes, self._slot_bytes
        opened = self._opened(arrival.path)
        assert opened.memory is not None
        return opened.memory, arrival.offset, opened.block_bytes

    def record(self, path: str) -> FileRecord:
        """The record of a file that was added."""
        return self._opened(path).record

    def view(self, arrival: LoadedBlock) -> memoryview:
        """The bytes of a block that has arrived; of one in the ring, until it is released."""
        if arrival.slot < 0:
            return self.memory(arrival.path)[arrival.offset : arrival.offset + arrival.length]
        assert self._ring is not None
        start = arrival.slot * self._slot_bytes
        return self._ring[start : start + arrival.length]

    def release(self, arrival: LoadedBlock) -> None:
        """The block was taken away: its slot may be filled again."""
        if arrival.slot >= 0 and self._source is not None:
            self._source.release(arrival.slot)

    def damage(self) -> DigestMismatch | None:
        """The error of the bytes, once all of them were read or the first wrong block was; a file that cannot be
        read is as good as wrong."""
        try:
            for opened in self._files:
                if opened.memory is not None:  # blocks that would come through the ring are never taken out
                    self.wait(opened.record.path)
        except DigestMismatch as error:
            return error
        except OSError as error:
            return DigestMismatch(f"{self._files[0].folder} cannot be read ({error.strerror}): check the volume")
        except Exception as error:  # of the copies to a device: the bytes are not at fault
            logger.debug("the reading was ended by %s", error)
        return None

    def close(self, *, wait: bool = True) -> None:
        """Stop reading, if it still goes on, and close the files. The memory stays with its views.

        `wait`: return when the readers have ended; without it those that have done their work do so by themselves.
        """
        with self._changed:
            if not self.over:
                self._error = OSError(0, "the reading was closed")
            self._changed.notify_all()
        source, self._source = self._source, None  # it knows this object, and would keep its memory
        if source is not None:
            source.close(wait=wait)
        with self._changed:
            for opened in self._files:
                for fd in (opened.fd, opened.memory_fd):
                    if fd >= 0:
                        os.close(fd)
                opened.fd = opened.memory_fd = -1

    def release_memory(self) -> None:
        """Hold the memory no more, once closed: it is its views' alone."""
        with self._changed:
            for opened in self._files:
                opened.memory = None
            self._ring = None

    def _opened(self, path: str) -> _Opened:
        return next(opened for opened in self._files if opened.record.path == path)

    def _until(self, ready: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or ready())
            if self._error is not None:
                raise self._error

    def report(self, kind: int, index: int, block: int, detail: int, now: float, decoding_s: float) -> None:
        """Take the outcome of a block; called by the threads that read, or that listens to the process."""
        with self._changed:
            opened = self._files[index]
            self.decoding_s += decoding_s
            if kind == blocks.ARRIVED:
                opened.arrived(block)
                offset = block * opened.block_bytes
                self._arrivals.append(LoadedBlock(opened.record.path, offset, opened.length(block), detail))
                self._end_if_done(now)
            elif self._error is None:
                self._error = _error(kind, opened, block, detail)
            self._changed.notify_all()

    def _end_if_done(self, now: float | None = None) -> None:
        if self._complete and self.ended is None and not any(opened.blocks_left for opened in self._files):
            self.ended = now or time.monotonic()

    def failed(self, error: Exception) -> None:
        """End the reading with an error."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    @property
    def over(self) -> bool:
        """Whether nothing more will arrive."""
        return self.ended is not None or self._error is not None

    def _shared_memory(self, size_bytes: int) -> tuple[memoryview, int]:
        """Memory for a file, with a descriptor if a process shares it, else -1."""
        if not self._shares_memory:
            return host_memory(size_bytes), -1
        length = _memory_length(size_bytes)
        fd = os.memfd_create("modelstore", os.MFD_CLOEXEC)
        os.ftruncate(fd, length)
        return memoryview(mmap.mmap(fd, length)), fd

    def _make_ring(self, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        self._ring, fd = self._shared_memory(max(4, self._ring_bytes // slot_bytes) * slot_bytes)
        if self._source is not None:
            self._source.use_ring(self._ring, fd, slot_bytes)
        if fd >= 0:
            os.close(fd)


def _has_shared_memory() -> bool:
    """Whether this process may make memory that others open; some sandboxes forbid it, and threads read then."""
    try:
        os.close(os.memfd_create("modelstore", os.MFD_CLOEXEC))
    except OSError as error:
        logger.warning("no memory can be shared with a reader process (%s): threads read instead", error.strerror)
        return False
    return True


def host_memory(size_bytes: int) -> memoryview:
    """Memory for a file, of this process alone: as long as that and a little more."""
    return memoryview(mmap.mmap(-1, _memory_length(size_bytes), flags=mmap.MAP_PRIVATE))


def _memory_length(size_bytes: int) -> int:
    return max(blocks.rounded(size_bytes), 1)


def start_reading(
    snapshot: Snapshot,
    *,
    verify: bool = True,
    beside: bool = False,
    ring_bytes: int = 0,
    weights: bool = True,
    files: Sequence[FileRecord] = (),
) -> Reading:
    """Start to read a snapshot into host memory: the small files, so that they are verified too, then the weights.

    `weights`: whether to read those. `files`: read these alone instead. The other arguments are those of `Reading`.
    Raises NoWeights, and SnapshotNotFound if it was evicted meanwhile.
    """
    if not snapshot.weights:
        raise NoWeights(f"{snapshot.key} has no weights: remove it and seed the model again")
    small = [file for file in snapshot.manifest.contents if not file.path.endswith(".safetensors")]
    reading = Reading(verify=verify, beside=beside, ring_bytes=ring_bytes)
    try:
        wanted = files or (*small, *(snapshot.weights if weights else ()))
        reading.add(snapshot.path, wanted, block_bytes=snapshot.manifest.block_bytes)
    except BaseException:
        reading.close()
        raise
    reading.no_more()
    return reading


def _error(kind: int, opened: _Opened, block: int, number: int) -> Exception:
    path = opened.folder / opened.record.on_volume.path
    if kind == blocks.FAILED:
        return OSError(number, os.strerror(number), str(path))
    problem = "ends early" if kind == blocks.SHORT else "differs from the published bytes"
    return DigestMismatch(
        f"{path} {problem} at byte {block * opened.block_bytes}: "
        "remove the snapshot (`modelstore rm`) and seed the model again"
    )


def _opened_within_limit(path: Path) -> int:
    """A descriptor of a file; if the process has as many as it may, after raising that to what the system allows."""
    try:
        return durable.open_for_read(path)
    except OSError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if error.errno != errno.EMFILE or soft == hard:
            raise
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return durable.open_for_read(path)


def _open_all(folder: Path, files: Sequence[FileRecord]) -> list[int]:
    fds: list[int] = []
    try:
        for file in files:
            fds.append(_opened_within_limit(folder / file.on_volume.path))
    except OSError as error:
        for fd in fds:
            os.close(fd)
        if error.errno == errno.EMFILE:
            raise RootUnusable(
                f"this process may not open the {len(files)} files of {folder}: raise its limit (`ulimit -n`)"
            ) from error
        raise SnapshotNotFound(f"{folder} cannot be opened ({error.strerror}): look it up again, or seed it") from error
    return fds
