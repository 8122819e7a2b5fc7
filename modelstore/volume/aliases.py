"""Aliases: names on the volume that point to a snapshot and can be repointed, which is how models are swapped.

A record, `aliases/<name>.json`, is the alias's whole history; the alias points to the last entry. It is replaced
by one rename, so a reader sees either the old or the new. An entry for a part of the fleet ("percent") is a canary: the
workers of that share, told by their ids, follow it, and the others the last entry that is for all.
"""

from __future__ import annotations

import json
import logging
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelstore.dtypes import DTYPES
from modelstore.errors import InvalidReference, RootUnusable, SnapshotNotFound
from modelstore.reference import is_alias, is_commit, is_repo_id
from modelstore.units import printable
from modelstore.volume import durable, tree
from modelstore.volume.layout import Layout, SnapshotKey

_KEPT = 100

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pointed:
    """The snapshot of an alias from `at` on (seconds since 1970), the worker that pointed it there, and the share of
    the fleet."""

    key: SnapshotKey
    at: int
    by: str
    percent: int = 100

    def as_json(self) -> dict[str, Any]:
        """As it stands in the record."""
        return {
            **self.key.as_json(),
            "at": self.at,
            "by": self.by,
            **({"percent": self.percent} if self.percent < 100 else {}),
        }


def names(layout: Layout) -> Iterator[str]:
    """All aliases."""
    for path in tree.entries(layout.aliases):
        if path.suffix == ".json" and is_alias(path.stem):
            yield path.stem


def history(layout: Layout, name: str) -> tuple[Pointed, ...]:
    """The entries of an alias, the latest last; empty if there is no such alias.

    Raises InvalidReference if its record is damaged, and RootUnusable if it cannot be read.
    """
    path = layout.alias(name)
    try:
        data = durable.read_file(path)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        if not durable.is_no_file_of_ours(error):
            raise tree.unreadable(error, path) from error
        raise InvalidReference(f"{path} cannot be read ({error.strerror}): point @{name} anew") from error
    return parse_history(data, f"{path} is damaged: point @{name} anew")


def parse_history(data: bytes, problem: str) -> tuple[Pointed, ...]:
    """The entries of an alias's record. Raises InvalidReference with the text `problem` if it is damaged."""
    try:
        entries = [
            Pointed(
                SnapshotKey(entry["repo_id"], entry["commit"], entry["dtype"]),
                int(entry["at"]),
                printable(str(entry["by"])),
                int(entry.get("percent", 100)),
            )
            for entry in json.loads(data)["history"]
        ]
        if entries and all(
            isinstance(e.key.repo_id, str)
            and is_repo_id(e.key.repo_id)
            and is_commit(e.key.commit)
            and e.key.dtype in DTYPES
            and 1 <= e.percent <= 100
            and 0 <= e.at < 1e11
            for e in entries
        ):
            return tuple(entries)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        pass
    raise InvalidReference(problem)


def encode_history(entries: Sequence[Pointed]) -> bytes:
    """The record of an alias with these entries; the oldest of many are left out, but for the stable one."""
    entries = [entry for entry in entries[:-_KEPT] if entry is stable(entries)] + [*entries[-_KEPT:]]
    return json.dumps({"history": [entry.as_json() for entry in entries]}).encode() + b"\n"


@dataclass(frozen=True, slots=True)
class Targets:
    """The aliases that point to each snapshot, by its plain key, and those whose record tells nothing: they may point
    to any. An alias is answered by a snapshot or, if that is not there, by its twin."""

    known: Mapping[SnapshotKey, tuple[str, ...]]
    damaged: tuple[str, ...]

    def keeping(self, key: SnapshotKey) -> tuple[str, ...]:
        """The aliases for whose sake a snapshot must stay."""
        return self.known.get(key.plain, ()) + self.damaged


def targets(layout: Layout) -> Targets:
    """The target of each alias; a record that is damaged, or cannot be read, is a warning."""
    known: dict[SnapshotKey, tuple[str, ...]] = {}
    damaged = []
    for name in names(layout):
        try:
            entries = history(layout, name)
        except (InvalidReference, RootUnusable) as error:
            logger.warning("%s", error)
            damaged.append(name)
            continue
        for key in {entries[-1].key, stable(entries).key} if entries else ():
            known[key] = (*known.get(key, ()), name)
    return Targets(known, tuple(damaged))


def checked(name: str) -> str:
    """`name`, if it can be an alias's. Raises InvalidReference."""
    if not is_alias(name):
        raise InvalidReference(f"{name!r} is not an alias: use lower-case letters, digits, '.', '_' and '-'")
    return name


def target(layout: Layout, name: str, *, worker: str | None = None) -> SnapshotKey:
    """The target of an alias; for a worker of a canary's share, the canary. Raises SnapshotNotFound if there is no such
    alias."""
    pointed = history(layout, name)
    if not pointed:
        raise no_alias(layout, name)
    if worker is not None and share_of(name, worker) < pointed[-1].percent:
        return pointed[-1].key
    return stable(pointed).key


def no_alias(layout: Layout, name: str) -> SnapshotNotFound:
    """The error for an alias that does not exist."""
    from difflib import get_close_matches  # only for this

    similar = get_close_matches(name, list(names(layout)), 1, 0.7)
    hint = f"did you mean @{similar[0]}?" if similar else "set it, or name the model as org/name"
    return SnapshotNotFound(f"the store has no alias @{name}: {hint}")


def stable(entries: Sequence[Pointed]) -> Pointed:
    """The last entry that is for the whole fleet; if there is none, the last."""
    return next((entry for entry in reversed(entries) if entry.percent == 100), entries[-1])


def previous(entries: Sequence[Pointed]) -> Pointed | None:
    """The entry that a rollback leads to; None if there is none. A canary is rolled back to the entry for all.

    An alias that was pointed back to an earlier snapshot is where it was then: what it left is not before it.
    """
    if entries and entries[-1].percent < 100:
        return next((entry for entry in reversed(entries) if entry.percent == 100), None)
    path: list[Pointed] = []
    for entry in (entry for entry in entries if entry.percent == 100):
        keys = [earlier.key for earlier in path]
        path = [*path[: keys.index(entry.key)], entry] if entry.key in keys else [*path, entry]
    return path[-2] if len(path) > 1 else None


def remove(layout: Layout, name: str) -> None:
    """Take an alias away, with its history."""
    path = layout.alias(name)
    tree.check_no_links(layout.root, path)
    durable.remove_file(path)


def share_of(name: str, worker: str) -> int:
    """A worker's place among a hundred, always the same; a canary of n percent is for those below n."""
    return zlib.crc32(f"{name}:{worker}".encode()) % 100


def point(layout: Layout, name: str, key: SnapshotKey, by: str, *, percent: int = 100) -> None:
    """Let an alias point to a snapshot that the caller knows to be published; `percent`: for how much of the fleet. It
    is answered by the snapshot or its twin, so that its record has the plain key."""
    key = key.plain
    try:
        before = history(layout, name)
    except InvalidReference as error:
        logger.warning("%s: its history begins anew", error)
        before = ()
    if before and (before[-1].key, before[-1].percent) == (key, percent):
        return
    entries = [*before, Pointed(key, int(time.time()), by, percent)]
    path = layout.alias(name)
    tree.check_no_links(layout.root, path)
    durable.write_atomic(path, encode_history(entries))
