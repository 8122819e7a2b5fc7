"""One staged file: its bytes, its journal, and its digests.

A file is kept in granules of 256 KiB. Each granule that lies on the volume has a slot of 16 bytes in the journal: its
XXH3-64 checksum and a tag that binds the checksum to the file and the position. Data and slots are written in place, so
two writers that both believe they hold the claim write the same bytes, and a torn or stale slot simply does not match.
Nothing rests on the order in which a crash kept them: on resume every granule is read again and compared with its slot.

The journal is cut into segments of 64 MiB of the file, the size of a MooseFS chunk. Once all granules of one are there,
its bytes and its slots are synced and the segment is sealed, by a rename. A sealed segment can be read from another
host even while the host that wrote it is lost; the chunks that it was writing can be neither read nor written for two
minutes (measured: 124 s on 3.0.117).

A conversion may read the bytes as they arrive, before they are verified: `wait_for` returns once they are there, and
`verified` tells whether they were right. If not, all of them come once more, as another attempt.

SHA-256 runs over the file in order while granules arrive out of order: those ahead of the front wait in memory up to a
limit, and are read back from the volume beyond it; if the whole file is kept in memory, all of them do. The same
pass gives the block checksums of the manifest.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import xxhash

from modelstore.copying import copy_bytes
from modelstore.errors import DigestMismatch
from modelstore.fill.source import SourceFile
from modelstore.volume import durable, tree
from modelstore.volume.checksums import Digests, RunningDigests, git_oid
from modelstore.volume.layout import StagingLayout

GRANULE_BYTES = 256 << 10
SEGMENT_BYTES = 64 << 20
_SEGMENT_GRANULES = SEGMENT_BYTES // GRANULE_BYTES
_SLOT_BYTES = 16
_NO_SLOT = bytes(_SLOT_BYTES)
_AHEAD_BYTES = 128 << 20
_POLL_S = 0.05

logger = logging.getLogger(__name__)


class _Journal:
    """The slots of one file: a file `<n>.open` for each segment, called `<n>` once it is sealed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fds: dict[int, tuple[Path, int]] = {}
        self._lock = threading.Lock()

    def slots(self, *, sealed_only: bool) -> Iterator[tuple[int, bytes]]:
        """The slots that are there, by granule."""
        for path in tree.entries(self._folder):
            number, _dot, state = path.name.partition(".")
            if not (number.isascii() and number.isdigit()) or (state and (sealed_only or state != "open")):
                continue
            data = _read(path, _SEGMENT_GRANULES * _SLOT_BYTES)
            for position in range(0, len(data) - _SLOT_BYTES + 1, _SLOT_BYTES):
                slot = data[position : position + _SLOT_BYTES]
                if slot != _NO_SLOT:
                    yield int(number) * _SEGMENT_GRANULES + position // _SLOT_BYTES, slot

    def write(self, index: int, slot: bytes) -> None:
        segment, place = divmod(index, _SEGMENT_GRANULES)
        path, fd = self._opened(segment)
        durable.write_at(fd, slot, place * _SLOT_BYTES, path=path)

    def seal(self, segment: int) -> None:
        """Sync the slots of a segment whose bytes were synced before, and say so by its name."""
        path, fd = self._opened(segment)
        durable.sync(fd, path=path)
        if path.suffix:
            durable.rename(path, path.with_suffix(""))
            with self._lock:
                self._fds[segment] = (path.with_suffix(""), fd)

    def close(self) -> None:
        with ExitStack() as stack:
            while self._fds:
                path, fd = self._fds.popitem()[1]
                stack.callback(durable.close, fd, path=path)

    def _opened(self, segment: int) -> tuple[Path, int]:
        with self._lock:
            if segment not in self._fds:
                sealed = self._folder / str(segment)
                path = sealed if sealed.exists() else self._folder / f"{segment}.open"
                self._fds[segment] = (path, durable.open_for_write(path))
            return self._fds[segment]


