"""A file of weights as it is stored: plain, or compressed, block by block, with the digests for its record."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from modelstore.copying import copy_bytes
from modelstore.volume import durable
from modelstore.volume.block_table import ALIGNMENT
from modelstore.volume.checksums import Digests, RunningDigests
from modelstore.volume.content import check_decoder
from modelstore.volume.manifest import BLOCK_BYTES, COMPRESSED_SUFFIX, FileRecord, Origin, PlainForm

_PADDING = bytes(ALIGNMENT)
_SYNC_EVERY_BYTES = 64 << 20  # as a download does
_ENCODERS = min(4, os.cpu_count() or 1)
_AHEAD = _ENCODERS + 1  # blocks that are being encoded, or wait to be written: three times 8 MiB each at most


def stored_name(content: str, *, compressed: bool) -> str:
    """The name on the volume of a file of a model."""
    return f"{content}{COMPRESSED_SUFFIX}" if compressed and is_compressible(content) else content


def is_compressible(content: str) -> bool:
    """Whether a file of a model may be compressed. Adapters stay plain: the libraries that load them open their files,
    which are small."""
    return content.endswith(".safetensors") and content.rpartition("/")[2] != "adapter_model.safetensors"


class StoredFile:
    """Writes a file of weights from its first byte to its last. Use with `with`, which closes it."""

    def __init__(self, target: Path, *, is_digested: bool = False) -> None:
        """`target`: its path on the volume, whose name says if it is compressed; a file of an earlier process there is
        removed, as it may be a link.
        `is_digested`: the digests of the bytes that will be written are made elsewhere, and are left out of the record
        of a compressed file: to make them again would take longer than all else."""
        self._target = target
        self._digests = RunningDigests()
        self._position = 0
        self._syncing = 0  # the bytes that go to the volume already
        self._plain = _Plain(is_digested=is_digested) if target.name.endswith(COMPRESSED_SUFFIX) else None
        durable.make_folder(target.parent)
        durable.remove_file(target)
        self._fd = durable.open_for_write(target)

    def __enter__(self) -> StoredFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._plain is not None:
            self._plain.close()
        durable.close(self._fd, path=self._target)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """The next bytes of the file."""
        if self._plain is None:
            self._append(data)
            return
        self._plain.add(data)
        self._append_encoded(self._plain, at_most=_AHEAD)

    def finish(self, path: str, origin: Origin | None) -> FileRecord:
        """All was written: sync it. `path`: in the snapshot, on the volume. Returns the record of the file."""
        plain = None
        if self._plain is not None:
            self._plain.end_block()
            self._append_encoded(self._plain, at_most=0)
            plain = self._plain.form()
        durable.set_size(self._fd, self._position, path=self._target)
        durable.sync(self._fd, path=self._target)
        digests = self._digests.finish()
        return FileRecord(path, self._position, digests.sha256, digests.blocks, origin, plain)

    def _append(self, data: bytes | bytearray | memoryview) -> None:
        durable.write_at(self._fd, data, self._position, path=self._target)
        self._digests.update(data)
        self._position += len(data)
        if self._position - self._syncing >= _SYNC_EVERY_BYTES:
            durable.begin_sync(self._fd, self._syncing, self._position - self._syncing)
            self._syncing = self._position

    def _append_encoded(self, plain: _Plain, *, at_most: int) -> None:
        """Append the blocks that are encoded, and wait until there are `at_most` others."""
        for parts in plain.encoded(at_most):
            for part in parts:
                self._append(part)
            self._append(_PADDING[: -self._position % ALIGNMENT])


class _Plain:
    """The bytes that a compressed file holds: their digests, and their blocks, which threads encode."""

    def __init__(self, *, is_digested: bool) -> None:
        check_decoder()
        self._digests = None if is_digested else RunningDigests()
        self._block = bytearray(BLOCK_BYTES)
        self._in_block = 0
        self._size_bytes = 0
        self._table: list[tuple[int, ...]] = []
        self._threads = ThreadPoolExecutor(_ENCODERS, thread_name_prefix="encode")
        self._jobs: deque[Future[tuple[list[int], list[bytes | bytearray | memoryview]]]] = deque()

    def add(self, data: bytes | bytearray | memoryview) -> None:
        """The next bytes."""
        if self._digests is not None:
            self._digests.update(data)
        self._size_bytes += len(data)
        if isinstance(data, bytes) and len(data) == BLOCK_BYTES and not self._in_block:  # nobody can change it
            self._encode(data)
            return
        view = memoryview(data)
        while view:
            part = view[: BLOCK_BYTES - self._in_block]
            copy_bytes(memoryview(self._block)[self._in_block :], part)
            self._in_block += len(part)
            view = view[len(part) :]
            if self._in_block == BLOCK_BYTES:
                self.end_block()

    def end_block(self) -> None:
        """Have the bytes since the last block encoded."""
        if self._in_block:
            self._encode(memoryview(self._block)[: self._in_block])
            self._block, self._in_block = bytearray(BLOCK_BYTES), 0

    def encoded(self, at_most: int) -> Iterator[list[bytes | bytearray | memoryview]]:
        """The parts of the next blocks, until `at_most` are not taken."""
        while len(self._jobs) > at_most:
            entry, parts = self._jobs.popleft().result()
            self._table.append(tuple(entry))
            yield parts

    def form(self) -> PlainForm:
        """The record of these bytes."""
        digests = Digests("", "") if self._digests is None else self._digests.finish()
        return PlainForm(self._size_bytes, digests.sha256, digests.blocks, tuple(self._table))

    def close(self) -> None:
        """Encode nothing more."""
        self._threads.shutdown(cancel_futures=True)

    def _encode(self, block: bytes | memoryview) -> None:
        from modelstore.volume import planes  # zstandard is for compressed files alone

        self._jobs.append(self._threads.submit(planes.encode, block))
