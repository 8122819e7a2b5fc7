"""Verification: whole, sampled, in parts; any single damage is found."""

from __future__ import annotations

import errno
import json
import os
import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelstore.errors import UsageError
from modelstore.volume.layout import Layout, SnapshotKey
from modelstore.volume.manifest import FileRecord, Manifest, SourceRecord
from modelstore.volume.verify import (
    Position,
    parse_sample,
    save_position,
    saved_position,
    verify_folder,
)
from tests.support.checksums import blocks_of
from tests.support.records import record

BLOCK = 4096
KEY = SnapshotKey("org/name", "0" * 40, "float16")


def published(folder: Path, files: dict[str, bytes]) -> Path:
    """A snapshot with small blocks."""
    folder.mkdir(parents=True)
    records = []
    for name, data in files.items():
        (folder / name).write_bytes(data)
        records.append(FileRecord(name, len(data), "0" * 64, blocks_of(data, BLOCK)))
    manifest = Manifest(KEY, 0, SourceRecord("hub", "x", "main"), tuple(records), block_bytes=BLOCK)
    (folder / "manifest.json").write_bytes(manifest.encode())
    return folder


FILES = {"a.safetensors": bytes(range(256)) * 100, "b.safetensors": b"b" * 10_000, "config.json": b"{}"}
BLOCKS = 7 + 3 + 1


@settings(max_examples=60, deadline=None, print_blob=True)
@given(st.sampled_from(sorted(FILES)), st.floats(0, 0.9999), st.integers(0, 7))
def test_any_single_flipped_bit_is_found(
    tmp_path_factory: pytest.TempPathFactory, name: str, share: float, bit: int
) -> None:
    folder = published(tmp_path_factory.mktemp("verify") / "s", FILES)
    data = bytearray(FILES[name])
    data[int(len(data) * share)] ^= 1 << bit
    (folder / name).write_bytes(data)
    found = verify_folder(folder, KEY)
    assert [finding.path for finding in found.findings] == [name]
    assert "not the bytes that were published" in found.findings[0].problem


def test_a_thousand_flipped_bits_are_found(tmp_path: Path) -> None:
    """Each on its own, anywhere in any file."""
    folder = published(tmp_path / "s", FILES)
    rng, found = random.Random(0), 0
    for _run in range(1000):
        name = rng.choice(sorted(FILES))
        data = bytearray(FILES[name])
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(data)
        found += [finding.path for finding in verify_folder(folder, KEY).findings] == [name]
        (folder / name).write_bytes(FILES[name])
    record(
        "No worker serves wrong weights",
        "one flipped bit, anywhere in a snapshot: `verify` names the file",
        tried=1000,
        survived=found,
    )
    assert found == 1000


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "b.safetensors").unlink(), "missing"),
        (lambda folder: (folder / "b.safetensors").write_bytes(b"b" * 9_999), "9999 bytes, and 10000 were"),
        (lambda folder: (folder / "b.safetensors").write_bytes(b"b" * 10_001), "10001 bytes, and 10000 were"),
        (lambda folder: (folder / "stray.py").write_text("import os"), "not named"),
        (lambda folder: (folder / "sub").symlink_to("/etc"), "not named"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "damaged"),
    ],
)
def test_every_other_damage_is_found_in_a_sample_too(tmp_path: Path, damage: object, problem: str) -> None:
    folder = published(tmp_path / "s", FILES)
    assert verify_folder(folder, KEY, Position(stride=20)).ok
    damage(folder)  # type: ignore[operator]
    (finding,) = verify_folder(folder, KEY, Position(stride=20)).findings
    assert problem in finding.problem


def test_as_many_samples_as_the_stride_find_any_flipped_bit(tmp_path: Path) -> None:
    folder = published(tmp_path / "s", FILES)
    data = bytearray(FILES["a.safetensors"])
    data[3 * BLOCK] ^= 4
    (folder / "a.safetensors").write_bytes(data)
    position, finds, compared = Position(stride=4), 0, 0
    for _run in range(4):
        found = verify_folder(folder, KEY, position)
        assert found.complete
        finds += not found.ok
        compared += found.compared
        position = found.position
    assert finds == 1
    assert compared == sum(map(len, FILES.values()))
    assert position == Position(stride=4)


def test_a_run_that_is_cut_short_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = published(tmp_path / "s", FILES)
    now = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    position, runs, compared = Position(), 0, 0
    while runs == 0 or position.done:
        found = verify_folder(folder, KEY, position, until=time.monotonic() + 4)
        position = found.position
        compared += found.compared
        runs += 1
        assert found.complete == (position.done == 0)
    assert runs > 2
    assert compared == sum(map(len, FILES.values()))


def test_a_position_comes_back_for_its_own_stride_alone(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert saved_position(layout, KEY, 20) == Position(20)
    assert save_position(layout, KEY, Position(20, 7, 3))
    assert saved_position(layout, KEY, 20) == Position(20, 7, 3)
    assert saved_position(layout, KEY, 1) == Position(1)
    for text in ("", "[]", '{"stride": 20, "first": 20, "done": 0}', '{"stride": 20, "first": 1, "done": -4}'):
        layout.verified(KEY).write_text(text)
        assert saved_position(layout, KEY, 20) == Position(20)


def test_a_position_beyond_the_end_skips_nothing(tmp_path: Path) -> None:
    folder = published(tmp_path / "s", FILES)
    for position in (Position(1, 0, 10**6), Position(2, 1, 10**6)):
        found = verify_folder(folder, KEY, position)
        assert found.compared == found.planned > 0


@pytest.mark.parametrize(("text", "stride"), [("1/20", 20), ("5%", 20), ("0.05", 20), ("1", 1), ("100%", 1)])
def test_a_sample_is_written_as_people_do(text: str, stride: int) -> None:
    assert parse_sample(text) == stride


@pytest.mark.parametrize("text", ["", "0", "1/0", "2/3", "x", "1e-320", "1e-320%", "-5%", "120%", "nan", "1e-9"])
def test_a_text_that_is_no_sample_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="1/20"):
        parse_sample(text)


def test_the_manifest_of_another_snapshot_is_a_finding(tmp_path: Path) -> None:
    folder = published(tmp_path / "s", FILES)
    other = SnapshotKey("org/other", "0" * 40, "float16")
    (finding,) = verify_folder(folder, other).findings
    assert "org/name" in finding.problem
    assert json.loads((folder / "manifest.json").read_text())["repo_id"] == "org/name"


def test_a_block_that_the_volume_does_not_give_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = published(tmp_path / "s", FILES)
    real = os.pread

    def lost_chunk(fd: int, size: int, offset: int) -> bytes:
        if size == BLOCK and offset == BLOCK:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, size, offset)

    monkeypatch.setattr(os, "pread", lost_chunk)
    found = verify_folder(folder, KEY)
    assert [finding.path for finding in found.findings] == ["a.safetensors", "b.safetensors"]
    assert "cannot be read" in found.findings[0].problem
