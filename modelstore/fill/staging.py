"""The files of a snapshot that are finished in staging: what earlier processes left, and what this one adds.

A finished file lies under `snapshot/` and has a record under `done/`, written after its bytes were synced. It is
trusted only after the record's own digest and the file's blocks were compared. The intact files of a damaged snapshot
that is to be replaced count, too: they get a second name instead of a second download.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from modelstore.errors import ModelStoreError
from modelstore.fill.selection import stored_path
from modelstore.fill.source import SourceFile
from modelstore.volume import durable
from modelstore.volume.checksums import has_blocks
from modelstore.volume.layout import StagingLayout
from modelstore.volume.manifest import BLOCK_BYTES, FileRecord, digest_of, file_as_json, parse_file_record
from modelstore.volume.snapshots import Snapshot


class FinishedFiles:
    """The finished files of one staging folder; `records` by the path in the snapshot."""

    def __init__(
        self, staging: StagingLayout, inherited: Sequence[StagingLayout] = (), damaged: Snapshot | None = None
    ) -> None:
        self.records: dict[str, FileRecord] = {}
        self._staging = staging
        self._inherited = inherited
        self._damaged = damaged

    def find(self, file: SourceFile, *, stored_unchanged: str) -> FileRecord | None:
        """The record of `file` if it is finished, here or where it can be taken over from.

        `stored_unchanged`: as it will stand in the manifest; weights of a snapshot where it differs are no use.
        """
        record = self._here(file) or self._taken_over(file) or self._still_intact(file, stored_unchanged)
        if record is not None:
            self.records[record.path] = record
        return record

    def add(self, file: SourceFile, record: FileRecord) -> None:
        """Note a file whose bytes lie in place and are synced; what it was made from is removed."""
        self._write(file, record)
        self.records[record.path] = record
        durable.remove_file(self._staging.source_file(file.path))
        durable.remove_tree(self._staging.journal(file.path))

    def _here(self, file: SourceFile) -> FileRecord | None:
        record = finished_record(self._staging.done_file(file.path))
        if record is None or record.path != stored_path(file.path):
            return None
        before = record.original
        if before.size_bytes != file.size_bytes or file.sha256 not in (None, before.sha256):
            return None
        return record if has_blocks(self._staging.snapshot_file(record.path), record) else None

    def _taken_over(self, file: SourceFile) -> FileRecord | None:
        """From staging of an earlier generation: it was synced, so nobody writes to it any more, and it is moved."""
        for staging in self._inherited:
            target = self._staging.snapshot_file(stored_path(file.path))
            try:
                data = durable.read_file(staging.done_file(file.path), durable.MANIFEST_BYTES)
                durable.make_folder(target.parent)
                durable.rename(staging.snapshot_file(stored_path(file.path)), target)
            except FileNotFoundError:
                continue
            durable.write_atomic(self._staging.done_file(file.path), data)
            if (record := self._here(file)) is not None:
                return record
        return None

    def _still_intact(self, file: SourceFile, stored_unchanged: str) -> FileRecord | None:
        if self._damaged is None:
            return None
        stored = stored_path(file.path)
        record = self._damaged.manifest.file(stored)
        other_policy = self._damaged.manifest.stored_unchanged != stored_unchanged
        if record is None or (other_policy and stored.endswith(".safetensors")):
            return None
        path = self._damaged.path / stored
        if record.original.size_bytes != file.size_bytes or not has_blocks(path, record):
            return None
        if not _linked(path, self._staging.snapshot_file(stored)):
            return None
        self._write(file, record)
        return self._here(file)

    def _write(self, file: SourceFile, record: FileRecord) -> None:
        data = {"record": file_as_json(record), "digest": digest_of(file_as_json(record))}
        durable.write_atomic(self._staging.done_file(file.path), json.dumps(data, separators=(",", ":")).encode())


def finished_record(path: Path) -> FileRecord | None:
    """The record of a finished file, from its file under `done/`; None where that is not whole."""
    try:
        data = json.loads(durable.read_file(path, durable.MANIFEST_BYTES))
        record = parse_file_record(data["record"], BLOCK_BYTES)
        return record if data["digest"] == digest_of(data["record"]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _linked(path: Path, target: Path) -> bool:
    """A second name for a file; False on a file system that has none."""
    try:
        durable.make_folder(target.parent)
        durable.link(path, target)
    except (ModelStoreError, OSError):
        return False
    return True
