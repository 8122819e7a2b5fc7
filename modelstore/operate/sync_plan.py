"""Snapshots, records of revisions, pins and aliases from one store to others: what a second datacenter needs.

>>> plan = SyncPlan(parse_store_root("/runpod-volume/modelstore", settings), settings)
>>> plan.run(parse_store_root("s3://abc123@EU-RO-1", settings), [], observer=SILENT)

Files that the target has already are not copied. Files go first, a snapshot's manifest last, and the names that lead to
it after that, so that nothing ever leads to half of a snapshot. A run that was cut short is continued by the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from modelstore.errors import (
    BadManifest,
    DigestMismatch,
    FormatTooNew,
    InvalidReference,
    ModelStoreError,
    RootUnusable,
    SnapshotNotFound,
)
from modelstore.fill.observer import SILENT, Observer
from modelstore.fill.store_roots import BucketRoot, FolderRoot, StoreRoot
from modelstore.fill.upload import RemoteVolume
from modelstore.fill.verbatim import VerbatimCopy
from modelstore.reference import is_alias, is_repo_id, parse_reference
from modelstore.runtime import OwnedFolder, runtime_folder
from modelstore.settings import Settings
from modelstore.store import ModelStore
from modelstore.volume import aliases, capabilities, refs
from modelstore.volume.layout import MANIFEST, Layout, SnapshotKey, key_from_parts, repo_folder
from modelstore.volume.manifest import Manifest, parse_manifest
from modelstore.volume.snapshots import Catalog, Snapshot
from modelstore.volume.verify import verify_snapshot

logger = logging.getLogger(__name__)


class _Ref(NamedTuple):
    """A record of a revision: its path, the name of its repo, and where it leads."""

    path: str
    name: str
    revision: str
    to: refs.Recorded


class SyncPlan:
    """What one store has, and what of it others lack."""

    def __init__(self, source: StoreRoot, settings: Settings) -> None:
        self._source = source
        self._settings = settings
        self._known_refs: list[_Ref] | None = None

    def keys(self, references: Sequence[str]) -> list[SnapshotKey]:
        """The snapshots that references name: all of a repo, one commit of it, or the target of an alias; all that the
        store has without any. Raises SnapshotNotFound, InvalidReference, FormatTooNew, and RootUnusable if there is no
        store."""
        repos = self._source.names("models")
        if not _check_format(self._source) and not repos:
            raise RootUnusable(f"there is no store at {self._source.label}: mount the volume, or name another place")
        if not references:
            return [key for repo in repos for key in self._keys_of(repo)]
        chosen: dict[SnapshotKey, None] = {}
        for text in references:
            matching = [key for key in self._named(text) if self._manifest(key) is not None]
            if not matching:
                raise SnapshotNotFound(f"{text} is not at {self._source.label}")
            chosen |= dict.fromkeys(matching)
        return list(chosen)

    def preview(self, target: StoreRoot, references: Sequence[str]) -> list[dict[str, Any]]:
        """The records of `run`, without doing it."""
        _check_format(target)
        return [self._record(target, key, self._state(target, key)) for key in self.keys(references)]

    def run(
        self, target: StoreRoot, references: Sequence[str], *, observer: Observer = SILENT
    ) -> Iterator[dict[str, Any] | ModelStoreError]:
        """Copy what the target lacks; a record for each snapshot, or the error of one, of a pin or of an alias: the
        others are copied all the same.

        Raises ReadOnlyVolume if the target is not to be changed, and the errors of `keys`.
        """
        if isinstance(target, FolderRoot):
            store = self._store(target)
            capabilities.check_may_change(store.layout, store.settings)
        _check_format(target)
        copied = []
        for key in self.keys(references):
            try:
                manifest = self._manifest(key)
                if manifest is None:
                    raise BadManifest(f"{key} at {self._source.label} has no manifest: seed it there again")
                sent = self._copied(target, key, manifest, observer)
                self._add_refs(target, key)
                self._add_pin(target, key)
            except (ModelStoreError, OSError) as error:
                yield _ours(error, target)
                continue
            copied.append(key)
            yield self._record(target, key, ("copied" if sent else "present", sent))
        for name in self._source.names("aliases"):
            try:
                self._add_alias(target, name, copied)
            except (ModelStoreError, OSError) as error:
                yield _ours(error, target)

    def _named(self, text: str) -> Iterator[SnapshotKey]:
        reference = parse_reference(text)
        if reference.kind == "alias":
            entries = self._history(self._source, f"aliases/{reference.name}.json")
            for key in {entry.key for entry in ((entries[-1], aliases.stable(entries)) if entries else ())}:
                yield from [each for each in self._keys_of(key.parts[0]) if each.plain == key] or [key]
            return
        _repo, at, revision = text.partition("@")
        matching = [
            each for each in self._refs() if each.name == reference.name and (not at or each.revision == revision)
        ]
        commits = {each.to.commit for each in matching} if at and matching else set()
        for repo_id in dict.fromkeys((reference.name, *(each.to.repo_id for each in matching))):
            for key in self._keys_of(repo_folder(repo_id)):
                if key.commit in commits or (not commits and key.commit.startswith(revision)):
                    yield key

    def _keys_of(self, repo: str) -> Iterator[SnapshotKey]:
        for variant in self._source.names(f"models/{repo}"):
            if (key := key_from_parts(repo, variant)) is not None:
                yield key

    def _manifest(self, key: SnapshotKey) -> bytes | None:
        return self._source.read(_path(key, MANIFEST))

    def _state(self, target: StoreRoot, key: SnapshotKey) -> tuple[str, int]:
        """Whether the target has a snapshot, and the bytes that it lacks."""
        data = self._manifest(key)
        try:
            manifest = parse_manifest(data or b"", where=self._source.label)
        except (BadManifest, FormatTooNew):
            return "damaged", 0
        if manifest.key != key:
            return "damaged", 0
        is_there = self._has(target, manifest)
        return ("present", 0) if is_there else ("missing", manifest.size_bytes)

    def _has(self, target: StoreRoot, manifest: Manifest) -> bool:
        if isinstance(target, BucketRoot):
            return self._remote(target).has(self._as_snapshot(manifest))
        assert isinstance(target, FolderRoot)
        return Catalog(Layout(target.root)).published(manifest.key) is not None

    def _copied(self, target: StoreRoot, key: SnapshotKey, data: bytes, observer: Observer) -> int:
        """Copy a snapshot; returns the bytes that were sent."""
        manifest = parse_manifest(data, where=self._source.label)
        if manifest.key != key:
            raise BadManifest(f"{key} at {self._source.label} has the manifest of {manifest.key}: seed it there again")
        if self._has(target, manifest):
            return 0
        if isinstance(target, FolderRoot):
            store = self._store(target)
            return VerbatimCopy(self._source, data, store.layout, store.settings, observer=observer).run()
        assert isinstance(target, BucketRoot)
        if isinstance(self._source, FolderRoot):
            snapshot = self._as_snapshot(manifest)
            if not verify_snapshot(snapshot).intact:
                raise DigestMismatch(f"{key} is damaged at {self._source.label}: run `modelstore seed` there first")
            return self._remote(target).upload(snapshot, observer=observer)
        folder = OwnedFolder(runtime_folder() / "sync")
        try:
            spool = Layout(folder.path / "modelstore")
            settings = replace(self._settings, root=spool.root, quota_bytes=None, volume_mode="full")
            VerbatimCopy(self._source, data, spool, settings, observer=observer).run()
            return self._remote(target).upload(Snapshot(spool.snapshot(key), manifest), observer=observer)
        finally:
            folder.close()

    def _add_refs(self, target: StoreRoot, key: SnapshotKey) -> None:
        """Let the target's records of revisions lead to a snapshot, as the source's do."""
        for each in self._refs():
            if (each.to.repo_id, each.to.commit) != (key.repo_id, key.commit) or each.to.dtype not in ("", key.dtype):
                continue
            present = target.read(each.path)
            if present is None or refs.parse_record(present, each.name) != each.to:
                target.write(each.path, refs.encode_record(each.revision, each.to, each.name))
        target.write_if_new("FORMAT", refs.FORMAT_BYTES)

    def _refs(self) -> Sequence[_Ref]:
        """The source's records of revisions; damaged ones are left out."""
        if self._known_refs is None:
            self._known_refs = list(self._read_refs())
        return self._known_refs

    def _read_refs(self) -> Iterator[_Ref]:
        layout = Layout(self._settings.root)
        for folder in self._source.names("refs"):
            name = folder.replace("--", "/", 1)
            for file in self._source.names(f"refs/{folder}") if is_repo_id(name) else ():
                path = f"refs/{folder}/{file}"
                data = self._source.read(path) or b""
                to, revision = refs.parse_record(data, name), refs.parse_revision(data)
                is_in_place = revision and str(layout.ref(name, revision).relative_to(layout.root)) == path
                if to is not None and is_in_place:
                    yield _Ref(path, name, revision, to)

    def _add_pin(self, target: StoreRoot, key: SnapshotKey) -> None:
        repo, variant = key.plain.parts
        path = f"pins/{repo}/{variant}.json"
        data = self._source.read(path)
        if data is not None:
            target.write_if_new(path, data)

    def _add_alias(self, target: StoreRoot, name: str, copied: Sequence[SnapshotKey]) -> None:
        """Point an alias of the target to what the source's points to, if that was copied or is there."""
        path = f"aliases/{name}"
        if not name.endswith(".json") or not is_alias(name.removesuffix(".json")):
            return
        entries = self._history(self._source, path)
        keys = {entries[-1].key, aliases.stable(entries).key} if entries else set()
        if not keys or not keys <= {key.plain for key in copied}:
            return
        if not all(self._is_there(target, key) or self._is_there(target, key.twin) for key in keys):
            return
        before = self._history(target, path)
        pointed = [aliases.stable(entries), *entries[-1:]] if entries[-1].percent < 100 else [entries[-1]]
        if before and [(each.key, each.percent) for each in before[-len(pointed) :]] == [
            (each.key, each.percent) for each in pointed
        ]:
            return
        target.write(path, aliases.encode_history([*before, *pointed]))

    @staticmethod
    def _history(root: StoreRoot, path: str) -> tuple[aliases.Pointed, ...]:
        """The entries of an alias at a store's root; none if its record is damaged, with a warning."""
        data = root.read(path)
        try:
            return () if data is None else aliases.parse_history(data, f"{path} at {root.label} is damaged")
        except InvalidReference as error:
            logger.warning("%s: it is left out", error)
            return ()

    def _is_there(self, target: StoreRoot, key: SnapshotKey) -> bool:
        return target.read(_path(key, MANIFEST)) is not None

    def _as_snapshot(self, manifest: Manifest) -> Snapshot:
        root = self._source.root if isinstance(self._source, FolderRoot) else self._settings.root
        return Snapshot(Layout(root).snapshot(manifest.key), manifest)

    def _store(self, target: FolderRoot) -> ModelStore:
        settings = replace(self._settings, root=target.root, evict=False)  # which would take what was just copied
        return ModelStore(target.root, settings=settings)

    def _remote(self, target: BucketRoot) -> RemoteVolume:
        return RemoteVolume(target.target, endpoint=self._settings.s3_endpoint)

    def _record(self, target: StoreRoot, key: SnapshotKey, state: tuple[str, int]) -> dict[str, Any]:
        status, sent = state
        return {"to": target.label, **key.as_json(), "status": status, "copied_bytes": sent}


def _path(key: SnapshotKey, name: str) -> str:
    return "/".join(("models", *key.parts, name))


def _check_format(root: StoreRoot) -> bool:
    """Whether a root says its store's format. Raises FormatTooNew."""
    data = root.read("FORMAT")
    if data is not None:
        refs.check_format_bytes(data, store=root.label)
    return data is not None


def _ours(error: ModelStoreError | OSError, target: StoreRoot) -> ModelStoreError:
    """An error of the package; one of the system, with its place."""
    if isinstance(error, ModelStoreError):
        return error
    return RootUnusable(f"{target.label}: {error.strerror or error} ({error.filename or 'no file'}): check the volume")
