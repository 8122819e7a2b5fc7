"""Files with block checksums, and readings of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import xxhash

from modelstore.load.reader import Reading
from modelstore.volume.header import TensorInfo, encode_header
from modelstore.volume.manifest import FileRecord

BLOCK = 4096


MB = 1 << 20


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def write(folder: Path, name: str, size: int, block: int = BLOCK) -> FileRecord:
    return _written(folder, name, os.urandom(size), block)


def weights_file(folder: Path, name: str, size: int, block: int = BLOCK) -> FileRecord:
    """A safetensors file with one tensor of `size` random bytes."""
    header = encode_header((TensorInfo("weight", "U8", (size,), 0, size),), {})
    return _written(folder, name, header + os.urandom(size), block)


def _written(folder: Path, name: str, data: bytes, block: int) -> FileRecord:
    size = len(data)
    (folder / name).write_bytes(data)
    checksums = "".join(xxhash.xxh3_64_hexdigest(data[i : i + block]) for i in range(0, size, block))
    return FileRecord(name, size, "0" * 64, checksums)


def start(folder: Path, files: list[FileRecord], block: int = BLOCK, **how: Any) -> Reading:
    reading = Reading(**how)
    try:
        reading.add(folder, files, block_bytes=block)
    except BaseException:
        reading.close()
        raise
    reading.no_more()
    return reading
