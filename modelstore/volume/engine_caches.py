"""Compiled code that an engine left on the volume for the next worker, beside the snapshot that it was made for.

    <root>/engine-caches/<org>--<name>/<commit>.<dtype>/<key>/archive.tar.zst, manifest.json

The key is a hash of all facts that the code depends on: versions, the GPU, the instruction set, the arguments. A cache
is published by one rename, the first one wins, and is never changed. It is code that runs in the worker: it is used
only with the checksum of its manifest, with the facts that hash to its key, and, if this worker has a secret for that,
with an HMAC under it. Bytes that were compared are the bytes that are unpacked.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelstore.errors import IntegrityError, ModelStoreError
from modelstore.volume import durable, tree
from modelstore.volume.archive import ARCHIVE_BYTES
from modelstore.volume.layout import Layout, SnapshotKey
from modelstore.volume.snapshots import keyed_folders

logger = logging.getLogger(__name__)

_FORMAT = 1
_KEY = re.compile(r"[0-9a-f]{32}")
_TYPES = {"format": int, "worker": str, "facts": dict, "answer": str, "bytes": int, "sha256": str}
_ARCHIVE, _MANIFEST = "archive.tar.zst", "manifest.json"


@dataclass(frozen=True, slots=True)
class EngineCache:
    """One cache. `answer`: what the engine that made it answered to a fixed prompt; `facts`: see the key."""

    facts: Mapping[str, Any]
    answer: str
    archive: bytes


def key_of(facts: Mapping[str, Any]) -> str:
    """The name of the cache for these facts."""
    return hashlib.sha256(_canonical(facts)).hexdigest()[:32]


def read(layout: Layout, snapshot: SnapshotKey, key: str, secret: str | None) -> EngineCache | None:
    """A published cache; None if there is none. Raises IntegrityError if it must not be used."""
    folder = layout.engine_caches_of(snapshot) / key
    tree.check_no_links(layout.root, folder)
    data = durable.read_record(folder / _MANIFEST)
    if data is None and tree.exists(folder):
        raise IntegrityError(f"{folder} has no manifest")
    if data is None:
        return None
    manifest = _parsed(data, folder, secret)
    if key_of(manifest["facts"]) != key:
        raise IntegrityError(f"{folder} was made for something else than its name says")
    archive = durable.read_record(folder / _ARCHIVE, ARCHIVE_BYTES)
    if archive is None or hashlib.sha256(archive).hexdigest() != manifest["sha256"]:
        raise IntegrityError(f"{folder / _ARCHIVE} is missing or differs from what was published")
    return EngineCache(manifest["facts"], manifest["answer"], archive)


def note_use(layout: Layout, snapshot: SnapshotKey, key: str) -> None:
    """Let gc keep a cache for a while longer."""
    with suppress(ModelStoreError, OSError):  # a volume that is mounted read-only
        durable.touch_folder(layout.engine_caches_of(snapshot) / key)


def records(layout: Layout, snapshot: SnapshotKey) -> list[dict[str, Any]]:
    """A record of each cache of a snapshot: its name and size; nothing that it says of itself is believed."""
    folder = layout.engine_caches_of(snapshot)
    names = [name for name in tree.names(folder) if _KEY.fullmatch(name)]
    return [{"key": name, "bytes": tree.tree_bytes(folder / name)} for name in names]


def publish(layout: Layout, snapshot: SnapshotKey, cache: EngineCache, worker: str, secret: str | None) -> bool:
    """Publish a cache; False if another one was first. A publisher that is killed leaves its part in the trash."""
    manifest: dict[str, Any] = {
        "format": _FORMAT,
        "worker": worker,
        "facts": cache.facts,
        "answer": cache.answer,
        "bytes": len(cache.archive),
        "sha256": hashlib.sha256(cache.archive).hexdigest(),
    }
    if secret is not None:
        manifest["hmac"] = _signature(manifest, secret)
    target = layout.engine_caches_of(snapshot) / key_of(cache.facts)
    making = layout.aside(layout.trash, snapshot)
    for path in (target, making):
        tree.check_no_links(layout.root, path)
    try:
        durable.write_atomic(making / _ARCHIVE, cache.archive)
        durable.write_atomic(making / _MANIFEST, json.dumps(manifest, indent=1).encode())
        is_first = durable.publish_folder(making, target)
    finally:
        durable.remove_tree(making)
    return is_first


def quarantine(layout: Layout, snapshot: SnapshotKey, key: str) -> None:
    """Move a cache out of the way, for a person to look at; fine if it is gone."""
    folder, aside = layout.engine_caches_of(snapshot) / key, layout.aside(layout.quarantine, snapshot)
    for path in (folder, aside):
        tree.check_no_links(layout.root, path)
    durable.make_folder(aside.parent)
    try:
        durable.rename(folder, aside)
    except FileNotFoundError:
        return
    durable.touch_folder(aside)
    logger.warning("an engine's cache for %s is not right: moved to %s", snapshot, aside)


def folders(layout: Layout) -> Iterator[tuple[SnapshotKey, Path]]:
    """The folders of all published caches, with the snapshots that they were made for."""
    for snapshot, folder in keyed_folders(layout.engine_caches):
        for path in tree.entries(folder):
            if _KEY.fullmatch(path.name):
                yield snapshot, path


def remove(layout: Layout, snapshot: SnapshotKey) -> None:
    """Remove all caches of a snapshot."""
    folder = layout.engine_caches_of(snapshot)
    tree.check_no_links(layout.root, folder)
    durable.remove_tree(folder)


def _parsed(data: bytes, folder: Path, secret: str | None) -> dict[str, Any]:
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError):
        manifest = None
    signature = manifest.pop("hmac", None) if isinstance(manifest, dict) else None
    is_right = isinstance(manifest, dict) and manifest.keys() == _TYPES.keys()
    if not is_right or any(not isinstance(manifest[name], kind) for name, kind in _TYPES.items()):
        raise IntegrityError(f"{folder / _MANIFEST} is not the manifest of an engine's cache")
    if manifest["format"] != _FORMAT:
        raise IntegrityError(
            f"{folder / _MANIFEST} has the format {manifest['format']}, and this version reads {_FORMAT}"
        )
    if secret is not None and not hmac.compare_digest(str(signature).encode(), _signature(manifest, secret).encode()):
        raise IntegrityError(f"{folder} is not signed with MODELSTORE_ENGINE_CACHE_KEY")
    return dict(manifest)


def _signature(manifest: Mapping[str, Any], secret: str) -> str:
    return hmac.new(secret.encode(), _canonical(manifest), hashlib.sha256).hexdigest()


def _canonical(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
