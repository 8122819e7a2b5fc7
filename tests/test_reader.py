"""Bytes of a snapshot into memory, verified on the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import xxhash

from modelstore.errors import DigestMismatch, SnapshotNotFound
from modelstore.manifest import FileRecord
from modelstore.reader import Reading

BLOCK = 4096


def write(folder: Path, name: str, size: int) -> FileRecord:
    data = os.urandom(size)
    (folder / name).write_bytes(data)
    blocks = "".join(xxhash.xxh3_64_hexdigest(data[i : i + BLOCK]) for i in range(0, size, BLOCK))
    return FileRecord(name, size, "0" * 64, blocks)


@pytest.mark.parametrize("threads", [1, 4])
def test_every_byte_of_every_file_arrives(tmp_path: Path, threads: int) -> None:
    files = [write(tmp_path, f"f{i}", size) for i, size in enumerate((0, 1, BLOCK, 10 * BLOCK, 10 * BLOCK + 7))]
    reading = Reading(tmp_path, files, block_bytes=BLOCK, threads=threads)
    for file in reversed(files):
        assert reading.wait(file.path) == (tmp_path / file.path).read_bytes()
    reading.wait_all()
    assert reading.ended is not None
    assert reading.size_bytes == sum(file.size_bytes for file in files)


def test_a_flipped_bit_is_found_and_placed(tmp_path: Path) -> None:
    files = [write(tmp_path, "fine", 3 * BLOCK), write(tmp_path, "bad", 5 * BLOCK)]
    data = bytearray((tmp_path / "bad").read_bytes())
    data[3 * BLOCK + 17] ^= 4
    (tmp_path / "bad").write_bytes(data)
    reading = Reading(tmp_path, files, block_bytes=BLOCK)
    with pytest.raises(DigestMismatch, match=f"byte {3 * BLOCK}"):
        reading.wait("bad")
    with pytest.raises(DigestMismatch):
        reading.wait_all()


def test_without_verification_the_bytes_come_as_they_are(tmp_path: Path) -> None:
    file = write(tmp_path, "bad", 2 * BLOCK)
    (tmp_path / "bad").write_bytes(bytes(2 * BLOCK))
    assert Reading(tmp_path, [file], block_bytes=BLOCK, verify=False).wait("bad") == bytes(2 * BLOCK)


def test_a_file_that_shrank_is_found(tmp_path: Path) -> None:
    file = write(tmp_path, "short", 2 * BLOCK)
    os.truncate(tmp_path / "short", BLOCK + 1)
    with pytest.raises(DigestMismatch, match="ends early"):
        Reading(tmp_path, [file], block_bytes=BLOCK).wait("short")


def test_a_missing_file_and_a_link_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    file = write(tmp_path, "real", BLOCK)
    (tmp_path / "link").symlink_to("real")
    for name in ("missing", "link"):
        with pytest.raises(SnapshotNotFound):
            Reading(tmp_path, [file, FileRecord(name, BLOCK, "0" * 64, file.blocks)], block_bytes=BLOCK)


def test_a_file_deleted_after_the_open_is_read_to_the_end(tmp_path: Path) -> None:
    file = write(tmp_path, "x", 200 * BLOCK)
    data = (tmp_path / "x").read_bytes()
    reading = Reading(tmp_path, [file], block_bytes=BLOCK, threads=1)
    (tmp_path / "x").unlink()
    assert reading.wait("x") == data


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for index in range(20):
        file = write(tmp_path, f"f{index}", BLOCK)
        reading = Reading(tmp_path, [file], block_bytes=BLOCK)
        reading.wait_all()
        reading.join()
    assert len(os.listdir("/proc/self/fd")) <= before
