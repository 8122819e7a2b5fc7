"""The interface of a source: it resolves to one commit, lists the files of that commit, and streams byte ranges.

The sources are in `folder.py`, `hf_cache.py` and `hub.py`; `sources.py` says which of them answers a reference.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from modelstore.reference import Reference
from modelstore.settings import Settings
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
    """A reference, resolved to a commit."""

    repo_id: str
    commit: str
    revision: str
    record: SourceRecord

    def for_revision(self, revision: str) -> Resolved:
        """The same commit, as the answer for `revision`."""
        return replace(self, revision=revision, record=replace(self.record, revision=revision))


@dataclass(frozen=True, slots=True)
class ByteStream:
    """Bytes of a file from `offset` on, which may lie before the offset that was asked for.

    `readinto` fills the buffer as far as bytes come at once, and returns how many; 0 at the end.
    """

    offset: int
    readinto: Callable[[memoryview], int]


class Source(ABC):
    """Anything that a snapshot can be filled from."""

    over_network: bool
    """Whether bytes streamed from here count as downloaded."""

    replaces_recorded_commit = False
    """Whether an adopted commit replaces the one that the fleet used before."""

    is_copy = False
    """Whether it holds a copy of files that the next source has: if they are damaged, that one is asked."""

    @property
    def label(self) -> str:
        """The source's name in messages, with its place."""
        return type(self).__name__

    def lacks(self, resolved: Resolved, stated: Mapping[str, SourceFile]) -> str:
        """A file that a snapshot of the commit needs and a copy has not, of those that the Hub states; empty if it has
        all of them."""
        return ""

    @abstractmethod
    def resolve(self) -> Resolved:
        """The commit that the reference stands for now. Raises NotFound, AccessDenied or HubUnavailable."""

    def offer(self) -> Resolved | None:
        """The commit, if this source can fill a snapshot of it; None if the next source has to be asked."""
        return self.resolve()

    @abstractmethod
    def reach(self) -> str:
        """A phrase that says that the model is here, for the doctor; empty if the next source has to be asked. Reads no
        weights. Raises the errors of `resolve`."""

    def confirmed(self, resolved: Resolved) -> Resolved | None:
        """`resolved` once its publisher confirms the files; None if the publisher states other files."""
        return resolved

    @abstractmethod
    def may_bring_code(self, resolved: Resolved, settings: Settings, *, named: Reference | None) -> bool:
        """Whether the Python files of the commit may be stored. `named`: the reference that the caller gave."""

    @abstractmethod
    def list_files(self, resolved: Resolved) -> tuple[SourceFile, ...]:
        """Every file of the commit, needed or not."""

    @abstractmethod
    def open(
        self, resolved: Resolved, file: SourceFile, offset: int, length: int
    ) -> AbstractContextManager[ByteStream]:
        """Stream `length` bytes of a file from `offset`. Raises HubUnavailable if trying again may help."""

    def path_of(self, resolved: Resolved, file: SourceFile) -> Path | None:
        """The file on this host; None if it is elsewhere."""
        return None

    def read(self, resolved: Resolved, file: SourceFile) -> bytes:
        """The bytes of a small file."""
        with self.open(resolved, file, 0, file.size_bytes) as stream:
            return read_all(stream, file.size_bytes)


def backoff_s(attempt: int, retry_after_s: float | None) -> float:
    """How long to wait before the next attempt (1 after the first): the server's own time, else 0.5 s doubling."""
    return min(retry_after_s if retry_after_s is not None else 0.5 * 2 ** (attempt - 1), 120.0)


@contextmanager
def stream_of(path: Path, offset: int, length: int) -> Iterator[ByteStream]:
    """The bytes of a file from `offset` on."""
    with os.fdopen(durable.open_for_read(path), "rb", buffering=0) as file:
        file.seek(offset)
        yield ByteStream(offset, file.readinto)


def read_all(stream: ByteStream, length: int) -> bytes:
    """`length` bytes of a stream, fewer if it ends before."""
    buffer = memoryview(bytearray(length))
    position = 0
    while position < length and (count := stream.readinto(buffer[position:])):
        position += count
    return bytes(buffer[:position])
