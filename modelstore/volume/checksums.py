"""The digests of a file: SHA-256 over all of it, XXH3-64 for each of its blocks; made in one pass.

The manifest keeps the block checksums, and every reader compares them; sources state SHA-256.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from modelstore.errors import DigestMismatch
from modelstore.volume import durable
from modelstore.volume.content import read_blocks
from modelstore.volume.manifest import BLOCK_BYTES, CHECKSUM_HEX, FileRecord


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


def digests_of_file(path: Path, *, guard: Callable[[], None] = lambda: None) -> Digests:
    """The digests of a file as it lies; `guard` is called for each block, and may raise."""
    running = RunningDigests()
    with durable.opened(path) as fd:
        while data := os.read(fd, BLOCK_BYTES):
            guard()
            running.update(data)
    return running.finish()


def git_oid(fd: int, size_bytes: int) -> str:
    """Git's name for the file's bytes: SHA-1 over a small header and them."""
    digest = hashlib.sha1(b"blob %d\0" % size_bytes, usedforsecurity=False)
    offset = 0
    while data := os.pread(fd, 1 << 20, offset):
        digest.update(data)
        offset += len(data)
    return digest.hexdigest()


def git_oid_of(path: Path) -> str:
    """The same, of a file by its path."""
    with durable.opened(path) as fd:
        return git_oid(fd, os.fstat(fd).st_size)


def has_blocks(path: Path, record: FileRecord) -> bool:
    """Whether the file at `path` has the record's size and block checksums, can be read, and, if it is compressed,
    holds what the record says; links are not followed."""
    try:
        fd = durable.open_for_read(path)
    except OSError:
        return False
    try:
        whole = os.fstat(fd).st_size == record.size_bytes
        if not whole or not all(has_block(fd, record, index) for index in range(block_count(record))):
            return False
        return record.plain is None or not wrong_content(path, record, BLOCK_BYTES)
    except OSError:
        return False
    finally:
        os.close(fd)


def wrong_content(path: Path, record: FileRecord, block_bytes: int) -> str:
    """What is wrong with the plain form of a compressed file; empty if nothing is, or if it is not compressed."""
    try:
        for _block in content_blocks(path, record.content, block_bytes) if record.plain is not None else ():
            pass
    except DigestMismatch as error:
        return str(error)
    return ""


def content_blocks(path: Path, content: FileRecord, block_bytes: int) -> Iterator[bytes | bytearray]:
    """The blocks of a file as the model has it, from the file on the volume at `path`, each compared. The bytes come
    from the volume, not from this host's cache. Raises DigestMismatch."""
    fd = durable.open_for_read(path)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for index, block in enumerate(read_blocks(fd, content, block_bytes)):
            if xxhash.xxh3_64_hexdigest(block) != content.blocks[index * CHECKSUM_HEX : (index + 1) * CHECKSUM_HEX]:
                raise DigestMismatch(f"byte {index * block_bytes} of the model's file is another one")
            yield block
    except DigestMismatch as error:
        raise DigestMismatch(f"{path} differs from the published bytes ({error}): seed it again") from error
    finally:
        os.close(fd)


def block_count(record: FileRecord) -> int:
    """How many blocks a file has."""
    return len(record.blocks) // CHECKSUM_HEX


def has_block(fd: int, record: FileRecord, index: int, block_bytes: int = BLOCK_BYTES) -> bool:
    """Whether one block of an open file has the checksum that its record states."""
    length = min(block_bytes, record.size_bytes - index * block_bytes)
    data = os.pread(fd, length, index * block_bytes)
    return xxhash.xxh3_64_hexdigest(data) == record.blocks[index * CHECKSUM_HEX : (index + 1) * CHECKSUM_HEX]
