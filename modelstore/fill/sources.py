"""Where a model's bytes come from, and which of them a snapshot needs.

A source resolves to one commit, lists that commit's files with what is stated of them, and streams byte ranges of them.
`HubSource` is in `hub.py`; the two here cost no network: a folder (`file://`), whose commit is made from its content,
and an HF cache that already lies on the volume, as RunPod's cached models do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from modelstore.errors import NotFound, RepoNotFound, UnsafeName
from modelstore.reference import Reference, is_commit, local_repo_id
from modelstore.volume import durable
from modelstore.volume.manifest import SourceRecord


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as its source states it: at most one of `sha256` (large files) and `git_oid` (small ones) is known."""

    path: str
    size_bytes: int
    sha256: str | None = None
    git_oid: str | None = None


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a reference resolved to."""

    repo_id: str
    commit: str
    revision: str
    record: SourceRecord

    def for_revision(self, revision: str) -> Resolved:
        """The same commit, as what `revision` stands for."""
        return replace(self, revision=revision, record=replace(self.record, revision=revision))


@dataclass(frozen=True, slots=True)
class ByteStream:
    """Bytes of a file from `offset` on, which may lie before the offset that was asked for.

    `readinto` fills what it is given as far as bytes come at once, and returns how many; 0 at the end.
    """

    offset: int
    readinto: Callable[[memoryview], int]


class Source(Protocol):
    """Anything a snapshot can be filled from."""

    @property
    def over_network(self) -> bool:
        """Whether bytes streamed from here count as downloaded."""

    def resolve(self) -> Resolved:
        """The commit that is wanted now. Raises NotFound, AccessDenied or HubUnavailable."""

    def list_files(self, resolved: Resolved) -> tuple[SourceFile, ...]:
        """Every file of the commit, needed or not."""

    def open(
        self, resolved: Resolved, file: SourceFile, offset: int, length: int
    ) -> AbstractContextManager[ByteStream]:
        """Stream `length` bytes of a file from `offset`. Raises HubUnavailable where trying again may help."""

    def path_of(self, resolved: Resolved, file: SourceFile) -> Path | None:
        """Where the file lies on this host, if it does."""


class LocalFiles:
    """Files of this host under their names in a repo; the commit is a digest of the names and bytes, so equal ones are
    one snapshot."""

    over_network = False

    def __init__(self, repo_id: str, revision: str, location: str, paths: Mapping[str, Path]) -> None:
        """`revision`: what the commit is recorded as; `location`: where the files came from, for the manifest."""
        self._repo_id = repo_id
        self._revision = revision
        self._location = location
        self._paths = paths
        self._files: tuple[SourceFile, ...] = ()

    def resolve(self) -> Resolved:
        """Reads every file once: the content is the identity."""
        digest = hashlib.sha256()
        self._files = tuple(
            SourceFile(name, path.stat().st_size, sha256=_sha256_of(path)) for name, path in sorted(self._paths.items())
        )
        for file in self._files:
            digest.update(f"{file.path}\0{file.size_bytes}\0{file.sha256}\0".encode("utf-8", "surrogateescape"))
        record = SourceRecord(kind="file", location=self._location, revision="")
        return Resolved(self._repo_id, digest.hexdigest()[:40], self._revision, record)

    def list_files(self, resolved: Resolved) -> tuple[SourceFile, ...]:
        """The files as `resolve` read them: one that changes afterwards does not match and is refused."""
        return self._files

    def open(
        self, resolved: Resolved, file: SourceFile, offset: int, length: int
    ) -> AbstractContextManager[ByteStream]:
        return stream_of(self._paths[file.path], offset, length)

    def path_of(self, resolved: Resolved, file: SourceFile) -> Path | None:
        return self._paths[file.path]


class FolderSource(LocalFiles):
    """A local folder (`file://`)."""

    def __init__(self, reference: Reference) -> None:
        self._folder = Path(reference.name)
        self._reference = reference
        super().__init__(local_repo_id(reference), reference.name, self._folder.name, {})

    def resolve(self) -> Resolved:
        """Reads every file once: the content is the identity."""
        if not self._folder.is_dir():
            raise NotFound(f"{self._reference} is not a folder: give the folder that holds the model's files")
        self._paths = files_below(self._folder)
        return super().resolve()


class HfCacheSource:
    """A model in an HF cache on the volume: `models--org--name/{refs,snapshots,blobs}`.

    The cache names its blobs by their digests, with which all that is stored from here is compared; that they are those
    of the commit is for the Hub to confirm (`hub.confirmed`). A cache whose download was cut short, or whose files are
    no links to blobs, is not `whole`, and the Hub is asked.
    """

    over_network = False

    def __init__(self, cache: Path, reference: Reference) -> None:
        self._repo = cache / f"models--{reference.name.replace('/', '--')}"
        self._reference = reference

    def resolve(self) -> Resolved:
        revision = self._reference.revision
        commit = revision
        if not is_commit(revision):
            try:
                commit = durable.read_file(self._repo / "refs" / revision).decode(errors="replace").strip()
            except OSError:
                commit = ""
        if not is_commit(commit) or not (self._repo / "snapshots" / commit).is_dir():
            raise RepoNotFound(f"{self._reference} is not in the HF cache at {self._repo.parent}: seed it from the Hub")
        record = SourceRecord(kind="hf-cache", location=self._repo.parent.name, revision=revision)
        return Resolved(self._reference.name, commit, revision, record)

    def whole(self) -> Resolved | None:
        """What the cache holds of the revision, if no part of a model can be missing and all can be verified."""
        try:
            resolved = self.resolve()
        except NotFound:
            return None
        files = {file.path: file for file in self.list_files(resolved)}
        if any((self._repo / "blobs").glob("*.incomplete")) or "config.json" not in files:
            return None
        if not all(file.sha256 or file.git_oid for file in files.values()):
            return None
        if "model.safetensors" in files:
            return resolved
        index = files.get("model.safetensors.index.json")
        if index is None:
            return None
        with self.open(resolved, index, 0, index.size_bytes) as stream:
            try:
                shards = set(json.loads(read_all(stream, index.size_bytes))["weight_map"].values())
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                return None
        return resolved if shards <= files.keys() else None

    def list_files(self, resolved: Resolved) -> tuple[SourceFile, ...]:
        folder = self._repo / "snapshots" / resolved.commit
        found = []
        for parent, _folders, names in os.walk(folder):
            for name in names:
                path = Path(parent, name)
                blob = self._inside(path)
                if blob.is_file():
                    sha256 = blob.name if len(blob.name) == 64 and blob.parent.name == "blobs" else None
                    git_oid = blob.name if len(blob.name) == 40 and blob.parent.name == "blobs" else None
                    found.append(SourceFile(str(path.relative_to(folder)), blob.stat().st_size, sha256, git_oid))
        return tuple(sorted(found, key=lambda file: file.path))

    def open(
        self, resolved: Resolved, file: SourceFile, offset: int, length: int
    ) -> AbstractContextManager[ByteStream]:
        return stream_of(self.path_of(resolved, file), offset, length)

    def path_of(self, resolved: Resolved, file: SourceFile) -> Path:
        return self._inside(self._repo / "snapshots" / resolved.commit / file.path)

    def _inside(self, path: Path) -> Path:
        """`path` with its links followed, as long as they stay in this repo's folder."""
        real = path.resolve()
        if not real.is_relative_to(self._repo.resolve()):
            raise UnsafeName(f"{path} is a link that leaves its HF cache: it is refused")
        return real


def files_below(folder: Path) -> dict[str, Path]:
    """Regular files below a folder under their relative names, sorted; links and hidden folders are left out."""
    found = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in names):
            if path.is_file() and not path.is_symlink():
                found[str(path.relative_to(folder))] = path
    return dict(sorted(found.items()))


@contextmanager
def stream_of(path: Path, offset: int, length: int) -> Iterator[ByteStream]:
    """The bytes of a file from `offset` on."""
    with os.fdopen(durable.open_for_read(path), "rb", buffering=0) as file:
        file.seek(offset)
        yield ByteStream(offset, file.readinto)


def read_all(stream: ByteStream, length: int) -> bytes:
    """`length` bytes of a stream, fewer where it ends before."""
    buffer = memoryview(bytearray(length))
    done = 0
    while done < length and (count := stream.readinto(buffer[done:])):
        done += count
    return bytes(buffer[:done])


def _sha256_of(path: Path) -> str:
    with os.fdopen(durable.open_for_read(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
