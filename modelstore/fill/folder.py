"""A folder of this host as a source (`file://`): its content is its commit, so equal folders are one snapshot."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from modelstore.errors import NotFound, UnsafeName
from modelstore.fill.components import MODULES_INDEX, PIPELINE_INDEX
from modelstore.fill.repo_files import is_small, is_weights
from modelstore.fill.source import ByteStream, Resolved, Source, SourceFile, stream_of
from modelstore.reference import Reference, local_repo_id
from modelstore.settings import Settings
from modelstore.volume import durable
from modelstore.volume.manifest import SourceRecord


class LocalFiles(Source):
    """Files of this host under their names in a repo; the commit is a digest of the names and bytes, so equal ones are
    one snapshot."""

    over_network = False
    replaces_recorded_commit = True

    def __init__(self, repo_id: str, revision: str, location: str, paths: Mapping[str, Path]) -> None:
        """`revision`: the name that the commit is recorded under; `location`: the origin of the files, for the
        manifest."""
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

    def reach(self) -> str:
        return "is a folder"

    def may_bring_code(self, resolved: Resolved, settings: Settings, *, named: Reference | None) -> bool:
        return settings.trust_remote_code  # a person named the folder

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
        self.reach()
        self._paths = files_below(self._folder)
        return super().resolve()

    def reach(self) -> str:
        if (self._folder / "snapshots").is_dir() and self._folder.name.startswith("models--"):
            raise NotFound(
                f"{self._reference} is a repo in an HF cache: give one of its folders snapshots/COMMIT, or run "
                f"`modelstore adopt {self._folder}`"
            )
        if not self._folder.is_dir():
            raise NotFound(f"{self._reference} is not a folder: give the folder that holds the model's files")
        return super().reach()


def files_below(folder: Path) -> dict[str, Path]:
    """Regular files below a folder under their relative names, sorted, without hidden folders.

    Links are followed if they stay in the HF cache that the folder is a snapshot of. Raises UnsafeName for another link
    to a file that a model needs; links to anything else are left out.
    """
    cache = _cache_around(folder)
    has_parts = any((folder / name).is_file() for name in (PIPELINE_INDEX, MODULES_INDEX))
    paths = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in (*names, *folders)):
            if path.is_symlink() and not (cache is not None and Path(os.path.realpath(path)).is_relative_to(cache)):
                name = str(path.relative_to(folder))
                is_needed_file = is_weights(name) or is_small(SourceFile(name, 0))
                if has_parts if path.name in folders else is_needed_file:
                    raise UnsafeName(
                        f"{path} is a link, and links are not followed: give the folder that holds the files "
                        f"themselves, or a copy of this one with them (cp -rL {folder} COPY)"
                    )
            elif path.is_file():
                paths[str(path.relative_to(folder))] = Path(os.path.realpath(path)) if cache is not None else path
    return dict(sorted(paths.items()))


def _cache_around(folder: Path) -> Path | None:
    """The repo's folder in an HF cache that `folder` is a snapshot of, or None: models--org--name/snapshots/commit."""
    real = Path(os.path.realpath(folder))
    repo = real.parent.parent
    return repo if real.parent.name == "snapshots" and repo.name.startswith("models--") else None


def _sha256_of(path: Path) -> str:
    with os.fdopen(durable.open_for_read(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
