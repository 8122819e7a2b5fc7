"""Bytes of a file as the model has it, from the file on the volume that holds it, plain or compressed; not verified."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice

from modelstore.errors import DigestMismatch, NotFound
from modelstore.volume.block_table import stored_ranges
from modelstore.volume.manifest import BLOCK_BYTES, FileRecord


def has_decoder() -> bool:
    """Whether this process can read and write compressed files."""
    return find_spec("zstandard") is not None


def check_decoder() -> None:
    """Raise NotFound if this process cannot read and write compressed files."""
    if not has_decoder():
        raise NotFound("zstandard, for compressed weights, is not installed: pip install 'runpod-modelstore[compress]'")


def read_content(fd: int, content: FileRecord, length: int, offset: int, block_bytes: int = BLOCK_BYTES) -> bytes:
    """The bytes from `offset` on; `fd`: of the file `content.on_volume`. Raises as `read_blocks`."""
    if not content.table:
        return os.pread(fd, length, offset)
    first, end = offset // block_bytes, -(-min(offset + length, content.size_bytes) // block_bytes)
    data = b"".join(read_blocks(fd, content, block_bytes, first, end))
    return data[offset - first * block_bytes :][:length]


def read_blocks(
    fd: int, content: FileRecord, block_bytes: int, first: int = 0, end: int | None = None
) -> Iterator[bytes | bytearray]:
    """The blocks from `first` up to `end`, or to the last one. Raises OSError, DigestMismatch if the bytes of a
    compressed one cannot be decoded, and NotFound if this process cannot decode any."""
    if not content.table:
        stop = content.size_bytes if end is None else end * block_bytes
        for offset in range(first * block_bytes, min(stop, content.size_bytes), block_bytes):
            yield os.pread(fd, min(block_bytes, content.size_bytes - offset), offset)
        return
    check_decoder()
    from modelstore.volume import planes  # numpy and zstandard are for compressed files alone

    placed = zip(content.table, stored_ranges(content.table, content.size_bytes, block_bytes), strict=True)
    for block, (entry, (offset, stored)) in enumerate(islice(placed, first, end), first):
        plain = bytearray(min(block_bytes, content.size_bytes - block * block_bytes))
        try:
            planes.decode(entry, memoryview(os.pread(fd, stored, offset)), memoryview(plain))
        except ValueError as error:
            raise DigestMismatch(f"{content.on_volume.path} cannot be decoded: {error}") from error
        yield plain
