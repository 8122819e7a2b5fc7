"""The manifest's bytes: a record that goes in comes out, and nothing else does."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelstore.errors import BadManifest, FormatTooNew
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.manifest import (
    COMPRESSED_FORMAT_VERSION,
    FileRecord,
    Manifest,
    Origin,
    SourceRecord,
    digest_of,
    parse_manifest,
)

MANIFEST = Manifest(
    key=SnapshotKey("org/name", "a" * 40, "float16"),
    created_at=1_790_000_000,
    source=SourceRecord("hub", "https://huggingface.co", "main"),
    files=(
        FileRecord("config.json", 3, "b" * 64, "c" * 16),
        FileRecord("model.safetensors", 9 << 20, "d" * 64, "e" * 32, Origin(18 << 20, "f" * 64)),
    ),
)


def test_a_manifest_comes_back_as_it_was() -> None:
    assert parse_manifest(MANIFEST.encode(), where="x") == MANIFEST
    assert MANIFEST.size_bytes == 3 + (9 << 20)


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(position: int, bit: int) -> None:
    data = bytearray(MANIFEST.encode())
    data[position % len(data)] ^= 1 << bit
    try:
        parsed = parse_manifest(bytes(data), where="x")
    except (BadManifest, FormatTooNew):
        return
    assert parsed == MANIFEST  # the flip was in white space


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b'"x"', b"{}", b'{"format_version": 1}', b"\xff", b"[" * 99999]
)
def test_a_text_that_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(BadManifest):
        parse_manifest(data, where="x")


def test_a_newer_format_is_refused_and_says_to_upgrade() -> None:
    record = json.loads(MANIFEST.encode()) | {"format_version": COMPRESSED_FORMAT_VERSION + 1}
    with pytest.raises(FormatTooNew, match="upgrade"):
        parse_manifest(json.dumps(record).encode(), where="x")


def test_a_name_that_leaves_the_folder_is_refused_even_with_a_right_digest() -> None:
    hostile = replace(MANIFEST, files=(FileRecord("../../etc/passwd", 3, "b" * 64, "c" * 16),))
    with pytest.raises(BadManifest, match="refused"):
        parse_manifest(hostile.encode(), where="x")


@pytest.mark.parametrize("block_bytes", [0, 512, 4097, (8 << 20) + 1, -4096, True])
def test_blocks_that_do_not_begin_at_pages_are_refused_even_with_a_right_digest(block_bytes: int) -> None:
    with pytest.raises(BadManifest, match="is damaged"):
        parse_manifest(replace(MANIFEST, block_bytes=block_bytes).encode(), where="x")


@pytest.mark.parametrize("field", ["path", "size", "sha256", "blocks"])
@pytest.mark.parametrize("value", [None, True, -1, 1.5, [], {}, ["a"], "x"])
def test_a_field_of_a_file_that_is_something_else_is_refused_even_with_a_right_digest(field: str, value: Any) -> None:
    record = json.loads(MANIFEST.encode())
    del record["digest"]
    record["files"][0][field] = value
    if field == "path" and value == "x":
        record["files"].append(record["files"][0])
    with pytest.raises(BadManifest, match="is damaged"):
        parse_manifest(json.dumps(record | {"digest": digest_of(record)}).encode(), where="x")
