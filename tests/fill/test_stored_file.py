"""A file of weights is on its way to the volume while it is written, and the same however its bytes come."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modelstore.fill import stored_file
from modelstore.fill.stored_file import StoredFile
from modelstore.volume import durable
from modelstore.volume.checksums import content_blocks
from modelstore.volume.manifest import BLOCK_BYTES


@pytest.mark.parametrize("name", ["a.safetensors", "a.safetensors.compressed"])
def test_bytes_go_to_the_volume_while_the_next_ones_are_made(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(stored_file, "_SYNC_EVERY_BYTES", 1 << 20)
    monkeypatch.setattr(stored_file, "_AHEAD", 0)
    monkeypatch.setattr(durable, "begin_sync", lambda _fd, offset, length: begun.append((offset, length)))
    with StoredFile(tmp_path / name) as stored:
        for _block in range(3):
            stored.write(os.urandom(BLOCK_BYTES))
        assert sum(length for _offset, length in begun) == 3 * BLOCK_BYTES
        record = stored.finish(name, None)
    ends = [offset + length for offset, length in begun]
    assert [offset for offset, _length in begun] == [0, *ends[:-1]]
    assert record.size_bytes == ends[-1]


@pytest.mark.parametrize("lengths", [[BLOCK_BYTES, BLOCK_BYTES, 5], [3, BLOCK_BYTES, BLOCK_BYTES, 2]])
def test_a_compressed_file_is_the_same_however_its_bytes_come(lengths: list[int], tmp_path: Path) -> None:
    data = os.urandom(BLOCK_BYTES) + bytes(BLOCK_BYTES) + b"12345"
    records = []
    for number, cuts in enumerate(([len(data)], lengths)):
        path = tmp_path / f"{number}.safetensors.compressed"
        with StoredFile(path) as stored:
            position = 0
            for length in cuts:
                stored.write(data[position : position + length])
                position += length
            records.append(stored.finish("a.safetensors.compressed", None))
        assert b"".join(content_blocks(path, records[-1].content, BLOCK_BYTES)) == data
    assert records[0] == records[1]
