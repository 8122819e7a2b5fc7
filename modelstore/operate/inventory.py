"""The contents of a volume, as records: its snapshots and their users, the space that they take, the running downloads.

Reads, and writes nothing but the touch that tells the volume's time.
"""

from __future__ import annotations

import os
import time
from typing import Any

from modelstore.dtypes import parse_dtype
from modelstore.errors import Refused, SnapshotNotFound
from modelstore.reference import Reference, is_cut_commit, parse_reference, repo_id_of
from modelstore.settings import Settings
from modelstore.store import ModelStore
from modelstore.volume import aliases, durable, engine_caches, pins, refs, tree
from modelstore.volume.claim import ClaimRecord, current_record
from modelstore.volume.evict import survey
from modelstore.volume.garbage import GRACE_S
from modelstore.volume.layout import Layout, SnapshotKey
from modelstore.volume.snapshots import Catalog, Snapshot, keyed_folders
from modelstore.volume.space import Space
from modelstore.volume.unfinished import Unfinished
from modelstore.volume.verify import known_problem

_BETWEEN_LOOKS_S = 1.5

_Seen = tuple[SnapshotKey, durable.Contents | None, set[str] | None, tuple[pins.Mark, ...], str]


def models(layout: Layout) -> list[dict[str, Any]]:
    """The snapshots, by repo and commit: size, last use, pin, aliases, compiled code, and the workers that use them.

    `complete` is false if a file that the manifest names is not there, or the manifest cannot be read; `problem` is
    what the last `verify`, which compares sizes and bytes, found wrong.
    """
    catalog = Catalog(layout)
    keys = list(catalog.keys())
    now = pins.volume_time(layout) if keys else 0.0
    aliased, pinned, marked = aliases.targets(layout).known, pins.pinned(layout), pins.marked_repos(layout)
    verified = frozenset(tree.names(layout.root / "verified"))
    cached = frozenset(tree.names(layout.engine_caches))

    records = []
    # Files are parsed after all were read: a thread that computes holds up those that read.
    for record in tree.map_concurrently(lambda key: _seen(catalog, layout, key, now, marked, verified), keys):
        if record is None:
            continue
        key, file, names, marks, problem = record
        manifest = catalog.parse(key, file)
        tops = {file.path.split("/")[0] for file in manifest.files} if manifest else set()
        records.append(
            {
                **key.as_json(),
                "path": str(layout.snapshot(key)),
                "files": len(manifest.files) if manifest else 0,
                "bytes": manifest.size_bytes if manifest else 0,
                **({"plain_bytes": manifest.plain_bytes} if manifest and key.compressed else {}),
                "complete": bool(tops) and (names is None or tops <= names),
                "problem": problem,
                "idle_s": round(max(now - marks[0].touched_at, 0.0)) if marks else None,
                "pinned": key.plain in pinned,
                "aliases": list(aliased.get(key.plain, ())),
                "in_use_by": list(pins.users_of(marks, now)),
                "engine_caches": engine_caches.records(layout, key) if key.parts[0] in cached else [],
            }
        )
    return records


def unfinished_record(layout: Layout, download: Unfinished) -> dict[str, Any]:
    """The record of an unfinished download: how far it is, and how long `gc` leaves it alone."""
    return {
        **download.key.as_json(),
        "path": str(layout.staging(download.key)),
        "bytes": download.size_bytes,
        "done": download.done,
        "total": download.total,
        "idle_s": round(download.idle_s),
        "kept_s": round(max(GRACE_S - download.idle_s, 0)),
        "running": download.is_running,
    }


def space(layout: Layout, settings: Settings) -> dict[str, Any]:
    """The bytes of each kind, against the quota, and the bytes that an eviction frees; files with two names count
    once."""
    refs.check_format(layout)
    candidates = survey(layout)
    counted: set[tuple[int, int]] = set()
    folders = {"models": layout.models, "staging": layout.root / "staging"}
    folders |= {"engine-caches": layout.engine_caches, "quarantine": layout.quarantine, "trash": layout.trash}
    kinds = {kind: tree.tree_bytes(folder, counted) for kind, folder in folders.items()}
    taken = Space(layout, settings).taken()
    kinds["promised"] = max(taken - sum(kinds.values()), 0)  # to downloads that run
    may_go = [candidate for candidate in candidates if not candidate.retained_by]
    return {
        "root": str(layout.root),
        "quota": settings.quota_bytes,
        "taken": taken,
        "free": None if settings.quota_bytes is None else max(settings.quota_bytes - taken, 0),
        "kinds": kinds,
        "evictable": sum(candidate.size_bytes for candidate in may_go),
        "snapshots": [
            {
                **candidate.key.as_json(),
                "bytes": candidate.size_bytes,
                "idle_s": round(candidate.idle_s),
                "kept_because": candidate.retained_by,
            }
            for candidate in sorted(candidates, key=lambda candidate: -candidate.size_bytes)
        ],
    }


