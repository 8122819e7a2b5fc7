"""Collecting leftovers: plan first, then act.

Nothing is touched that changed within the grace period: a running download, load or removal works on younger files.
Ages are told by the volume's own clock. Collected are

- staging that no worker fills: under a claim of its own, so that no worker begins to in between;
- `trash/` and `quarantine/`: leftovers of a removal that was cut short, and damaged snapshots;
- generations of claims below the highest, which stays, so that numbers only grow;
- marks of use of workers that are gone, but for the newest, which says when the snapshot was last used;
- an engine's compiled code whose snapshot is gone, or that nobody has used for a month;
- positions of verifications whose snapshot is gone, and temporary files of writers that died.

A person's pin is the person's to take away.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from modelstore.errors import ModelStoreError
from modelstore.settings import Settings
from modelstore.volume import durable, engine_caches, pins, tree
from modelstore.volume.claim import Claim, Contender, generations, last_beat_at
from modelstore.volume.evict import Candidate, evict, first_that_free, survey
from modelstore.volume.layout import Layout, SnapshotKey, key_from_parts
from modelstore.volume.snapshots import keyed_folders, moved_aside
from modelstore.volume.space import Space

logger = logging.getLogger(__name__)

GRACE_S = 24 * 3600.0
ENGINE_CACHE_S = 30 * 24 * 3600.0  # without a use: of an older version, or of other arguments

Kind = Literal["staging", "trash", "quarantine", "engine cache", "generation", "mark", "record", "temporary"]


@dataclass(frozen=True, slots=True)
class Garbage:
    """One file or folder to collect; `key` if it belongs to a snapshot's claim."""

    kind: Kind
    path: Path
    size_bytes: int
    age_s: float
    key: SnapshotKey | None = None


@dataclass(frozen=True, slots=True)
class GarbagePlan:
    """The files that a collection removes, or has removed; print it before running it."""

    garbage: tuple[Garbage, ...]
    evicted: tuple[Candidate, ...] = ()

    @property
    def size_bytes(self) -> int:
        return sum(item.size_bytes for item in self.garbage) + sum(item.size_bytes for item in self.evicted)

    def run(self, layout: Layout, settings: Settings, *, grace_s: float) -> GarbagePlan:
        """Remove it all, except what has come into use since; returns the plan of what was removed."""
        removed = []
        for item in self.garbage:
            try:
                if collect(layout, item, worker=settings.worker_id, lease_s=settings.lease_s, grace_s=grace_s):
                    removed.append(item)
            except (ModelStoreError, OSError) as error:
                logger.warning("%s stays: %s", item.path, error)
        return GarbagePlan(
            tuple(removed), tuple(candidate for candidate in self.evicted if evict(layout, candidate.key))
        )


def plan_collection(
    layout: Layout, settings: Settings, *, grace_s: float = GRACE_S, limit_bytes: int | None = None
) -> GarbagePlan:
    """The garbage of now; with `limit_bytes` also the least recently used snapshots, until the store takes that."""
    garbage = find_garbage(layout, grace_s=grace_s)
    if limit_bytes is None:
        return GarbagePlan(garbage)
    excess = Space(layout, settings).taken() - GarbagePlan(garbage).size_bytes - limit_bytes
    return GarbagePlan(garbage, first_that_free(survey(layout), excess) if excess > 0 else ())


def find_garbage(layout: Layout, *, grace_s: float = GRACE_S) -> tuple[Garbage, ...]:
    """The leftovers. Raises RootUnusable if the store cannot be read."""
    now = pins.volume_time(layout)
    return tuple(item for item in _candidates(layout, now) if item.age_s >= grace_s)


def collect(layout: Layout, item: Garbage, *, worker: str, lease_s: float, grace_s: float = GRACE_S) -> bool:
    """Remove one item; False if it has come into use since."""
    tree.check_no_links(layout.root, item.path)
    if item.kind == "staging" and item.key is not None:
        return _collect_staging(layout, item, item.key, worker=worker, lease_s=lease_s, grace_s=grace_s)
    if pins.volume_time(layout) - tree.newest_mtime(item.path) < grace_s:
        return False
    if item.path.is_dir():
        durable.remove_tree(item.path)
    else:
        durable.remove_file(item.path)
    return True


def _collect_staging(
    layout: Layout, item: Garbage, key: SnapshotKey, *, worker: str, lease_s: float, grace_s: float
) -> bool:
    """Take the claim over: there was no write and no beat for the grace period, which is longer than any lease."""
    now = pins.volume_time(layout)
    if now - max(last_beat_at(layout.claims(key)), tree.newest_mtime(item.path)) < grace_s:
        return False
    claim = Contender(layout.claims(key), worker=worker, lease_s=lease_s).take_over()
    if not isinstance(claim, Claim):
        return False
    with claim:
        if pins.volume_time(layout) - tree.newest_mtime(item.path) < grace_s:
            return False
        durable.remove_tree(item.path)
    return True


def _candidates(layout: Layout, now: float) -> Iterator[Garbage]:
    for key, variant in keyed_folders(layout.root / "staging"):
        # A live claim beats every half second, even if its download stands still.
        touched_at = max(tree.newest_mtime(variant), last_beat_at(layout.claims(key)))
        yield Garbage("staging", variant, tree.tree_bytes(variant, unshared=True), now - touched_at, key)
    aside: dict[Kind, Path] = {"trash": layout.trash, "quarantine": layout.quarantine}
    for kind, folder in aside.items():
        for path in moved_aside(folder):
            yield replace(_file(kind, path, now), size_bytes=tree.tree_bytes(path, unshared=True))
    for key, folder in engine_caches.folders(layout):
        idle_s = now - tree.newest_mtime(folder)
        if idle_s >= ENGINE_CACHE_S or not any(layout.snapshot(each).is_dir() for each in (key, key.twin)):
            yield Garbage("engine cache", folder, tree.tree_bytes(folder), idle_s)
    for folder in (layout.space_claim, *(variant for _key, variant in keyed_folders(layout.root / "claims"))):
        for generation in generations(folder)[1:]:
            yield _file("generation", folder / str(generation), now)
    for key, variant in keyed_folders(layout.root / "used"):
        kept = 1 if layout.snapshot(key).is_dir() else 0
        marks = sorted((_file("mark", path, now) for path in tree.entries(variant)), key=lambda mark: mark.age_s)
        marks = [mark for mark in marks if mark.path.name != pins.EVICTING]
        yield from (mark for mark in marks[kept:] if mark.age_s >= pins.IN_USE_S)
    for repo in tree.entries(layout.root / "verified"):
        for path in tree.entries(repo):
            key_of = key_from_parts(repo.name, path.name.removesuffix(".json"))
            if key_of is not None and not layout.snapshot(key_of).is_dir():
                yield _file("record", path, now)
    divided = (layout.root / name for name in ("pins", "verified", "refs", "starts", "events"))  # by repo, or by day
    for folder in (layout.root, layout.aliases, *(part for whole in divided for part in tree.entries(whole))):
        for path in tree.entries(folder):
            if durable.is_temporary(path.name):
                yield _file("temporary", path, now)


def _file(kind: Kind, path: Path, now: float) -> Garbage:
    try:
        state = path.lstat()
    except FileNotFoundError:  # gone since the folder was listed: as young as can be
        return Garbage(kind, path, 0, 0.0)
    return Garbage(kind, path, state.st_size, now - state.st_mtime)