class StagedFile:
    """One staged file: its bytes, its journal, and the digests of the bytes that have arrived without a gap.

    Several threads may put granules at once; `whole_stream` is for a source that ignores ranges: one thread
    takes the whole file and the others wait.
    """

    def __init__(self, file: SourceFile, staging: StagingLayout, memory: memoryview | None = None) -> None:
        """`memory`: as long as the file, at least; takes its bytes, too."""
        self.file = file
        self._memory = memory
        self.path = staging.source_file(file.path)
        self._journal_folder = staging.journal(file.path)
        self.granules = -(-file.size_bytes // GRANULE_BYTES)
        for folder in (self.path.parent, self._journal_folder):
            durable.make_folder(folder)
        self._fd = durable.open_for_write(self.path)
        durable.set_size(self._fd, file.size_bytes, path=self.path)
        self.attempt = 1
        self.digests: Digests | None = None
        self.whole_stream = threading.Lock()
        self._changed = threading.Condition()
        self._storing: set[int] = set()  # granules, at this moment
        self._copies = 0  # into the memory, at this moment
        self._front_lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._journal = _Journal(self._journal_folder)
        self._have = [False] * self.granules
        self._missing = self.granules
        self._unsealed = [  # granules that each segment lacks; -1 once it is sealed
            min(_SEGMENT_GRANULES, self.granules - first) for first in range(0, self.granules, _SEGMENT_GRANULES)
        ]
        self._front = 0
        self._ahead: dict[int, bytes | bytearray] = {}
        self._running = RunningDigests()

    def resume(self, inherited: Iterable[StagingLayout] = ()) -> int:
        """Keep the granules that match their slots, and copy those of `inherited` staging that do; returns the bytes
        kept.

        Copying is for staging whose writer may still live: its late writes go into its file, not into ours. Only
        sealed segments are looked at, because the rest may not answer.
        """
        kept = 0
        for index, data in self._intact(self._fd, self._journal, sealed_only=False):
            self._arrived(index, data)
            kept += len(data)
        for staging in inherited:
            try:
                fd = durable.open_for_read(staging.source_file(self.file.path))
            except OSError:
                continue
            try:
                # Without read-ahead, and backwards: else MooseFS reads on into chunks that do not answer.
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
                for index, data in self._intact(fd, _Journal(staging.journal(self.file.path)), sealed_only=True):
                    kept += len(data) if self.put(index, data) else 0
            except OSError as error:
                logger.warning("the bytes of an earlier worker cannot be read (%s): they are fetched again", error)
            finally:
                os.close(fd)
        return kept

    def _intact(self, fd: int, journal: _Journal, *, sealed_only: bool) -> Iterator[tuple[int, bytes]]:
        """The granules that we lack and that match their slots."""
        for index, slot in sorted(journal.slots(sealed_only=sealed_only), reverse=sealed_only):
            if index >= self.granules or self._have[index]:
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
        """Store one granule with its slot, and keep `data`; False if it is there already. Of two threads with the same
        granule, one stores it, while the other one waits: their bytes may differ."""
        with self._changed:
            self._changed.wait_for(lambda: self._have[index] or index not in self._storing)
            if self._have[index]:
                return False
            self._storing.add(index)
        try:
            self._put(index, data)
        finally:
            with self._changed:
                self._storing.remove(index)
                if not self._have[index]:  # another thread may store it now
                    self._changed.notify_all()
        return True

    def _put(self, index: int, data: bytes | bytearray) -> None:
        durable.write_at(self._fd, data, index * GRANULE_BYTES, path=self.path)
        self._journal.write(index, self._slot(index, data))
        self._arrived(index, data)
        segment = index // _SEGMENT_GRANULES
        with self._changed:
            due = self._unsealed[segment] == 0 and self._missing  # a file that is whole is moved on at once
            self._unsealed[segment] -= due > 0
        if due:
            durable.sync(self._fd, path=self.path)
            self._journal.seal(segment)

    def has(self, index: int) -> bool:
        return self._have[index]

    def take_memory(self) -> memoryview | None:
        """The memory that takes the bytes, if there is some; this object then holds and fills it no more."""
        with self._changed:
            memory, self._memory = self._memory, None
            self._changed.wait_for(lambda: not self._copies)
            return memory

    def wait_for(self, offset: int, length: int, guard: Callable[[], None]) -> None:
        """Return once these bytes lie in the file, verified or not; `guard` is called meanwhile, and may raise."""
        granules = slice(offset // GRANULE_BYTES, -(-(offset + length) // GRANULE_BYTES))
        self._wait(lambda: all(self._have[granules]), guard)

    def verified(self, attempt: int, guard: Callable[[], None]) -> Digests | None:
        """The digests of the file once all its bytes were checked; None if those of this attempt were wrong."""
        self._wait(lambda: self.digests is not None or self.attempt != attempt, guard)
        return self.digests if self.attempt == attempt else None

    def _wait(self, ready: Callable[[], bool], guard: Callable[[], None]) -> None:
        while True:
            guard()
            with self._changed:
                if self._changed.wait_for(ready, _POLL_S):
                    return

    def finish(self) -> Digests:
        """Close the file, and return its digests, which were checked against the source's own. Raises DigestMismatch;
        the file stays as it is then, and open."""
        self._advance(wait_for_turn=True)
        if self._front != self.granules:
            raise AssertionError(f"{self.file.path} is not complete")
        digests = self._running.finish()
        if self.file.sha256 is not None:
            matches = digests.sha256 == self.file.sha256
        elif self.file.git_oid is not None:
            matches = git_oid(self._fd, self.file.size_bytes) == self.file.git_oid
        else:
            matches = True
        if not matches:
            raise DigestMismatch(
                f"{self.file.path} has the right size and wrong bytes (sha256 {digests.sha256[:12]}…): nothing was "
                "published; try again, and if it stays so tell the repo's owner"
            )
        self.close()
        with self._changed:
            self.digests = digests
            self._changed.notify_all()
        return digests

    def forget(self) -> None:
        """Drop the journal, so that nothing of this file counts as fetched: the next attempt begins."""
        self._journal.close()
        durable.remove_tree(self._journal_folder)
        durable.make_folder(self._journal_folder)
        with self._changed:
            self.attempt += 1
            self._begin()
            self._changed.notify_all()

    def close(self) -> None:
        """Close what is open still."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                durable.close(fd, path=self.path)
            finally:
                self._journal.close()

    def _length(self, index: int) -> int:
        return min(GRANULE_BYTES, self.file.size_bytes - index * GRANULE_BYTES)

    def _read(self, index: int) -> bytes | memoryview:
        memory = self._memory  # it may be taken meanwhile
        if memory is not None:
            return memory[index * GRANULE_BYTES : index * GRANULE_BYTES + self._length(index)]
        return os.pread(self._fd, self._length(index), index * GRANULE_BYTES)

    def _slot(self, index: int, data: bytes | bytearray) -> bytes:
        checksum = xxhash.xxh3_64_digest(data)
        identity = f"{self.file.path}\0{self.file.size_bytes}\0{self.file.sha256 or self.file.git_oid}\0{index}"
        return checksum + xxhash.xxh3_64_digest(checksum + identity.encode())

    def _arrived(self, index: int, data: bytes | bytearray) -> None:
        self._copy_to_memory(index, data)
        with self._changed:
            self._have[index] = True
            self._missing -= 1
            self._unsealed[index // _SEGMENT_GRANULES] -= 1
            if self._memory is None and (index - self._front) * GRANULE_BYTES < _AHEAD_BYTES:
                self._ahead[index] = data
            self._changed.notify_all()
        self._advance()

    def _copy_to_memory(self, index: int, data: bytes | bytearray) -> None:
        with self._changed:
            memory = self._memory
            if memory is None:
                return
            self._copies += 1
        try:
            copy_bytes(memory[index * GRANULE_BYTES :], data)
        finally:
            with self._changed:
                self._copies -= 1
                if self._memory is None:  # somebody waits to take it
                    self._changed.notify_all()

    def _advance(self, *, wait_for_turn: bool = False) -> None:
        """Digest granules from the front on; one thread does it at a time, the others leave theirs to it."""
        while self._front < self.granules and self._have[self._front]:
            if not self._front_lock.acquire(blocking=wait_for_turn):
                return
            try:
                while self._front < self.granules and self._have[self._front]:
                    with self._changed:
                        data = self._ahead.pop(self._front, None)
                    self._running.update(self._read(self._front) if data is None else data)
                    with self._changed:
                        self._front += 1
                        self._ahead.pop(self._front - 1, None)
            finally:
                self._front_lock.release()


def _read(path: Path, length: int) -> bytes:
    try:
        return durable.read_file(path, length)
    except OSError:
        return b""
