"""Aliases: names on the volume that point to a snapshot and can be repointed, which is how models are swapped.

A record, `aliases/<name>.json`, is the alias's whole history, the last entry being where it points now. It is replaced
by one rename, so a reader sees either the old or the new.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from modelstore import durable
from modelstore.errors import InvalidReference, ModelStoreError, SnapshotNotFound
from modelstore.layout import DTYPES, Layout, SnapshotKey
from modelstore.reference import is_alias, is_commit, is_repo_id

_KEPT = 100

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pointed:
    """Where an alias pointed from `at` on (seconds since 1970), and who pointed it there."""

    key: SnapshotKey
    at: int
    by: str

    def as_json(self) -> dict[str, Any]:
        """As it stands in the record."""
        return {
            "repo_id": self.key.repo_id,
            "commit": self.key.commit,
            "dtype": self.key.dtype,
            "at": self.at,
            "by": self.by,
        }


def names(layout: Layout) -> Iterator[str]:
    """All aliases."""
    for path in durable.entries(layout.aliases):
        if path.suffix == ".json" and is_alias(path.stem):
            yield path.stem


def history(layout: Layout, name: str) -> tuple[Pointed, ...]:
    """Where an alias has pointed, the latest last; empty where there is no such alias.

    Raises InvalidReference where its record cannot be read.
    """
    path = layout.alias(name)
    try:
        data = durable.read_file(path)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise InvalidReference(f"{path} cannot be read ({error.strerror}): point @{name} anew") from error
    try:
        entries = [
            Pointed(SnapshotKey(one["repo_id"], one["commit"], one["dtype"]), int(one["at"]), str(one["by"]))
            for one in json.loads(data)["history"]
        ]
        if all(
            isinstance(e.key.repo_id, str)
            and is_repo_id(e.key.repo_id)
            and is_commit(e.key.commit)
            and e.key.dtype in DTYPES
            for e in entries
        ):
            return tuple(entries)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise InvalidReference(f"{path} is damaged: point @{name} anew")


def targets(layout: Layout) -> dict[SnapshotKey, tuple[str, ...]]:
    """The aliases that point to each snapshot; a damaged record points nowhere."""
    found: dict[SnapshotKey, tuple[str, ...]] = {}
    for name in names(layout):
        try:
            entries = history(layout, name)
        except InvalidReference as error:
            logger.warning("%s", error)
            continue
        if entries:
            found[entries[-1].key] = (*found.get(entries[-1].key, ()), name)
    return found


def checked(name: str) -> str:
    """`name`, if it can be an alias's. Raises InvalidReference."""
    if not is_alias(name):
        raise InvalidReference(f"{name!r} is not an alias: use lower-case letters, digits, '.', '_' and '-'")
    return name


def target(layout: Layout, name: str) -> SnapshotKey:
    """Where an alias points. Raises SnapshotNotFound where there is no such alias."""
    found = history(layout, name)
    if not found:
        raise SnapshotNotFound(f"the store has no alias @{name}: set it, or name the model as org/name")
    return found[-1].key


def point(layout: Layout, name: str, key: SnapshotKey, by: str) -> None:
    """Let an alias point to a snapshot, which the caller knows to be published."""
    try:
        before = history(layout, name)
    except ModelStoreError:
        before = ()
    entries = [*before, Pointed(key, int(time.time()), by)][-_KEPT:]
    path = layout.alias(name)
    durable.check_no_links(layout.root, path)
    durable.write_atomic(path, json.dumps({"history": [entry.as_json() for entry in entries]}).encode() + b"\n")
