"""Where a store lies: in a folder, or on a volume that is reached over RunPod's S3 API. Paths are relative to the root.

A copy from one place to another reads and writes through this interface alone, so that each pair of places is the same
to it.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

from modelstore.errors import IntegrityError, RootUnusable, UsageError
from modelstore.fill.bucket import Bucket, Target, parse_target
from modelstore.settings import Settings
from modelstore.volume import durable, tree


class StoreRoot(ABC):
    """One store's root. `label`: for a person."""

    label: str

    @abstractmethod
    def read(self, path: str) -> bytes | None:
        """A small file's bytes; None if there is none."""

    @abstractmethod
    def part(self, path: str, start: int, length: int) -> bytes:
        """So many bytes of a file from `start` on; fewer if it ends before. Raises ModelStoreError, OSError."""

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Write a small file whole."""

    @abstractmethod
    def write_if_new(self, path: str, data: bytes) -> bool:
        """The same unless it is there; whether it was written."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """The names in a folder, sorted; none if it does not exist."""


class FolderRoot(StoreRoot):
    """A store in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.label = str(root)

    def read(self, path: str) -> bytes | None:
        tree.check_no_links(self.root, self.root / path)
        return durable.read_record(self.root / path, durable.MANIFEST_BYTES)

    def part(self, path: str, start: int, length: int) -> bytes:
        place = self.root / path
        try:
            with durable.opened(place) as fd:
                return os.pread(fd, length, start)
        except OSError as error:
            raise tree.unreadable(error, place) from error

    def write(self, path: str, data: bytes) -> None:
        tree.check_no_links(self.root, self.root / path)
        durable.write_atomic(self.root / path, data)

    def write_if_new(self, path: str, data: bytes) -> bool:
        if self.read(path) is not None:
            return False
        self.write(path, data)
        return True

    def names(self, folder: str) -> list[str]:
        return tree.names(self.root / folder)


class BucketRoot(StoreRoot):
    """A store on a network volume, over S3."""

    def __init__(self, target: Target, *, endpoint: str | None) -> None:
        """Raises NotFound without boto3, AccessDenied without keys."""
        self.target = target
        self.bucket = Bucket(target, endpoint=endpoint)
        self.label = str(target)

    def read(self, path: str) -> bytes | None:
        key = self._key(path)
        if (size := self.bucket.size(key)) is None:
            return None
        if size > durable.MANIFEST_BYTES:
            raise IntegrityError(f"{key} at {self.label} has {size} bytes, which no record of a store has: remove it")
        return self.bucket.read(key)

    def part(self, path: str, start: int, length: int) -> bytes:
        return self.bucket.body(self._key(path), start, start + length - 1) if length else b""

    def write(self, path: str, data: bytes) -> None:
        self.bucket.put(self._key(path), data)

    def write_if_new(self, path: str, data: bytes) -> bool:
        return self.read(path) is None and self.bucket.put_if_new(self._key(path), data)

    def names(self, folder: str) -> list[str]:
        prefix = f"{self._key(folder)}/"
        names: set[str] = set()
        for key in self.bucket.listed(prefix):
            names.add(key.removeprefix(prefix).rstrip("/"))
        return sorted(names - {""})

    def _key(self, path: str) -> str:
        return f"{self.target.folder}/{path}"


def parse_store_root(text: str, settings: Settings) -> StoreRoot:
    """The place that a person names: `s3://VOLUME@DATACENTER`, or the full path of a store's folder.

    Raises UsageError, and RootUnusable if there is no such folder, nor one that it could be made in.
    """
    if text.startswith("s3://"):
        return BucketRoot(parse_target(text), endpoint=settings.s3_endpoint)
    path = Path(text)
    if not path.is_absolute():
        raise UsageError(f"{text!r} is no place of a store: write s3://VOLUME@DATACENTER, or the full path of a folder")
    if not path.parent.is_dir():
        raise RootUnusable(f"there is no folder {path.parent}: mount the volume, or name another place")
    return FolderRoot(path)
