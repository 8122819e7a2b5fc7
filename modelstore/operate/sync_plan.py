"""Snapshots, records of revisions, pins and aliases from one store to others: what a second datacenter needs.

>>> plan = SyncPlan(place_of("/runpod-volume/modelstore", settings), settings)
>>> plan.run(place_of("s3://abc123@EU-RO-1", settings), [], observer=SILENT)

What is there already costs no bytes. Files go first, a snapshot's manifest last, and the names that lead to it after
that, so that nothing ever leads to half of a snapshot. What was cut short goes on.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from modelstore.errors import BadManifest, DigestMismatch, InvalidReference, ModelStoreError, SnapshotNotFound
from modelstore.fill.observer import SILENT, Observer
from modelstore.fill.places import BucketPlace, FolderPlace, Place
from modelstore.fill.upload import RemoteVolume
from modelstore.fill.verbatim import VerbatimCopy
from modelstore.reference import is_alias, parse_reference
from modelstore.runtime import runtime_folder
from modelstore.settings import Settings
from modelstore.store import ModelStore
from modelstore.volume import aliases, capabilities, refs
from modelstore.volume.layout import MANIFEST, Layout, SnapshotKey, key_from_parts, repo_folder
from modelstore.volume.manifest import Manifest, parse_manifest
from modelstore.volume.snapshots import Catalog, Snapshot
from modelstore.volume.verify import verify_snapshot

logger = logging.getLogger(__name__)


class SyncPlan:
    """What one store has, and what of it others lack."""

    def __init__(self, source: Place, settings: Settings) -> None:
        self._source = source
        self._settings = settings

    def keys(self, references: Sequence[str]) -> list[SnapshotKey]:
        """The snapshots that references name: all of a repo, one commit of it, or the target of an alias; all that the
        store has without any. Raises SnapshotNotFound, InvalidReference, FormatTooNew."""
        data = self._source.read("FORMAT")
        if data is not None:
            refs.check_format_bytes(data, store=self._source.label)
        if not references:
            return [key for repo in self._source.names("models") for key in self._keys_of(repo)]
        chosen: dict[SnapshotKey, None] = {}
        for text in references:
            named = [key for key in self._named(text) if self._manifest(key) is not None]
            if not named:
                raise SnapshotNotFound(f"{text} is not at {self._source.label}")
            chosen |= dict.fromkeys(named)
        return list(chosen)

    def preview(self, target: Place, references: Sequence[str]) -> list[dict[str, Any]]:
        """The records of `run`, without doing it."""
        return [self._record(target, key, self._state(target, key)) for key in self.keys(references)]

    def run(
        self, target: Place, references: Sequence[str], *, observer: Observer = SILENT
    ) -> Iterator[dict[str, Any] | ModelStoreError]:
        """Copy what the target lacks; a record for each snapshot, or its error: the others are copied all the same.

        Raises ReadOnlyVolume if the target is not to be changed, and the errors of `keys`.
        """
        if isinstance(target, FolderPlace):
            store = self._store(target)
            capabilities.check_may_change(store.layout, store.settings)
        copied = []
        for key in self.keys(references):
            try:
                manifest = self._manifest(key)
                if manifest is None:
                    raise BadManifest(f"{key} at {self._source.label} has no manifest: seed it there again")
                sent = self._copied(target, key, manifest, observer)
                self._add_refs(target, key)
            except ModelStoreError as error:
                yield error
                continue
            copied.append(key)
            yield self._record(target, key, ("copied" if sent else "present", sent))
        for key in copied:
            self._add_pin(target, key)
        for name in self._source.names("aliases"):
            self._add_alias(target, name, copied)

    def _named(self, text: str) -> Iterator[SnapshotKey]:
        reference = parse_reference(text)
        if reference.kind == "alias":
            entries = self._history(self._source, f"aliases/{reference.name}.json")
            yield from {entry.key for entry in ((entries[-1], aliases.stable(entries)) if entries else ())}
            return
        _repo, at, revision = text.partition("@")
        commit = revision
        if at and (data := self._source.read(self._ref_path(reference.name, revision))) is not None:
            commit = str(json.loads(data)["commit"])
        for key in self._keys_of(repo_folder(reference.name)):
            if key.commit.startswith(commit):
                yield key

    def _keys_of(self, repo: str) -> Iterator[SnapshotKey]:
        for variant in self._source.names(f"models/{repo}"):
            if (key := key_from_parts(repo, variant)) is not None:
                yield key

    def _manifest(self, key: SnapshotKey) -> bytes | None:
        return self._source.read(_path(key, MANIFEST))

    def _state(self, target: Place, key: SnapshotKey) -> tuple[str, int]:
        """Whether the target has a snapshot, and the bytes that it lacks."""
        data = self._manifest(key)
        try:
            manifest = parse_manifest(data or b"", where=self._source.label)
        except BadManifest:
            return "damaged", 0
        is_there = self._has(target, manifest)
        return ("present", 0) if is_there else ("missing", manifest.size_bytes)

    def _has(self, target: Place, manifest: Manifest) -> bool:
        if isinstance(target, BucketPlace):
            return self._remote(target).has(self._as_snapshot(manifest))
        assert isinstance(target, FolderPlace)
        return Catalog(Layout(target.root)).published(manifest.key) is not None

    def _copied(self, target: Place, key: SnapshotKey, data: bytes, observer: Observer) -> int:
        """Copy a snapshot; returns the bytes that were sent."""
        manifest = parse_manifest(data, where=self._source.label)
        if manifest.key != key:
            raise BadManifest(f"{key} at {self._source.label} has the manifest of {manifest.key}: seed it there again")
        if self._has(target, manifest):
            return 0
        if isinstance(target, FolderPlace):
            store = self._store(target)
            return VerbatimCopy(self._source, data, store.layout, store.settings, observer=observer).run()
        assert isinstance(target, BucketPlace)
        if isinstance(self._source, FolderPlace):
            snapshot = self._as_snapshot(manifest)
            if not verify_snapshot(snapshot).intact:
                raise DigestMismatch(f"{key} is damaged at {self._source.label}: run `modelstore seed` there first")
            return self._remote(target).upload(snapshot, observer=observer)
        spool = Layout(runtime_folder() / "sync")  # the same at each run, so that one that was killed goes on
        settings = replace(self._settings, root=spool.root, quota_bytes=None, volume_mode="full")
        VerbatimCopy(self._source, data, spool, settings, observer=observer).run()
        sent = self._remote(target).upload(Snapshot(spool.snapshot(key), manifest), observer=observer)
        shutil.rmtree(spool.root, ignore_errors=True)
        return sent

    def _add_refs(self, target: Place, key: SnapshotKey) -> None:
        """Let the target's records of revisions lead to a snapshot, as the source's do."""
        folder = f"refs/{repo_folder(key.repo_id)}"
        for name in self._source.names(folder):
            path = f"{folder}/{name}"
            data = self._source.read(path)
            if data is None or not name.endswith(".json") or "/" in name:
                continue
            record = _object(data)
            if record.get("commit") == key.commit and not _same_record(record, _object(target.read(path))):
                target.write(path, data)
        target.write_if_new("FORMAT", refs.FORMAT_BYTES)

    def _add_pin(self, target: Place, key: SnapshotKey) -> None:
        repo, variant = key.parts
        path = f"pins/{repo}/{variant}.json"
        data = self._source.read(path)
        if data is not None:
            target.write_if_new(path, data)

    def _add_alias(self, target: Place, name: str, copied: Sequence[SnapshotKey]) -> None:
        """Point an alias of the target to what the source's points to, if that was copied or is there."""
        path = f"aliases/{name}"
        if not name.endswith(".json") or not is_alias(name.removesuffix(".json")):
            return
        entries = self._history(self._source, path)
        if not entries or not {entries[-1].key, aliases.stable(entries).key} <= set(copied):
            return
        before = self._history(target, path)
        pointed = [aliases.stable(entries), *entries[-1:]] if entries[-1].percent < 100 else [entries[-1]]
        if before and [(each.key, each.percent) for each in before[-len(pointed) :]] == [
            (each.key, each.percent) for each in pointed
        ]:
            return
        target.write(path, aliases.encode_history([*before, *pointed]))

    @staticmethod
    def _history(place: Place, path: str) -> tuple[aliases.Pointed, ...]:
        """The entries of an alias at a place; none if its record is damaged, with a warning."""
        data = place.read(path)
        try:
            return () if data is None else aliases.parse_history(data, f"{path} at {place.label} is damaged")
        except InvalidReference as error:
            logger.warning("%s: it is left out", error)
            return ()

    def _ref_path(self, repo_id: str, revision: str) -> str:
        layout = Layout(self._settings.root)
        return str(layout.ref(repo_id, revision).relative_to(layout.root))

    def _as_snapshot(self, manifest: Manifest) -> Snapshot:
        root = self._source.root if isinstance(self._source, FolderPlace) else self._settings.root
        return Snapshot(Layout(root).snapshot(manifest.key), manifest)

    def _store(self, target: FolderPlace) -> ModelStore:
        return ModelStore(target.root, settings=replace(self._settings, root=target.root))

    def _remote(self, target: BucketPlace) -> RemoteVolume:
        return RemoteVolume(target.target, endpoint=self._settings.s3_endpoint)

    def _record(self, target: Place, key: SnapshotKey, state: tuple[str, int]) -> dict[str, Any]:
        status, sent = state
        return {"to": target.label, **key.as_json(), "status": status, "copied_bytes": sent}


def _path(key: SnapshotKey, name: str) -> str:
    return "/".join(("models", *key.parts, name))


def _object(data: bytes | None) -> Mapping[str, Any]:
    """A record; empty if there is none, or if it is damaged."""
    try:
        record = json.loads(data or b"")
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _same_record(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records of a revision lead to the same snapshot; they may have been made at different times."""
    return all(one.get(name) == other.get(name) for name in ("commit", "dtype", "repo_id"))
