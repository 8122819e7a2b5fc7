"""The bytes of a snapshot's files into host memory, at the volume's rate, verified in the same pass.

Standard library only but for the checksum, so that a read can be in flight before any heavy import. Never mmap of the
volume: over a network file system each page fault would be a round trip. Blocks are read with `preadv` by several
threads into anonymous memory with huge pages, and each is compared with its checksum from the manifest while it is in
the processor's cache. All files are opened before the first byte is read: a snapshot that is evicted meanwhile stays
readable to the end.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelstore import durable
from modelstore.catalog import Snapshot
from modelstore.errors import DigestMismatch, NoWeights, SnapshotNotFound
from modelstore.manifest import CHECKSUM_HEX, FileRecord

THREADS = 4


@dataclass(frozen=True, slots=True)
class _Block:
    file: int
    offset: int
    length: int
    checksum: str


class Reading:
    """A read in flight: starts at once, in threads of its own. `wait` for one file or for all.

    The memory belongs to whoever holds the views: it is freed with the last of them.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[FileRecord],
        *,
        block_bytes: int,
        verify: bool = True,
        threads: int = THREADS,
    ) -> None:
        """Open all `files` below `folder` and start to read. Raises SnapshotNotFound where one cannot be opened."""
        self.files = tuple(files)
        self.size_bytes = sum(file.size_bytes for file in files)
        self.began = time.monotonic()
        self.ended: float | None = None
        self._folder = folder
        self._verify = verify
        self._fds = _open_all(folder, self.files)
        self._buffers = [_anonymous(file.size_bytes) for file in self.files]
        blocks = [block for index, file in enumerate(self.files) for block in _blocks(index, file, block_bytes)]
        self._left = [0] * len(self.files)
        for block in blocks:
            self._left[block.file] += 1
        self._next = iter(blocks)
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._running = min(threads, len(blocks)) or 1
        self._threads = [
            threading.Thread(target=self._work, name=f"read-{number}", daemon=True) for number in range(self._running)
        ]
        for thread in self._threads:
            thread.start()

    def wait(self, path: str) -> memoryview:
        """The bytes of one file, once all of it has arrived.

        Raises DigestMismatch where a block is not what the manifest says, OSError where the volume fails.
        """
        index = next(i for i, file in enumerate(self.files) if file.path == path)
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or not self._left[index])
            if self._error is not None:
                raise self._error
        return memoryview(self._buffers[index])[: self.files[index].size_bytes]

    def wait_all(self) -> None:
        """Return when everything has arrived; raises as `wait` does."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or not any(self._left))
            if self._error is not None:
                raise self._error

    def damage(self) -> DigestMismatch | None:
        """What is wrong with the bytes, once all of them were read or the first wrong block was; a file that cannot be
        read is as good as wrong."""
        try:
            self.wait_all()
        except DigestMismatch as error:
            return error
        except OSError as error:
            return DigestMismatch(f"{self._folder} cannot be read ({error.strerror}): check the volume")
        return None

    def join(self) -> None:
        """Return when the threads have ended and the files are closed."""
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    block = next(self._next, None) if self._error is None else None
                if block is None:
                    return
                self._read(block)
                with self._changed:
                    self._left[block.file] -= 1
                    if not any(self._left):
                        self.ended = time.monotonic()
                    self._changed.notify_all()
        except Exception as error:  # handed to whoever waits
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()
        finally:
            with self._changed:
                self._running -= 1
                last = not self._running
            if last:
                for fd in self._fds:
                    os.close(fd)

    def _read(self, block: _Block) -> None:
        view = memoryview(self._buffers[block.file])[block.offset : block.offset + block.length]
        done = 0
        while done < block.length:
            count = os.preadv(self._fds[block.file], [view[done:]], block.offset + done)
            if count == 0:
                raise self._mismatch(block, "ends early")
            done += count
        if self._verify:
            from xxhash import xxh3_64_hexdigest

            if xxh3_64_hexdigest(view) != block.checksum:
                raise self._mismatch(block, "is not what was published")

    def _mismatch(self, block: _Block, what: str) -> DigestMismatch:
        name = self.files[block.file].path
        return DigestMismatch(
            f"{self._folder / name} {what} at byte {block.offset}: "
            "remove the snapshot (`modelstore rm`) and seed the model again"
        )


def start_reading(snapshot: Snapshot, *, verify: bool = True) -> Reading:
    """Start to read a snapshot into host memory: the small files, so that they are verified too, then the weights."""
    if not snapshot.weights:
        raise NoWeights(f"{snapshot.key} has no weights at its top: it is a pipeline, load it by its path")
    small = [file for file in snapshot.manifest.files if not file.path.endswith(".safetensors")]
    return Reading(snapshot.path, (*small, *snapshot.weights), block_bytes=snapshot.manifest.block_bytes, verify=verify)


def _blocks(index: int, file: FileRecord, block_bytes: int) -> Iterable[_Block]:
    for number, offset in enumerate(range(0, file.size_bytes, block_bytes)):
        checksum = file.blocks[number * CHECKSUM_HEX : (number + 1) * CHECKSUM_HEX]
        yield _Block(index, offset, min(block_bytes, file.size_bytes - offset), checksum)


def _open_all(folder: Path, files: Sequence[FileRecord]) -> list[int]:
    fds: list[int] = []
    try:
        for file in files:
            fds.append(durable.open_for_read(folder / file.path))
    except OSError as error:
        for fd in fds:
            os.close(fd)
        raise SnapshotNotFound(f"{folder} cannot be opened ({error.strerror}): look it up again, or seed it") from error
    return fds


def _anonymous(size_bytes: int) -> mmap.mmap:
    """Zeroed private memory, on huge pages where the kernel gives them: a third faster to fill (measured)."""
    buffer = mmap.mmap(-1, max(size_bytes, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer
