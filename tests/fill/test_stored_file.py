"""A file of weights is on its way to the volume while it is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modelstore.fill.stored_file import StoredFile
from modelstore.volume import durable
from modelstore.volume.manifest import BLOCK_BYTES


@pytest.mark.parametrize("name", ["a.safetensors", "a.safetensors.compressed"])
def test_bytes_go_to_the_volume_while_the_next_ones_are_made(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr("modelstore.fill.stored_file._SYNC_EVERY_BYTES", 1 << 20)
    monkeypatch.setattr(durable, "begin_sync", lambda _fd, offset, length: begun.append((offset, length)))
    with StoredFile(tmp_path / name) as stored:
        for _block in range(4):
            stored.write(os.urandom(BLOCK_BYTES))
        record = stored.finish(name, None)
    ends = [offset + length for offset, length in begun]
    assert [offset for offset, _length in begun] == [0, *ends[:-1]]
    assert record.size_bytes - ends[-1] < 1 << 20


@pytest.mark.parametrize(
    "cuts", [[BLOCK_BYTES, BLOCK_BYTES, 5], [3, BLOCK_BYTES, BLOCK_BYTES, 2], [2 * BLOCK_BYTES + 5]]
)
def test_a_compressed_file_is_the_same_however_its_bytes_come(cuts: list[int], tmp_path: Path) -> None:
    data = os.urandom(BLOCK_BYTES) + bytes(BLOCK_BYTES) + b"12345"
    records = []
    for number, lengths in enumerate(([len(data)], cuts)):
        with StoredFile(tmp_path / f"{number}.safetensors.compressed") as stored:
            position = 0
            for length in lengths:
                stored.write(data[position : position + length])
                position += length
            assert position == len(data)
            records.append(stored.finish("a", None))
    assert records[0] == records[1]
