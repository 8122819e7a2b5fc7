"""The records of a store that are not about one snapshot: its format, and the commit of each revision.

    FORMAT                                   "1"
    refs/<org>--<name>/<revision>.json       {"revision": "main", "commit": "…", "resolved_at": 1790000000}
                                             with "repo_id", if the Hub has another id for the repo of this name
    refs/<org>--<name>/<commit>.json         the same for the commit itself, with "dtype": the variant that was seeded

A revision that was resolved once is answered from its record, so a fleet serves one commit until the next seed, and a
Hub that is down changes nothing. The variant of the last seed answers if none is asked for. Standard library only.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from modelstore.dtypes import DEFAULT_DTYPE, DTYPES
from modelstore.errors import FormatTooNew, IntegrityError, RootUnusable
from modelstore.mount import check_place
from modelstore.reference import (
    DEFAULT_REVISION,
    Reference,
    is_commit,
    is_local,
    is_repo_id,
    repo_id_of,
    revision_of,
)
from modelstore.volume import durable, tree
from modelstore.volume.layout import FORMAT_VERSION, Layout, SnapshotKey

FORMAT_BYTES = b"%d\n" % FORMAT_VERSION

_MOST_REVISION = 1000  # characters

logger = logging.getLogger(__name__)


def check_format(layout: Layout) -> None:
    """Raise FormatTooNew if a newer version wrote the store, RootUnusable if it cannot be read."""
    try:
        data = durable.read_file(layout.format_file)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise RootUnusable(
            f"cannot read {layout.root}: {error.strerror}; check the mount and MODELSTORE_ROOT"
        ) from error
    check_format_bytes(data, store=str(layout.root))


def check_format_bytes(data: bytes, *, store: str) -> None:
    """Raise FormatTooNew if a FORMAT file with these bytes was written by a newer version; `store` names the store."""
    text = data.strip()
    if not text.isdigit() or len(text) > 9 or int(text) > FORMAT_VERSION:
        raise FormatTooNew(
            f"{store} has store format {text[:20].decode(errors='replace')!r}, this version knows "
            f"{FORMAT_VERSION}: upgrade modelstore, or set MODELSTORE_ROOT to another folder"
        )


def prepare_store(layout: Layout) -> None:
    """Write the format of a store that has none yet, with the folders that a full volume could no longer take."""
    if tree.exists(layout.format_file):
        return
    missing = ""
    try:
        check_place(layout.root)
    except RootUnusable as error:  # the first fill makes the folder, but its operator may not have meant to
        missing = str(error)
    durable.make_folder(layout.trash)
    durable.write_atomic(layout.format_file, FORMAT_BYTES)
    if missing:
        logger.warning("%s; until then it is made here", missing)


@dataclass(frozen=True, slots=True)
class Recorded:
    """The snapshots that a fleet uses for a reference: the id that the Hub gives the repo, and the commit, empty if
    none was recorded; `dtype` in the record of a commit that was seeded."""

    repo_id: str
    commit: str
    dtype: str = ""


def recorded(layout: Layout, reference: Reference) -> Recorded:
    """The repo and the commit that this fleet uses for the reference; a name of the repo that the Hub has replaced
    leads to its present one. Raises RootUnusable if the record cannot be read, and IntegrityError if it is damaged."""
    repo_id, revision = repo_id_of(reference), revision_of(reference)
    record = _read(layout, repo_id, revision)
    return Recorded(record.repo_id, revision) if is_commit(revision) else record


def seeded_dtype(layout: Layout, repo_id: str, commit: str) -> str:
    """The variant of the last seed of this commit; empty if none was recorded."""
    try:
        return _read(layout, repo_id, commit).dtype
    except IntegrityError as error:
        logger.warning("%s", error)
        return ""


def record_commit(
    layout: Layout,
    repo_id: str,
    revision: str,
    commit: str,
    *,
    replacing: bool,
    check: Callable[[], None],
    asked_as: str = "",
) -> None:
    """Let the fleet use this commit for the revision from now on; only a seed replaces another one.

    `check` is called before anything is written. `asked_as`: the name that the repo was asked for under, if it is
    another one than its id: it then means the same.
    """
    for name, record_revision in record_places(repo_id, revision, asked_as):
        try:
            before = _read(layout, name, record_revision)
        except IntegrityError:
            before = Recorded(name, "")
        to = Recorded(repo_id, commit)
        if (before.repo_id, before.commit) == (repo_id, commit) or (before.commit and not replacing):
            continue
        check()
        _write(layout, name, record_revision, to)


def record_dtype(layout: Layout, key: SnapshotKey, *, check: Callable[[], None]) -> None:
    """Let this variant of the commit answer from now on, if none is asked for. `check`: see `record_commit`."""
    if (seeded_dtype(layout, key.repo_id, key.commit) or DEFAULT_DTYPE) != key.dtype:
        check()
        _write(layout, key.repo_id, key.commit, Recorded(key.repo_id, key.commit, key.dtype))


def _write(layout: Layout, name: str, revision: str, to: Recorded) -> None:
    path = layout.ref(name, revision)
    tree.check_no_links(layout.root, path)
    durable.write_atomic(path, encode_record(revision, to, name))


def record_places(repo_id: str, revision: str, asked_as: str = "") -> Iterator[tuple[str, str]]:
    """The names and revisions that a commit is recorded under: see `recorded_revisions`; under a name that is not the
    repo's id a commit itself, too."""
    yield from ((repo_id, name) for name in recorded_revisions(repo_id, revision))
    if asked_as and asked_as != repo_id and revision:
        yield asked_as, revision


