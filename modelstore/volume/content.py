"""Bytes of a file as the model has it, from the file on the volume that holds it, plain or compressed; not verified."""

from __future__ import annotations

import os
from importlib.util import find_spec

from modelstore.errors import DigestMismatch, NotFound
from modelstore.volume.block_table import places
from modelstore.volume.manifest import BLOCK_BYTES, FileRecord


def check_decoder() -> None:
    """Raise NotFound if this process cannot read and write compressed files."""
    if find_spec("zstandard") is None:
        raise NotFound("zstandard, for compressed weights, is not installed: pip install 'runpod-modelstore[compress]'")


def read_content(fd: int, content: FileRecord, length: int, offset: int, block_bytes: int = BLOCK_BYTES) -> bytes:
    """The bytes from `offset` on; `fd`: of the file `content.on_volume`. Raises as `content_block`."""
    if not content.table:
        return os.pread(fd, length, offset)
    first, end = offset // block_bytes, -(-min(offset + length, content.size_bytes) // block_bytes)
    data = b"".join(content_block(fd, content, block, block_bytes) for block in range(first, end))
    return data[offset - first * block_bytes :][:length]


def content_block(fd: int, content: FileRecord, block: int, block_bytes: int = BLOCK_BYTES) -> bytearray:
    """One block of a compressed file, decoded. Raises OSError, and DigestMismatch if its bytes cannot be decoded."""
    from modelstore.volume import planes  # numpy and zstandard are for compressed files alone

    offset, stored = list(places(content.table, content.size_bytes, block_bytes))[block]
    plain = bytearray(min(block_bytes, content.size_bytes - block * block_bytes))
    try:
        planes.decode(content.table[block], memoryview(os.pread(fd, stored, offset)), memoryview(plain))
    except ValueError as error:
        raise DigestMismatch(f"{content.on_volume.path} cannot be decoded: {error}") from error
    return plain
