"""The downloads that are on the volume and not published: running now, or left by a worker that is gone.

The next seed or start of the model goes on with what is there. Nobody needs to remove it: `gc` does, a day after the
last byte. `drop` is for a person who wants the space now.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from modelstore.errors import Refused
from modelstore.volume import durable, pins, tree
from modelstore.volume.claim import DEAD_AFTER_S, Claim, Contender, current_record, last_beat_at
from modelstore.volume.layout import Layout, SnapshotKey
from modelstore.volume.snapshots import keyed_folders

_SILENT_S = 5.0  # a holder beats twice a second, and MooseFS tells whole seconds


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An unpublished download. `size_bytes`: on the volume; `done` of `total` bytes of the source have arrived, as its
    last holder reported, `total` is 0 if it reported nothing; `idle_s`: since the last byte or heartbeat."""

    key: SnapshotKey
    size_bytes: int
    done: int
    total: int
    idle_s: float
    is_running: bool


def unfinished(layout: Layout) -> Iterator[Unfinished]:
    """The unpublished downloads, by repo and commit. One whose worker died a few seconds ago still looks running."""
    staged = [(key, folder) for key, folder in keyed_folders(layout.root / "staging") if tree.entries(folder)]
    now = pins.volume_time(layout) if staged else 0.0
    for key, folder in staged:
        claims = layout.claims(key)
        (_generation, record), beat_at = current_record(claims), last_beat_at(claims)
        yield Unfinished(
            key,
            size_bytes=tree.tree_bytes(folder, unshared=True),
            done=record.done if record is not None else 0,
            total=record.total if record is not None else 0,
            idle_s=max(now - max(beat_at, tree.newest_mtime(folder)), 0.0),
            is_running=record is not None and record.state == "held" and now - beat_at < _SILENT_S,
        )


def is_running(layout: Layout, key: SnapshotKey) -> bool:
    """Whether a worker is making this snapshot now. One that died a few seconds ago still looks so."""
    claims = layout.claims(key)
    if not tree.exists(claims):
        return False
    (_generation, record), beat_at = current_record(claims), last_beat_at(claims)
    return record is not None and record.state == "held" and pins.volume_time(layout) - beat_at < _SILENT_S


def drop(layout: Layout, key: SnapshotKey, *, worker: str, lease_s: float) -> None:
    """Remove an unfinished download, under its claim. Waits for the lease if its holder's host is gone.

    Raises Refused if its holder is alive.
    """
    tree.check_no_links(layout.root, layout.staging(key))
    tree.check_no_links(layout.root, layout.claims(key))
    contender = Contender(layout.claims(key), worker=worker, lease_s=lease_s)
    beats: set[tuple[int, int]] = set()
    while not isinstance(holder := contender.try_claim(), Claim):
        beats.add((holder.generation, holder.record.beat if holder.record is not None else 0))
        if len(beats) > 1:
            raise Refused(f"{key} is being downloaded by {holder.describe()}: stop that first")
        time.sleep(DEAD_AFTER_S / 4)
    with holder as claim:
        claim.check()
        durable.remove_tree(layout.staging(key))