def encode_record(revision: str, to: Recorded, name: str) -> bytes:
    """The bytes of a record under `refs/`, for the repo called `name` there."""
    record = {"revision": revision, "commit": to.commit, "resolved_at": int(time.time())}
    if to.dtype:
        record["dtype"] = to.dtype
    if to.repo_id != name:
        record["repo_id"] = to.repo_id
    return json.dumps(record).encode() + b"\n"


def recorded_revisions(repo_id: str, revision: str) -> tuple[str, ...]:
    """The revisions that a commit is recorded under: none for a commit itself or an alias; for a folder also `main`, so
    that its name in `ls` means the commit that was seeded last."""
    if not revision or is_commit(revision):
        return ()
    return (revision, DEFAULT_REVISION) if is_local(repo_id) else (revision,)


def _read(layout: Layout, name: str, revision: str) -> Recorded:
    """The record of a revision of the repo called `name`. Raises IntegrityError if it is damaged."""
    path = layout.ref(name, revision)
    tree.check_no_links(layout.root, path)
    try:
        data = durable.read_file(path)
    except (FileNotFoundError, NotADirectoryError):
        return Recorded(name, "")
    except OSError as error:
        if not durable.is_no_file_of_ours(error):
            raise tree.unreadable(error, path) from error
        data = b""
    if (recorded := parse_record(data, name)) is None:
        raise IntegrityError(
            f"{path}, the record of the commit that this fleet uses, is damaged: write it anew, with `modelstore seed "
            f"{name}`"
        )
    return recorded


def parse_record(data: bytes, name: str) -> Recorded | None:
    """The contents of a record under `refs/` of the repo called `name` there; None if it is damaged."""
    try:
        record = json.loads(data)
        commit, repo_id, dtype = record["commit"], record.get("repo_id", name), record.get("dtype", "")
        if is_commit(commit) and is_repo_id(repo_id) and (dtype == "" or dtype in DTYPES):
            return Recorded(repo_id, commit, dtype)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return None


def parse_revision(data: bytes) -> str:
    """The revision that a record under `refs/` is of; empty if it names none."""
    try:
        revision = json.loads(data)["revision"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return revision if isinstance(revision, str) and len(revision) <= _MOST_REVISION else ""
