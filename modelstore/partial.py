"""One staged file: its bytes, its journal, and its digests.

A file is kept in granules of 256 KiB. Each granule that lies on the volume has a slot of 16 bytes in the journal: its
XXH3-64 checksum and a tag that binds the checksum to the file and the position. Data and slots are written in place, so
two writers that both believe they hold the claim write the same bytes, and a torn or stale slot simply does not match.
Nothing rests on the order in which a crash kept them: on resume every granule is read again and compared with its slot.

SHA-256 runs over the file in order while granules arrive out of order: those ahead of the front wait in memory up to a
limit, and are read back from the volume beyond it. The same pass gives the block checksums of the manifest.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import xxhash

from modelstore import durable
from modelstore.errors import DigestMismatch
from modelstore.layout import StagingLayout
from modelstore.manifest import BLOCK_BYTES
from modelstore.sources import SourceFile

GRANULE_BYTES = 256 << 10
_SLOT_BYTES = 16
_AHEAD_BYTES = 128 << 20
_STALLED_S = 2.0

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Digests:
    """A file's own digests: SHA-256, and the XXH3-64 of each block in hex, joined."""

    sha256: str
    blocks: str


class RunningDigests:
    """SHA-256 and block checksums of bytes that are given in order."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._block = xxhash.xxh3_64()
        self._in_block = 0
        self._blocks: list[str] = []

    def update(self, data: bytes | bytearray | memoryview) -> None:
        self._sha256.update(data)
        view = memoryview(data)
        while view:
            part = view[: BLOCK_BYTES - self._in_block]
            self._block.update(part)
            self._in_block += len(part)
            view = view[len(part) :]
            if self._in_block == BLOCK_BYTES:
                self._end_block()

    def finish(self) -> Digests:
        if self._in_block:
            self._end_block()
        return Digests(self._sha256.hexdigest(), "".join(self._blocks))

    def _end_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block = xxhash.xxh3_64()
        self._in_block = 0


class PartialFile:
    """One staged file: its bytes, its journal, and the digests of what has arrived without a gap.

    Threads may put different granules at once; `whole_stream` is for a source that ignores ranges, where one thread
    takes the whole file and the others wait.
    """

    def __init__(self, file: SourceFile, staging: StagingLayout) -> None:
        self.file = file
        self.path = staging.source_file(file.path)
        self._journal = staging.journal_file(file.path)
        self.granules = -(-file.size_bytes // GRANULE_BYTES)
        for path in (self.path, self._journal):
            durable.make_folder(path.parent)
        self._fd = durable.open_for_write(self.path)
        self._journal_fd = durable.open_for_write(self._journal)
        durable.set_size(self._fd, file.size_bytes, path=self.path)
        self._have = [False] * self.granules
        self.whole_stream = threading.Lock()
        self._lock = threading.Lock()
        self._front_lock = threading.Lock()
        self._front = 0
        self._ahead: dict[int, bytes | bytearray] = {}
        self._digests = RunningDigests()

    def resume(self, inherited: Iterable[StagingLayout] = ()) -> int:
        """Keep what matches its slot, and copy what does from `inherited` staging; returns the bytes kept.

        Copying is for staging whose writer may still live: what it writes late goes into its file, not into ours. A
        copy that stalls is given up, and the rest fetched: on MooseFS the chunks that a lost host was writing can
        neither be written nor read for two minutes.
        """
        kept = sum(
            len(data) for index, data in self._intact_granules(self._fd, self._journal_fd) if self._arrived(index, data)
        )
        for staging in inherited:
            granules = _until_it_stalls(self._granules_of(staging), limit_s=_STALLED_S)
            kept += sum(len(data) for index, data in granules if self.put(index, data))
        return kept

    def _granules_of(self, staging: StagingLayout) -> Iterator[tuple[int, bytes]]:
        """The granules that we lack and that another staging folder has intact."""
        source, journal = staging.source_file(self.file.path), staging.journal_file(self.file.path)
        with _opened(source) as fd, _opened(journal) as journal_fd:
            if fd is not None and journal_fd is not None:
                yield from self._intact_granules(fd, journal_fd)

    def _intact_granules(self, fd: int, journal_fd: int) -> Iterator[tuple[int, bytes]]:
        """The granules that we lack and that match their slots."""
        slots = os.pread(journal_fd, self.granules * _SLOT_BYTES, 0)
        for index in range(len(slots) // _SLOT_BYTES):
            slot = slots[index * _SLOT_BYTES : (index + 1) * _SLOT_BYTES]
            if self._have[index] or slot.count(0) == _SLOT_BYTES:
                continue
            data = os.pread(fd, self._length(index), index * GRANULE_BYTES)
            if len(data) == self._length(index) and slot == self._slot(index, data):
                yield index, data

    def missing(self) -> list[tuple[int, int]]:
        """The gaps as (first granule, one past the last)."""
        gaps: list[tuple[int, int]] = []
        for index, have in enumerate(self._have):
            if have:
                continue
            if gaps and gaps[-1][1] == index:
                gaps[-1] = (gaps[-1][0], index + 1)
            else:
                gaps.append((index, index + 1))
        return gaps

    def put(self, index: int, data: bytes | bytearray) -> bool:
        """Store one granule with its slot, and keep `data`; False where it was there already."""
        if self._have[index]:
            return False
        durable.write_at(self._fd, data, index * GRANULE_BYTES, path=self.path)
        durable.write_at(self._journal_fd, self._slot(index, data), index * _SLOT_BYTES, path=self._journal)
        return self._arrived(index, data)

    def has(self, index: int) -> bool:
        return self._have[index]

    def finish(self) -> Digests:
        """The digests of the whole file, checked against what the source states; the file is kept either way."""
        self._advance(wait_for_turn=True)
        if self._front != self.granules:
            raise AssertionError(f"{self.file.path} is not complete")
        digests = self._digests.finish()
        if self.file.sha256 is not None:
            matches = digests.sha256 == self.file.sha256
        elif self.file.git_oid is not None:
            matches = _git_oid(self._fd, self.file.size_bytes) == self.file.git_oid
        else:
            matches = True
        if not matches:
            raise DigestMismatch(
                f"{self.file.path} has the right size and wrong bytes (sha256 {digests.sha256[:12]}…): nothing was "
                "published; try again, and if it stays so tell the repo's owner"
            )
        return digests

    def forget(self) -> None:
        """Drop the journal, so that nothing of this file counts as fetched."""
        durable.remove_file(self._journal)

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._journal_fd)

    def _length(self, index: int) -> int:
        return min(GRANULE_BYTES, self.file.size_bytes - index * GRANULE_BYTES)

    def _read(self, index: int) -> bytes:
        return os.pread(self._fd, self._length(index), index * GRANULE_BYTES)

    def _slot(self, index: int, data: bytes | bytearray) -> bytes:
        checksum = xxhash.xxh3_64_digest(data)
        identity = f"{self.file.path}\0{self.file.size_bytes}\0{self.file.sha256 or self.file.git_oid}\0{index}"
        return checksum + xxhash.xxh3_64_digest(checksum + identity.encode())

    def _arrived(self, index: int, data: bytes | bytearray) -> bool:
        with self._lock:
            if self._have[index]:
                return False
            self._have[index] = True
            if (index - self._front) * GRANULE_BYTES < _AHEAD_BYTES:
                self._ahead[index] = data
        self._advance()
        return True

    def _advance(self, *, wait_for_turn: bool = False) -> None:
        """Digest granules from the front on; one thread does it at a time, the others leave theirs to it."""
        while self._front < self.granules and self._have[self._front]:
            if not self._front_lock.acquire(blocking=wait_for_turn):
                return
            try:
                while self._front < self.granules and self._have[self._front]:
                    with self._lock:
                        data = self._ahead.pop(self._front, None)
                    self._digests.update(self._read(self._front) if data is None else data)
                    with self._lock:
                        self._front += 1
                        self._ahead.pop(self._front - 1, None)
            finally:
                self._front_lock.release()


def _until_it_stalls(items: Iterator[T], *, limit_s: float) -> Iterator[T]:
    """What `items` yields, until one takes longer than `limit_s`; it runs in a thread that is then left alone."""
    ready: queue.Queue[T | None] = queue.Queue(maxsize=4)
    left_alone = threading.Event()

    def run() -> None:
        try:
            for item in items:
                ready.put(item)
                if left_alone.is_set():
                    return
        except OSError as error:
            logger.warning("what an earlier worker left cannot be read (%s): it is fetched again", error)
        ready.put(None)

    threading.Thread(target=run, name="inherit", daemon=True).start()
    try:
        while (item := ready.get(timeout=limit_s)) is not None:
            yield item
    except queue.Empty:
        logger.warning("what an earlier worker was writing cannot be read yet: the rest is fetched again")
    finally:
        left_alone.set()


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """A descriptor to read `path`, or None where there is no such regular file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _git_oid(fd: int, size_bytes: int) -> str:
    """Git's name for the file's bytes: SHA-1 over a small header and them."""
    digest = hashlib.sha1(b"blob %d\0" % size_bytes, usedforsecurity=False)
    offset = 0
    while data := os.pread(fd, 1 << 20, offset):
        digest.update(data)
        offset += len(data)
    return digest.hexdigest()
