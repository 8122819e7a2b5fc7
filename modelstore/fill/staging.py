"""The staging of a fill: its folder, the files of earlier generations, and the files that are finished.

A finished file lies under `snapshot/` and has a record under `done/`, written after its bytes were synced. It is
trusted only after the record's own digest and the file's blocks were compared. The intact files of a damaged snapshot
that is to be replaced count, too: they get a second name instead of a second download.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from modelstore.fill.progress import Progress
from modelstore.fill.repo_files import stored_path
from modelstore.fill.source import SourceFile
from modelstore.fill.stored_file import stored_name
from modelstore.volume import durable, tree
from modelstore.volume.checksums import has_blocks
from modelstore.volume.claim import Claim
from modelstore.volume.layout import MANIFEST, Layout, SnapshotKey, StagingLayout
from modelstore.volume.manifest import (
    BLOCK_BYTES,
    FileRecord,
    Manifest,
    digest_of,
    file_as_json,
    parse_file_record,
)
from modelstore.volume.snapshots import Snapshot

_FOLDER = re.compile(r"([1-9][0-9]{0,14})(?:-[0-9a-f]{8})?")  # before 0.2 without a random part


def staging_folders(folder: Path) -> list[tuple[int, Path]]:
    """The folders of a snapshot's staging, each with its generation: the latest first, and of one generation the one
    that holds most."""
    matches = [match for name in tree.names(folder) if (match := _FOLDER.fullmatch(name))]
    folders = [(int(match[1]), folder / match[0]) for match in matches]
    if len(folders) < 2:
        return folders
    return sorted(folders, key=lambda each: (each[0], tree.tree_blocks(each[1])), reverse=True)


class Staging:
    """The staging of one fill, under its claim. `paths`: of this generation; `records`: of the finished files, by the
    path in the model; `inherited`: staging of earlier generations, which may still be written to.
    """

    def __init__(self, layout: Layout, key: SnapshotKey, claim: Claim, damaged: Snapshot | None = None) -> None:
        """Takes over the files of an earlier generation, if no process can still write there.

        `damaged`: a snapshot, moved aside or still in its place, whose intact files are used again. Raises UnsafeName
        if a link lies on the way.
        """
        folder = layout.staging(key) / claim.staging_name
        tree.check_no_links(layout.root, folder)
        tree.check_no_links_below(layout.staging(key))
        self.paths = StagingLayout(folder)
        self.records: dict[str, FileRecord] = {}
        self.inherited = self._inherit(layout.staging(key), claim)
        self.device = layout.root.stat().st_dev
        self._claim = claim
        self._damaged = damaged
        self._compressed = key.compressed

    def _inherit(self, folder: Path, claim: Claim) -> list[StagingLayout]:
        """Earlier generations' staging: moved to be ours if no process can still write there, else to be copied
        from."""
        folders = [path for number, path in staging_folders(folder) if number < claim.generation]
        if folders and claim.after_the_dead:
            try:
                durable.rename(folders[0], self.paths.folder)
            except FileNotFoundError:  # another process took it, or removed it
                claim.check()
            return []
        return [StagingLayout(each) for each in folders]

    @property
    def present_bytes(self) -> int:
        """The bytes that lie here already, with the inherited staging."""
        return sum(tree.tree_blocks(paths.folder) for paths in (self.paths, *self.inherited))

    def unfinished(
        self, files: Sequence[SourceFile], progress: Progress, stored_unchanged: str = ""
    ) -> list[SourceFile]:
        """The files that no earlier process has finished; the others are counted as done and reused.

        `stored_unchanged`: see `find`.
        """
        unfinished = []
        for file in files:
            if self.recover(file, stored_unchanged=stored_unchanged) is None:
                unfinished.append(file)
            else:
                progress.add(done=file.size_bytes, reused=file.size_bytes)
        return unfinished

    def publish(self, manifest: Manifest, data: bytes, place: Path) -> bool:
        """Move the snapshot to its place by one rename. `data`: the bytes of its manifest. False if a folder with files
        is there. Raises ClaimLost."""
        folder = self.paths.snapshot
        self._keep_only({MANIFEST, *manifest.paths})
        durable.write_atomic(folder / MANIFEST, data)
        for parent, _folders, _names in os.walk(folder, topdown=False):
            durable.sync_path(Path(parent))
        self._claim.check()
        return durable.publish_folder(folder, place)

    def _keep_only(self, names: Iterable[str]) -> None:
        """Remove the files of an earlier attempt that the manifest does not name."""
        kept = set(names)
        for parent, _folders, files in os.walk(self.paths.snapshot):
            for name in files:
                path = Path(parent, name)
                if str(path.relative_to(self.paths.snapshot)) not in kept:
                    durable.remove_file(path)

    def remove(self) -> None:
        """Remove it all, with the inherited staging."""
        for paths in (self.paths, *self.inherited):
            durable.remove_tree(paths.folder)

    def recover(self, file: SourceFile, *, stored_unchanged: str) -> FileRecord | None:
        """The record of `file` if it is finished here, or in staging or a damaged snapshot that it can be taken from.

        `stored_unchanged`: as it will stand in the manifest; weights of a snapshot with another value are of no use.
        """
        record = (
            self._recorded(file) or self._take_from_earlier(file) or self._take_from_damaged(file, stored_unchanged)
        )
        if record is not None:
            self.records[record.content.path] = record
        return record

    def add(self, file: SourceFile, record: FileRecord) -> None:
        """Record a file whose bytes lie in place and are synced; its source file is removed."""
        self._write(file, record)
        self.records[record.content.path] = record
        durable.remove_file(self.paths.source_file(file.path))
        durable.remove_tree(self.paths.journal(file.path))

    def forget(self, file: SourceFile) -> None:
        """Take back a finished file: it has to be stored again."""
        record = self.records.pop(stored_path(file.path))
        durable.remove_file(self.paths.done_file(file.path))
        durable.remove_file(self.paths.snapshot_file(record.path))

    def _recorded(self, file: SourceFile) -> FileRecord | None:
        record = finished_record(self.paths.done_file(file.path))
        if record is None or record.path != self._name(file):
            return None
        before = record.original
        if before.size_bytes != file.size_bytes or file.sha256 not in (None, before.sha256):
            return None
        return record if has_blocks(self.paths.snapshot_file(record.path), record) else None

    def _take_from_earlier(self, file: SourceFile) -> FileRecord | None:
        """From staging of an earlier generation: it was synced, so no process writes to it any more, and it is
        moved."""
        for staging in self.inherited:
            target = self.paths.snapshot_file(self._name(file))
            try:
                data = durable.read_file(staging.done_file(file.path), durable.MANIFEST_BYTES)
                durable.make_folder(target.parent)
                durable.rename(staging.snapshot_file(self._name(file)), target)
            except FileNotFoundError:
                continue
            durable.write_atomic(self.paths.done_file(file.path), data)
            if (record := self._recorded(file)) is not None:
                return record
        return None

    def _take_from_damaged(self, file: SourceFile, stored_unchanged: str) -> FileRecord | None:
        if self._damaged is None:
            return None
        stored = self._name(file)
        record = self._damaged.manifest.file(stored)
        other_policy = self._damaged.manifest.stored_unchanged != stored_unchanged
        if record is None or (other_policy and record.content.path.endswith(".safetensors")):
            return None
        path = self._damaged.path / stored
        if record.original.size_bytes != file.size_bytes or not has_blocks(path, record):
            return None
        target = self.paths.snapshot_file(stored)
        durable.make_folder(target.parent)
        durable.link_or_copy(path, target)
        self._write(file, record)
        return self._recorded(file)

    def _name(self, file: SourceFile) -> str:
        """The name of a file of the source on the volume."""
        return stored_name(stored_path(file.path), compressed=self._compressed)

    def _write(self, file: SourceFile, record: FileRecord) -> None:
        data = {"record": file_as_json(record), "digest": digest_of(file_as_json(record))}
        durable.write_atomic(self.paths.done_file(file.path), json.dumps(data, separators=(",", ":")).encode())


def finished_record(path: Path) -> FileRecord | None:
    """The record of a finished file, from its file under `done/`; None if that is not whole."""
    try:
        data = json.loads(durable.read_file(path, durable.MANIFEST_BYTES))
        record = parse_file_record(data["record"], BLOCK_BYTES)
        return record if data["digest"] == digest_of(data["record"]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
