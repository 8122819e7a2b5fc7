"""Every path on the volume, and the names that may become one. No I/O.

    <root>/
      FORMAT                                         "1"
      read-rate.json                                 the measured read rate (preferred_form.py)
      models/<org>--<name>/<commit>.<dtype>/         a published snapshot: the model's files and manifest.json
      models/<org>--<name>/<commit>.<dtype>.compressed/    the same, its weights compressed; so everywhere below
      staging/<org>--<name>/<commit>.<dtype>/<generation>-<random>/
        source/<file>                                bytes as the source has them, partial
        journal/<file>/<segment>[.open]              which granules of it are there (staged_file.py)
        snapshot/<file>                              the files to publish
        done/<file>                                  the record of a finished file (staging.py)
      engine-caches/<org>--<name>/<commit>.<dtype>/<key>/   an engine's compiled code (engine_caches.py)
      claims/<org>--<name>/<commit>.<dtype>/<generation>
      claims/space/<generation>                      the process that counts the space and evicts (space.py)
      refs/<org>--<name>/<revision>.json             the commit this fleet uses for a revision
      pins/<org>--<name>/<commit>.<dtype>.json       a person's pin
      used/<org>--<name>/<commit>.<dtype>/<worker>   empty; its mtime is that worker's last use (pins.py)
      aliases/<name>.json                            the snapshots that an alias has pointed to (aliases.py)
      starts/<day>/<at>.<worker>.<random>.json       the record of a start (history.py)
      events/<day>/<at>.<kind>.<random>.json         the record of an eviction or a quarantine
      verified/<org>--<name>/<commit>.<dtype>.json   how far a sampled or time-boxed verify came
      quarantine/ trash/                             <org>--<name>--<commit>.<dtype>.<8 hex digits>

Paths are built from checked names only, so nothing that a repo or a manifest says can lead outside.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from modelstore.dtypes import DTYPES
from modelstore.errors import UnsafeName
from modelstore.reference import is_commit, is_repo_id

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

_MAX_COMPONENT_BYTES = 240  # 255 less our own suffixes
_MAX_PATH_BYTES = 1024
_MAX_REF_CHARACTERS = 200
_DEVICE_NAMES = frozenset(
    ["con", "prn", "aux", "nul", *(f"com{i}" for i in range(10)), *(f"lpt{i}" for i in range(10))]
)
_COMPRESSED = "compressed"
_ASIDE = re.compile(
    rf"(?:.+--[0-9a-f]{{40}}\.(?:{'|'.join(map(re.escape, DTYPES))})(?:\.{_COMPRESSED})?\.|doctor-)[0-9a-f]{{8}}"
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_DRIVE = re.compile(r"[A-Za-z]:")


def check_file_name(name: str) -> str:
    """Return `name` if it is a plain relative POSIX path that may lie in a snapshot, else raise UnsafeName.

    Refused: absolute paths, `..`, `.` and empty components, back-slashes, drive letters, control characters, names
    that do not encode, too long ones, device names of Windows, and `manifest.json`, which is ours.
    """
    problem = _file_name_problem(name) if 0 < len(name) <= _MAX_PATH_BYTES else "is empty or too long"
    if problem:
        raise UnsafeName(f"the file name {name[:120]!r} is refused: it {problem}")
    return name


@lru_cache(4096)  # 1,000 snapshots have 20,000 files with a few hundred names
def _file_name_problem(name: str) -> str:
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if len(encoded) > _MAX_PATH_BYTES:
        return "is too long"
    if _CONTROL.search(name):
        return "holds control characters"
    if name.startswith("/") or "\\" in name or _DRIVE.match(name):
        return "is not a plain relative path"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return "could leave its folder"
        if len(part.encode()) > _MAX_COMPONENT_BYTES:
            return "is too long"
        if part.split(".")[0].lower() in _DEVICE_NAMES:
            return "is a device's name"
    if name.split("/")[0].lower() == MANIFEST:
        return "is the manifest's own"
    return ""


def check_file_names(names: Iterable[str]) -> None:
    """Check each name, and that no two are one but for case, or a file and a folder at once."""
    by_folded: dict[str, str] = {}
    folders: set[str] = set()
    for name in names:
        check_file_name(name)
        if (folded := name.casefold()) in by_folded:
            raise UnsafeName(
                f"the file names {by_folded[folded]!r} and {name!r} are refused: they differ in case at most"
            )
        by_folded[folded] = name
        if "/" in name:
            parts = name.casefold().split("/")
            folders.update("/".join(parts[:i]) for i in range(1, len(parts)))
    both = folders & by_folded.keys()
    if both:
        raise UnsafeName(f"the file name {min(both)!r} is refused: it is a file and a folder at once")


@dataclass(frozen=True, slots=True, order=True)
class SnapshotKey:
    """The name of a snapshot: one commit of one repo in one variant, which is a storage dtype, plain or compressed."""

    repo_id: str
    commit: str
    dtype: str
    compressed: bool = False

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.commit[:12]} ({self.dtype}{', compressed' if self.compressed else ''})"

    def as_json(self) -> dict[str, Any]:
        """The key as it begins every JSON record about a snapshot."""
        record: dict[str, Any] = {"repo_id": self.repo_id, "commit": self.commit, "dtype": self.dtype}
        return record | ({"compressed": True} if self.compressed else {})

    @property
    def parts(self) -> tuple[str, str]:
        """The two path components: `org--name`, and `commit.dtype` or `commit.dtype.compressed`."""
        suffix = f".{_COMPRESSED}" if self.compressed else ""
        return repo_folder(self.repo_id), f"{self.commit}.{self.dtype}{suffix}"

    @property
    def twin(self) -> SnapshotKey:
        """The same weights, compressed if these are plain, and the other way round."""
        return replace(self, compressed=not self.compressed)

    @property
    def plain(self) -> SnapshotKey:
        """The same weights, plain: the key by which aliases, pins and compiled code know both forms."""
        return replace(self, compressed=False)


def repo_folder(repo_id: str) -> str:
    """`org/name` as one path component."""
    return repo_id.replace("/", "--", 1)


def key_from_parts(folder: str, variant: str) -> SnapshotKey | None:
    """The key that two path components name, or None if they name none."""
    org, dashes, name = folder.partition("--")
    commit, dot, form = variant.partition(".")
    dtype, has_suffix, suffix = form.partition(".")
    repo_id = f"{org}/{name}"
    if not (dashes and dot and is_repo_id(repo_id) and is_commit(commit) and dtype in DTYPES):
        return None
    if has_suffix and suffix != _COMPRESSED:
        return None
    return SnapshotKey(repo_id, commit, dtype, bool(has_suffix))


def is_aside(name: str) -> bool:
    """Whether the store, or its doctor, gave this name to something in the trash or the quarantine."""
    return _ASIDE.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths under one root."""

    root: Path

    @property
    def format_file(self) -> Path:
        return self.root / "FORMAT"

    @property
    def read_rate(self) -> Path:
        return self.root / "read-rate.json"

    @property
    def models(self) -> Path:
        return self.root / "models"

    def snapshot(self, key: SnapshotKey) -> Path:
        return self.root.joinpath("models", *key.parts)

    def staging(self, key: SnapshotKey) -> Path:
        return self.root.joinpath("staging", *key.parts)

    @property
    def engine_caches(self) -> Path:
        return self.root / "engine-caches"

    def engine_caches_of(self, key: SnapshotKey) -> Path:
        """The folder of all compiled code for a snapshot and its twin (engine_caches.py)."""
        return self.engine_caches.joinpath(*key.plain.parts)

    def claims(self, key: SnapshotKey) -> Path:
        return self.root.joinpath("claims", *key.parts)

    @property
    def space_claim(self) -> Path:
        return self.root / "claims" / "space"

    @property
    def pins(self) -> Path:
        return self.root / "pins"

    def pin(self, key: SnapshotKey) -> Path:
        """The record of a person's pin, which holds for a snapshot and its twin."""
        repo, variant = key.plain.parts
        return self.pins / repo / f"{variant}.json"

    def used(self, key: SnapshotKey) -> Path:
        """The folder of the marks that workers leave on a snapshot."""
        return self.root.joinpath("used", *key.parts)

    def verified(self, key: SnapshotKey) -> Path:
        repo, variant = key.parts
        return self.root / "verified" / repo / f"{variant}.json"

    @property
    def aliases(self) -> Path:
        return self.root / "aliases"

    def alias(self, name: str) -> Path:
        return self.aliases / f"{name}.json"

    @property
    def starts(self) -> Path:
        """The records of the fleet's starts, a folder for each day."""
        return self.root / "starts"

    @property
    def events(self) -> Path:
        """The records of events, a folder for each day."""
        return self.root / "events"

    @property
    def trash(self) -> Path:
        return self.root / "trash"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine"

    def aside(self, folder: Path, key: SnapshotKey) -> Path:
        """A new name for the snapshot `key` in `folder`, the trash or the quarantine."""
        return folder / f"{'--'.join(key.parts)}.{secrets.token_hex(4)}"

    def refs(self, repo_id: str) -> Path:
        return self.root / "refs" / repo_folder(repo_id)

    def ref(self, repo_id: str, revision: str) -> Path:
        """The record of the commit that `revision` was last resolved to and published at."""
        name = quote(revision, safe="")
        if len(name) > _MAX_REF_CHARACTERS:
            name = f"sha256-{hashlib.sha256(revision.encode()).hexdigest()}"
        return self.refs(repo_id) / f"{name}.json"


@dataclass(frozen=True, slots=True)
class StagingLayout:
    """The paths under the staging folder of one generation; `name` is a checked file name."""

    folder: Path

    @property
    def done(self) -> Path:
        return self.folder / "done"

    @property
    def snapshot(self) -> Path:
        return self.folder / "snapshot"

    def source_file(self, name: str) -> Path:
        return self.folder / "source" / name

    def journal(self, name: str) -> Path:
        """The folder of a file's journal."""
        return self.folder / "journal" / name

    def snapshot_file(self, name: str) -> Path:
        return self.snapshot / check_file_name(name)

    def done_file(self, name: str) -> Path:
        return self.done / f"{name}.json"
