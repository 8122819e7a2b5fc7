"""The codec of compressed weights, and the tables of compressed files."""

from __future__ import annotations

import json
import os
import random
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from modelstore.errors import BadManifest, FormatTooNew
from modelstore.load import blocks
from modelstore.volume import block_table, manifest, planes
from modelstore.volume.block_table import ALIGNMENT, block_lengths, check_entry, stored_length, stored_ranges
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.manifest import FileRecord, Manifest, PlainForm, SourceRecord, digest_of, parse_manifest
from tests.support.fuzzing import FUZZ_S, fuzz
from tests.support.records import record


def weights(count: int, seed: int = 0) -> np.ndarray:
    """fp32 weights as trained ones are spread: each row has a scale of its own."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((64, count // 64)) * 0.02 * np.exp(rng.standard_normal((64, 1)) / 2)
    return rows.astype(np.float32).reshape(-1)


def as_bfloat16(wide: np.ndarray) -> np.ndarray:
    bits = wide.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(words: np.ndarray) -> np.ndarray:
    return (words.astype(np.uint32) << 16).view(np.float32)


def stored(block: bytes) -> tuple[list[int], bytes]:
    entry, parts = planes.encode(block)
    check_entry(entry, len(block))
    data = b"".join(map(bytes, parts))
    return entry, data + bytes(stored_length(entry, len(block)) - len(data))


def decoded(entry: list[int], data: bytes, length: int) -> bytes:
    target = bytearray(length)
    planes.decode(entry, memoryview(data), memoryview(target))
    return bytes(target)


WIDE = weights(1 << 20)


def with_zeros(first: int, last: int) -> np.ndarray:
    """bfloat16 in rows of a power of two, as most matrices have them, with zeros in these columns."""
    rows = as_bfloat16(WIDE).reshape(-1, 4096).copy()
    rows[:, first:last] = 0
    return rows


HALF = from_bfloat16(as_bfloat16(WIDE)).astype(np.float16)
BLOCKS: dict[str, tuple[np.ndarray, int | None, int | None, float]] = {
    "bfloat16": (as_bfloat16(WIDE), 2, 0, 0.69),
    "float16 from bfloat16": (HALF, 2, 3, 0.69),
    "float16 from float32": (WIDE.astype(np.float16), None, None, 0.87),
    "float32": (WIDE, 4, 0, 0.86),
    "float32 from bfloat16": (from_bfloat16(as_bfloat16(WIDE)), 4, 0, 0.36),
    "zeros": (np.zeros(1 << 20, np.float16), None, None, 0.01),
    "padded rows": (np.concatenate([as_bfloat16(WIDE)[: 9 << 16], np.zeros(1 << 16, np.uint16)]), None, None, 0.64),
    "zeros in columns that begin late": (with_zeros(1024, 4096), None, None, 0.19),
    "zeros in some columns": (with_zeros(1024, 2048), None, None, 0.53),
    "noise and a run of zeros": (
        np.frombuffer(bytes(1 << 17) + random.Random(0).randbytes(9 << 17), np.uint8),
        None,
        None,
        0.94,
    ),
    "noise": (np.frombuffer(random.Random(0).randbytes(1 << 20), np.uint8), 1, 0, 1.0),
    "text": (np.frombuffer(b'{"a": 1, "b": [1, 2, 3]}\n' * 40_000, np.uint8), None, None, 0.7),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_comes_back_and_takes_what_its_kind_takes(kind: str) -> None:
    array, width, rotation, ratio = BLOCKS[kind]
    block = array.tobytes()
    entry, data = stored(block)
    assert decoded(entry, data, len(block)) == block
    assert len(data) <= ratio * len(block) + ALIGNMENT
    assert width is None or (len(entry) - 1, entry[0]) == (width, rotation)


def test_samples_of_a_whole_block_see_all_columns_of_a_matrix() -> None:
    """In rows of a power of two, all others than those at the end of a row are zero."""
    rows = np.zeros((1024, 4096), np.uint16)
    rows[:, 3072:] = as_bfloat16(WIDE).reshape(1024, 1024)
    assert rows.nbytes == manifest.BLOCK_BYTES
    assert planes._best_split(np.frombuffer(rows.tobytes(), np.uint8)) == (2, 0)


@given(st.binary(max_size=5000), st.integers(0, 300))
@settings(deadline=None, max_examples=200)
def test_any_bytes_of_any_length_come_back(noise: bytes, words: int) -> None:
    block = HALF[:words].tobytes() + noise
    if block:
        entry, data = stored(block)
        assert decoded(entry, data, len(block)) == block


@pytest.mark.parametrize("rotation", range(8))
@pytest.mark.parametrize("width", [1, 2, 4])
def test_parting_and_joining_is_the_identity_for_each_width_and_turn(width: int, rotation: int) -> None:
    data = np.frombuffer(os.urandom(64 * 1001), np.uint8)
    target = np.empty_like(data)
    planes._join(planes._split(data, width, rotation), target, rotation)
    assert (target == data).all()


def test_a_second_implementation_by_the_documented_rule_reads_the_planes() -> None:
    block = HALF[: 64 * 50].tobytes() + b"rest"
    entry, data = stored(block)
    rotation, low_bytes, high_bytes = entry
    assert rotation == 3
    even = len(block) // 64 * 64
    low = np.frombuffer(data[:low_bytes], "<u2")
    high_plane = zstandard.ZstdDecompressor().decompress(data[low_bytes : low_bytes + high_bytes])
    high = np.frombuffer(high_plane, "<u2")
    mask = np.uint16((0xFF00 << 3 | 0xFF00 >> 13) & 0xFFFF)
    x = (high & mask) | (low & ~mask)
    y = ((high & ~mask) | (low & mask)).byteswap()
    assert np.concatenate([x, y]).tobytes() + data[low_bytes + high_bytes :][: len(block) - even] == block


def test_bytes_that_were_changed_are_refused_or_come_out_different_and_take_no_more_memory() -> None:
    """What comes out is compared with the plain checksum: here only that nothing else happens."""
    block = HALF.tobytes()[: 1 << 20]
    entry, data = stored(block)
    chance = random.Random(1)
    outcomes = {"refused": 0, "different": 0, "same": 0}
    for _round in range(1000):
        changed = bytearray(data)
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        try:
            outcomes["same" if decoded(entry, changed, len(block)) == block else "different"] += 1
        except ValueError:
            outcomes["refused"] += 1
    assert outcomes["different"] > 500
    assert outcomes["same"] < 10  # padding, and bits of a frame that mean nothing


@pytest.mark.parametrize(
    "frame",
    [
        zstandard.ZstdCompressor().compress(bytes(1 << 30)),  # a frame that would decode to a gigabyte
        zstandard.ZstdCompressor().compressobj().compress(b"x" * 10) + b"",
        b"no frame",
        b"",
    ],
    ids=["huge", "empty", "none", "nothing"],
)
def test_a_frame_that_is_not_of_its_plane_is_refused(frame: bytes) -> None:
    half = 1 << 19
    entry = [0, half, max(len(frame), 1)]
    data = bytes(half) + frame + bytes(ALIGNMENT)
    with pytest.raises(ValueError, match="plane"):
        decoded(entry, data, 2 * half)


def test_places_are_aligned_and_account_for_all_bytes() -> None:
    table = [(0, 4096), (3, 1000, 500), (0, 7)]
    lengths = block_lengths(2 * 8192 + 7, 8192)
    assert lengths == [8192, 8192, 7]
    assert list(stored_ranges(table, 2 * 8192 + 7, 8192)) == [(0, 4096), (4096, 4096), (8192, 4096)]


BLOCK = 1 << 20


def compressed_manifest(size_bytes: int = 2 * BLOCK + 7) -> Manifest:
    table = ((0, 100), (3, BLOCK // 2, 500), (0, 7))
    stored_bytes = sum(length for _offset, length in stored_ranges(table, size_bytes, BLOCK))
    plain = PlainForm(size_bytes, "b" * 64, "1" * 16 * 3, table)
    file = FileRecord("model.safetensors.compressed", stored_bytes, "c" * 64, "2" * 16, None, plain)
    source = SourceRecord("hub", "https://huggingface.co", "main")
    key = SnapshotKey("org/name", "a" * 40, "float16", compressed=True)
    return Manifest(key=key, created_at=1, source=source, files=(file,), block_bytes=BLOCK)


def test_a_compressed_manifest_comes_back() -> None:
    manifest = compressed_manifest()
    parsed = parse_manifest(manifest.encode(), where="x")
    assert parsed == manifest
    (content,) = parsed.contents
    assert (content.path, content.size_bytes, content.sha256) == ("model.safetensors", 2 * BLOCK + 7, "b" * 64)
    assert content.on_volume.path == "model.safetensors.compressed"
    assert parsed.size_bytes == 3 * ALIGNMENT + BLOCK // 2
    assert json.loads(manifest.encode())["format_version"] == 2


LIES: dict[str, Any] = {
    "a block less": lambda plain: plain | {"table": plain["table"][:-1]},
    "a block more": lambda plain: plain | {"table": [*plain["table"], [0, 7]]},
    "a length of zero": lambda plain: plain | {"table": [[0, 0], *plain["table"][1:]]},
    "a negative length": lambda plain: plain | {"table": [[0, -5], *plain["table"][1:]]},
    "a plane beyond its block": lambda plain: plain | {"table": [[0, BLOCK + 1], *plain["table"][1:]]},
    "three planes": lambda plain: plain | {"table": [[0, 1, 1, 1], *plain["table"][1:]]},
    "no plane": lambda plain: plain | {"table": [[0], *plain["table"][1:]]},
    "an empty entry": lambda plain: plain | {"table": [[], *plain["table"][1:]]},
    "a rotation of one plane": lambda plain: plain | {"table": [[3, 100], *plain["table"][1:]]},
    "a rotation of 8": lambda plain: plain | {"table": [[8, 10, 10], *plain["table"][1:]]},
    "another stored size": lambda plain: plain | {"table": [[0, 5000], *plain["table"][1:]]},
    "a huge plain size": lambda plain: plain | {"size": 1 << 60},
    "a text for a number": lambda plain: plain | {"table": [["0", 100], *plain["table"][1:]]},
    "true for a number": lambda plain: plain | {"table": [[True, 100], *plain["table"][1:]]},
    "no table": lambda plain: {name: plain[name] for name in plain if name != "table"},
    "a table that is none": lambda plain: plain | {"table": 5},
    "checksums of other blocks": lambda plain: plain | {"blocks": "1" * 16},
    "an older format": lambda plain: plain | {"format_version": 0},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_table_that_lies_is_refused(lie: str) -> None:
    saved = json.loads(compressed_manifest().encode())
    del saved["digest"]
    saved["files"][0]["plain"] = LIES[lie](saved["files"][0]["plain"])
    data = json.dumps(saved | {"digest": digest_of(saved)}).encode()
    with pytest.raises(BadManifest, match="damaged"):
        parse_manifest(data, where="x")


def test_a_table_of_a_later_format_says_to_upgrade() -> None:
    saved = json.loads(compressed_manifest().encode())
    del saved["digest"]
    saved["files"][0]["plain"]["format_version"] = 2
    data = json.dumps(saved | {"digest": digest_of(saved)}).encode()
    with pytest.raises(FormatTooNew, match="upgrade"):
        parse_manifest(data, where="x")


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 1},
        {"compressed": False},
        {"compressed": "yes"},
        {"block_bytes": 128 << 20},
        {"block_bytes": 4096},
    ],
)
def test_a_manifest_whose_parts_do_not_agree_is_refused(changes: dict[str, Any]) -> None:
    saved = json.loads(compressed_manifest().encode()) | changes
    del saved["digest"]
    with pytest.raises(BadManifest):
        parse_manifest(json.dumps(saved | {"digest": digest_of(saved)}).encode(), where="x")


def test_a_compressed_file_under_the_name_of_a_plain_one_is_refused() -> None:
    manifest = compressed_manifest()
    plain_too = FileRecord("model.safetensors", 1, "d" * 64, "3" * 16)
    with pytest.raises(BadManifest, match="case"):
        parse_manifest(replace(manifest, files=(*manifest.files, plain_too)).encode(), where="x")


RIGHT = json.loads(compressed_manifest().encode())["files"][0]["plain"]["table"]


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=8))
@settings(deadline=None, max_examples=300)
def test_any_other_table_is_refused(table: Any) -> None:
    saved = json.loads(compressed_manifest().encode())
    del saved["digest"]
    saved["files"][0]["plain"]["table"] = table
    with pytest.raises(BadManifest, match="x is damaged") if table != RIGHT else nullcontext():
        parse_manifest(json.dumps(saved | {"digest": digest_of(saved)}).encode(), where="x")


@pytest.mark.slow
def test_coverage_guided_fuzzing_of_tables_and_blocks_finds_nothing(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "weights").write_bytes(HALF[:4000].tobytes())
    tried = fuzz("fuzz_planes", corpus)
    subject = f"tables and blocks of compressed weights from a coverage-guided fuzzer, {FUZZ_S} s"
    record("Hostile input does nothing", subject, tried=tried, survived=tried)
    assert tried > 1000


def test_files_that_import_nothing_of_the_package_have_its_constants() -> None:
    assert blocks.CHECKSUM_HEX == manifest.CHECKSUM_HEX
    assert blocks.ALIGNMENT == block_table.ALIGNMENT
    assert planes._UNIT == block_table._UNIT
