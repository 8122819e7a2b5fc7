"""Removing snapshots: plan first, then act.

A snapshot is unpublished by one rename into `trash/`, then deleted: from that moment no lookup finds it, and a loader
that has opened its files reads them to the end. Another mount may find the folder under its old name for a second more
(MooseFS caches the names of folders for that long: up to 1.01 s in eight tries on 3.0.117), so the announcement of the
eviction stands for two. Leftovers of a crash in `trash/` are collected later (`garbage.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modelstore.errors import ModelStoreError
from modelstore.volume import aliases, durable, engine_caches, history, pins, tree
from modelstore.volume.layout import Layout, SnapshotKey
from modelstore.volume.snapshots import Catalog

SETTLE_S = 2.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A snapshot, damaged or not, and the reasons against evicting it. `size_bytes` is freed when it goes,
    `idle_s` the seconds since its last use."""

    key: SnapshotKey
    size_bytes: int
    idle_s: float
    pinned: bool
    users: tuple[str, ...]
    aliases: tuple[str, ...] = ()

    @property
    def retained_by(self) -> str:
        """Why it must stay; empty if it may go."""
        if self.pinned:
            return "it is pinned"
        if self.aliases:
            return f"@{self.aliases[0]} points to it"
        return f"it is in use by {', '.join(self.users)}" if self.users else ""


def survey(layout: Layout, keys: Sequence[SnapshotKey] | None = None) -> tuple[Candidate, ...]:
    """The snapshots, or those of `keys`, the least recently used first."""
    now = pins.volume_time(layout)
    aliased = aliases.targets(layout)
    candidates = []
    for key in Catalog(layout).keys() if keys is None else keys:
        folder = layout.snapshot(key)
        marks = pins.marks(layout, key)
        touched_at = marks[0].touched_at if marks else tree.newest_mtime(folder)
        users = pins.users_of(marks, now)
        size = tree.tree_bytes(folder, unshared=True)
        if not layout.snapshot(key.twin).is_dir():  # else its compiled code stays for the other form
            size += tree.tree_bytes(layout.engine_caches_of(key))
        pinned = pins.is_pinned(layout, key)
        candidates.append(Candidate(key, size, now - touched_at, pinned, users, aliased.keeping(key)))
    return tuple(sorted(candidates, key=lambda candidate: -candidate.idle_s))


def first_that_free(candidates: Sequence[Candidate], size_bytes: int) -> tuple[Candidate, ...]:
    """The first of `candidates` that may go and together free `size_bytes`; all that may go if they do not."""
    chosen: list[Candidate] = []
    for candidate in candidates:
        if sum(before.size_bytes for before in chosen) >= size_bytes:
            break
        if not candidate.retained_by:
            chosen.append(candidate)
    return tuple(chosen)


def evict(
    layout: Layout,
    key: SnapshotKey,
    *,
    force: bool = False,
    replaced_by_twin: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Unpublish a snapshot, then delete it; False if it was used, pinned or removed since, or if an
    alias points to it.

    `force`: even if it is in use or pinned. `replaced_by_twin`: even if an alias points to it, or it is pinned, if its
    twin is published, which answers in its place.
    """
    path, aside = layout.snapshot(key), layout.aside(layout.trash, key)
    tree.check_no_links(layout.root, path)
    tree.check_no_links(layout.root, aside)
    durable.make_folder(aside.parent)
    with pins.evicting(layout, key, sleep=sleep) as in_time:
        if not force:
            now = pins.volume_time(layout)
            if replaced_by_twin:  # two processes that remove one form each have announced it before they look
                goes = tree.exists(layout.used(key.twin) / pins.EVICTING)
                spared = goes or Catalog(layout).published(key.twin) is None
            else:
                spared = pins.is_pinned(layout, key) or bool(aliases.targets(layout).keeping(key))
            if spared or pins.users(layout, key, now) or not in_time():
                return False
        durable.touch_folder(path)
        try:
            durable.rename(path, aside)
        except FileNotFoundError:
            return False
        try:
            durable.sync_path(path.parent)
            if force and not layout.snapshot(key.twin).is_dir():
                pins.unpin(layout, key)
            sleep(SETTLE_S)
        except BaseException:  # Ctrl-C, perhaps: it is unpublished, so it goes
            durable.remove_tree(aside)
            raise
    durable.remove_tree(aside)
    try:
        if not layout.snapshot(key.twin).is_dir():
            engine_caches.remove(layout, key)
    except (ModelStoreError, OSError) as error:
        logger.warning("the compiled code for %s stays: %s", key, error)
    logger.info("evicted %s", key)
    history.record_event(layout, "evicted", key)
    return True
