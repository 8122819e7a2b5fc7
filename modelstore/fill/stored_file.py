"""A file of weights as it is stored: plain, or compressed, block by block, with the digests for its record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from modelstore.volume import durable
from modelstore.volume.block_table import ALIGNMENT
from modelstore.volume.checksums import RunningDigests
from modelstore.volume.content import check_decoder
from modelstore.volume.manifest import BLOCK_BYTES, COMPRESSED_SUFFIX, FileRecord, Origin, PlainForm

_PADDING = bytes(ALIGNMENT)


def stored_name(content: str, *, compressed: bool) -> str:
    """The name on the volume of a file of a model."""
    return f"{content}{COMPRESSED_SUFFIX}" if compressed and content.endswith(".safetensors") else content


class StoredFile:
    """Writes a file of weights from its first byte to its last. Use with `with`, which closes it."""

    def __init__(self, target: Path, *, compressed: bool) -> None:
        """`target`: its path on the volume; a file of an earlier process there is removed, as it may be a link."""
        if compressed:
            check_decoder()
        self._target = target
        self._digests = RunningDigests()
        self._position = 0
        self._plain = _Plain() if compressed else None
        durable.make_folder(target.parent)
        durable.remove_file(target)
        self._fd = durable.open_for_write(target)

    def __enter__(self) -> StoredFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        durable.close(self._fd, path=self._target)

    def write(self, data: bytes | memoryview) -> None:
        """The next bytes of the file."""
        if self._plain is None:
            self._append(data)
            return
        for block in self._plain.full_blocks(data):
            self._append_block(block)

    def finish(self, path: str, origin: Origin | None) -> FileRecord:
        """All was written: sync it. `path`: in the snapshot, on the volume. Returns the record of the file."""
        plain = None
        if self._plain is not None:
            if block := self._plain.last_block():
                self._append_block(block)
            plain = self._plain.form()
        durable.set_size(self._fd, self._position, path=self._target)
        durable.sync(self._fd, path=self._target)
        digests = self._digests.finish()
        return FileRecord(path, self._position, digests.sha256, digests.blocks, origin, plain)

    def _append(self, data: bytes | bytearray | memoryview) -> None:
        durable.write_at(self._fd, data, self._position, path=self._target)
        self._digests.update(data)
        self._position += len(data)

    def _append_block(self, block: memoryview) -> None:
        from modelstore.volume import planes  # zstandard is for compressed files alone

        assert self._plain is not None
        entry, parts = planes.encode(block)
        self._plain.table.append(tuple(entry))
        for part in parts:
            self._append(part)
        self._append(_PADDING[: -self._position % ALIGNMENT])


class _Plain:
    """The bytes that a compressed file holds: the block that is not full yet, and the digests of all."""

    def __init__(self) -> None:
        self.table: list[tuple[int, ...]] = []
        self._digests = RunningDigests()
        self._block = bytearray(BLOCK_BYTES)
        self._in_block = 0
        self._size_bytes = 0

    def full_blocks(self, data: bytes | memoryview) -> Iterator[memoryview]:
        """The blocks that are full with these bytes; each is to be used before the next one is asked for."""
        self._digests.update(data)
        self._size_bytes += len(data)
        view = memoryview(data)
        while view:
            part = view[: BLOCK_BYTES - self._in_block]
            self._block[self._in_block : self._in_block + len(part)] = part
            self._in_block += len(part)
            view = view[len(part) :]
            if self._in_block == BLOCK_BYTES:
                self._in_block = 0
                yield memoryview(self._block)

    def last_block(self) -> memoryview:
        """The rest, which may be empty."""
        return memoryview(self._block)[: self._in_block]

    def form(self) -> PlainForm:
        """The record of these bytes."""
        digests = self._digests.finish()
        return PlainForm(self._size_bytes, digests.sha256, digests.blocks, tuple(self.table))