def claims(layout: Layout) -> list[dict[str, Any]]:
    """The claims that are held: the worker, its progress, the time left, and whether the holder is alive.

    Looks twice, a few heartbeats apart: a holder that said nothing in between is gone, or its host is. `silent_s`:
    seconds since its last heartbeat.
    """
    refs.check_format(layout)

    def held_claim(key: SnapshotKey) -> tuple[SnapshotKey, int, ClaimRecord] | None:
        generation, record = current_record(layout.claims(key))
        return (key, generation, record) if record is not None and record.state == "held" else None

    keys = [key for key, _folder in keyed_folders(layout.root / "claims")]
    first = [claim for claim in tree.map_concurrently(held_claim, keys) if claim is not None]
    if not first:
        return []
    time.sleep(_BETWEEN_LOOKS_S)
    now = pins.volume_time(layout)
    records = []
    for key, generation, before in first:
        claim = held_claim(key)
        if claim is None:
            continue
        _key, now_generation, record = claim
        silent_s = now - tree.newest_mtime(layout.claims(key) / str(now_generation))
        records.append(
            {
                **key.as_json(),
                "generation": now_generation,
                "worker": record.worker,
                "host": record.host,
                "pid": record.pid,
                "phase": record.phase,
                "done": record.done,
                "total": record.total,
                "eta_s": record.eta_s,
                "alive": (now_generation, record.beat) != (generation, before.beat),
                "silent_s": round(max(silent_s, 0)),
            }
        )
    return records


def _seen(
    catalog: Catalog, layout: Layout, key: SnapshotKey, now: float, marked: frozenset[str], verified: frozenset[str]
) -> _Seen | None:
    """A snapshot's manifest, the contents of its folder, its marks, and the problem that a verification found; None if
    it was evicted meanwhile.

    The names are None if the folder's time says that nothing was put or removed since the manifest was written. That
    saves a round trip on MooseFS, whose times are whole seconds; if they are finer, the folder is always later. A
    copy that left files out and restored the times is not seen: that takes `verify`.
    """
    file, folder = catalog.read(key), layout.snapshot(key)
    names: set[str] | None = None
    try:
        if file is None or os.lstat(folder).st_mtime_ns > file.state.st_mtime_ns:
            names = set(os.listdir(folder))
    except FileNotFoundError:
        return None
    marks = pins.recent_marks(layout, key, now) if key.parts[0] in marked else ()
    return key, file, names, marks, known_problem(layout, key) if key.parts[0] in verified else ""


def find_key(
    store: ModelStore, reference: str, revision: str | None, dtype: str | None, *, exact: bool = False
) -> SnapshotKey:
    """The key of the folder in the snapshot's place, damaged or not; a commit may be cut, as `ls` shows it.

    Without `dtype`: in the variant that a start takes; if `exact`, only in the one that was recorded, so that a removal
    that is repeated does not take the next variant.
    """
    parsed = parse_reference(reference, revision=revision)
    variant = parse_dtype("--dtype", dtype) if dtype else store.settings.dtype
    as_variant = f" as {variant}" if variant else ""
    if (key := store.catalog.find_key(parsed, variant, exact=exact)) is not None:
        return key
    if parsed.kind == "alias":  # its snapshot is not there
        key = aliases.target(store.layout, parsed.name)
        raise SnapshotNotFound(f"{parsed} points to {key}, which is not on the volume: run `modelstore seed {parsed}`")
    recorded = refs.recorded(store.layout, parsed)
    variants = list(store.catalog.keys(recorded.repo_id))
    if is_cut_commit(parsed.revision):
        commits = {key.commit for key in variants if key.commit.startswith(parsed.revision)}
        if len(commits) == 1:  # as if the commit stood there in full
            whole = Reference("hub", recorded.repo_id, commits.pop())
            if (key := store.catalog.find_key(whole, variant, exact=exact)) is not None:
                return key
    problem = f"{reference} is not in {store.settings.root}{as_variant}"
    if variants:
        names = dict.fromkeys(f"{key.repo_id}@{key.commit[:12]} --dtype {key.dtype}" for key in variants)
        others = ", ".join(list(names)[:5])
        raise SnapshotNotFound(f"{problem}, but this is: {others}")
    if similar := store.catalog.similar(repo_id_of(parsed)):
        raise SnapshotNotFound(f"{problem}: did you mean {similar}?")
    option = f" --dtype {dtype}" if dtype else ""
    raise SnapshotNotFound(f"{problem}: look at `modelstore ls`, or run `modelstore seed {reference}{option}`")


def with_twin(store: ModelStore, key: SnapshotKey) -> tuple[SnapshotKey, ...]:
    """The key, and its twin if a folder is in its place: both are meant by a name that says nothing of it."""
    return (key, key.twin) if store.layout.snapshot(key.twin).is_dir() else (key,)


def find_plain(store: ModelStore, reference: str, revision: str | None, dtype: str | None) -> Snapshot:
    """The published snapshot, plain, for programs that open its files. Raises Refused if there is only a compressed
    one, and the errors of `find_key`."""
    snapshot = find_snapshot(store, reference, revision, dtype)
    plain = snapshot if not snapshot.has_compressed_files else store.catalog.published(snapshot.key.plain)
    if plain is None:
        raise Refused(
            f"{snapshot.key} has no plain files: run `modelstore expand {reference}`, or `modelstore export` if it was "
            "seeded with --dtype keep"
        )
    return plain


def find_snapshot(store: ModelStore, reference: str, revision: str | None, dtype: str | None) -> Snapshot:
    """The published snapshot: see `find_key`."""
    key = find_key(store, reference, revision, dtype)
    if (snapshot := store.catalog.published_twin(key)) is None:
        problem = "is damaged" if store.layout.snapshot(key).is_dir() else "is not there any more"
        raise SnapshotNotFound(f"{key} {problem}: run `modelstore seed` for it again")
    return snapshot
