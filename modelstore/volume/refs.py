"""The records of a store that are not about one snapshot: its format, and the commit of each revision.

    FORMAT                                   "1"
    refs/<org>--<name>/<revision>.json       {"revision": "main", "commit": "…", "resolved_at": 1790000000}

A revision that was resolved once is answered from its record, so a fleet serves one commit until the next seed, and a
Hub that is down changes nothing. Standard library only.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from modelstore.errors import FormatTooNew, RootUnusable
from modelstore.mount import check_place
from modelstore.reference import (
    DEFAULT_REVISION,
    Reference,
    is_commit,
    is_local,
    repo_id_of,
    revision_of,
)
from modelstore.volume import durable, tree
from modelstore.volume.layout import FORMAT_VERSION, Layout

FORMAT_BYTES = b"%d\n" % FORMAT_VERSION

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
    if layout.format_file.exists():
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


def recorded_commit(layout: Layout, reference: Reference) -> str:
    """The commit that this fleet uses for the reference; empty if none was recorded."""
    if is_commit(reference.revision):
        return reference.revision
    return _read_commit(layout, layout.ref(repo_id_of(reference), revision_of(reference)))


def record_commit(layout: Layout, repo_id: str, revision: str, commit: str, *, replacing: bool) -> None:
    """Let the fleet use this commit for the revision from now on; only a seed replaces another one."""
    for name in recorded_revisions(repo_id, revision):
        path = layout.ref(repo_id, name)
        recorded = _read_commit(layout, path)
        if recorded == commit or (recorded and not replacing):
            continue
        tree.check_no_links(layout.root, path)
        durable.write_atomic(path, commit_record(name, commit))


def commit_record(revision: str, commit: str) -> bytes:
    """The bytes of a record under `refs/`."""
    record = {"revision": revision, "commit": commit, "resolved_at": int(time.time())}
    return json.dumps(record).encode() + b"\n"


def recorded_revisions(repo_id: str, revision: str) -> tuple[str, ...]:
    """The revisions that a commit is recorded under: none for a commit itself or an alias; for a folder also `main`, so
    that its name in `ls` means the commit that was seeded last."""
    if not revision or is_commit(revision):
        return ()
    return (revision, DEFAULT_REVISION) if is_local(repo_id) else (revision,)


def _read_commit(layout: Layout, path: Path) -> str:
    """The commit in one record; empty if there is none."""
    if not tree.is_free_of_links(layout.root, path):
        return ""
    try:
        commit = json.loads(durable.read_file(path))["commit"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return commit if isinstance(commit, str) and is_commit(commit) else ""
