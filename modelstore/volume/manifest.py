"""The manifest: the files of a published snapshot, byte for byte, and their source.

    {"format_version": 1, "repo_id": "org/name", "commit": "…", "dtype": "float16", "created_at": 1790000000,
     "source": {"kind": "hub", "location": "https://huggingface.co", "revision": "main"},
     "block_bytes": 8388608,
     "files": [{"path": "model.safetensors", "size": 123, "sha256": "…", "blocks": "16 hex digits a block",
                "origin": {"size": 246, "sha256": "…"}}],
     "stored_unchanged": "", "remote_code": false, "digest": "…"}

`blocks` are the XXH3-64 checksums of the file's consecutive blocks, joined; the last block may be short. `origin` says
describes the file before conversion and is absent if it was stored as it came. `digest` is the SHA-256 of the record
without itself, so that a flipped bit in the manifest is found like one in a weight. Parsing is strict: an unknown
format, a missing field or an unsafe name is BadManifest (or FormatTooNew), never a guess. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelstore.dtypes import DTYPES
from modelstore.errors import BadManifest, FormatTooNew, UnsafeName
from modelstore.reference import is_commit, is_repo_id
from modelstore.volume.layout import FORMAT_VERSION, SnapshotKey, check_file_names

BLOCK_BYTES = 8 << 20
CHECKSUM_HEX = 16

_SHA256 = re.compile(r"[0-9a-f]{64}")
_HEX = re.compile(r"[0-9a-f]*")


@dataclass(frozen=True, slots=True)
class Origin:
    """A converted file as its source had it."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a snapshot; `blocks` are XXH3-64 checksums in hex, 16 digits a block."""

    path: str
    size_bytes: int
    sha256: str
    blocks: str
    origin: Origin | None = None

    @property
    def original(self) -> Origin:
        """The file as its source had it, converted or not."""
        return self.origin or Origin(self.size_bytes, self.sha256)


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """The source of a snapshot; `location` is an endpoint's address without secrets, or a folder.

    `compared_with`: the statement that its files were compared with before they were stored: "hub", the Hub's listing
    of the commit; "cache", the names that an HF cache gives its files, which say nothing of the Hub; empty for a
    folder, and in manifests of earlier versions.
    """

    kind: str
    location: str
    revision: str
    compared_with: str = ""

    @property
    def label(self) -> str:
        """The source in words."""
        return {"file": f"the folder {self.location}", "hf-cache": "an HF cache on this volume"}.get(
            self.kind, self.location
        )

    def as_json(self) -> dict[str, str]:
        """The record as it stands in a manifest."""
        record = {"kind": self.kind, "location": self.location, "revision": self.revision}
        return record | ({"compared_with": self.compared_with} if self.compared_with else {})


@dataclass(frozen=True, slots=True)
class Manifest:
    """The record of one snapshot. `stored_unchanged` says why nothing was converted, and is empty if it was;
    `remote_code` that its configs name code that the repo brings, which was allowed."""

    key: SnapshotKey
    created_at: int
    source: SourceRecord
    files: tuple[FileRecord, ...]
    stored_unchanged: str = ""
    remote_code: bool = False
    block_bytes: int = BLOCK_BYTES

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, without the manifest's own."""
        return sum(file.size_bytes for file in self.files)

    @property
    def paths(self) -> frozenset[str]:
        """The files of the snapshot."""
        return frozenset(file.path for file in self.files)

    def file(self, path: str) -> FileRecord | None:
        """The record of one file, if the snapshot holds it."""
        return next((file for file in self.files if file.path == path), None)

    def encode(self) -> bytes:
        """The manifest's bytes; equal records give equal bytes."""
        record = {
            "format_version": FORMAT_VERSION,
            **self.key.as_json(),
            "created_at": self.created_at,
            "source": self.source.as_json(),
            "block_bytes": self.block_bytes,
            "files": [file_as_json(file) for file in self.files],
            "stored_unchanged": self.stored_unchanged,
            "remote_code": self.remote_code,
        }
        return json.dumps(record | {"digest": digest_of(record)}, indent=1).encode() + b"\n"


def parse_manifest(data: bytes, *, where: str) -> Manifest:
    """Parse and check a manifest; `where` names it in errors. Raises BadManifest or FormatTooNew."""
    try:
        record = json.loads(data)
        if not isinstance(record, dict):
            raise TypeError("not an object")
        version = record["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise FormatTooNew(f"{where} has format {version}, this version reads {FORMAT_VERSION}: upgrade modelstore")
        digest = record.pop("digest")
        if version != FORMAT_VERSION or digest != digest_of(record):
            raise ValueError("its digest does not match")
        return _manifest(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UnsafeName) as error:
        raise BadManifest(f"{where} is damaged ({error}): remove the snapshot and seed it again") from error


def digest_of(record: Mapping[str, Any]) -> str:
    """The SHA-256 of a JSON record, written with sorted keys and no white space."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_as_json(file: FileRecord) -> dict[str, Any]:
    """One file's record, ready for `json.dumps`."""
    record: dict[str, Any] = {
        "path": file.path,
        "size": file.size_bytes,
        "sha256": file.sha256,
        "blocks": file.blocks,
    }
    if file.origin:
        record["origin"] = {"size": file.origin.size_bytes, "sha256": file.origin.sha256}
    return record


def _manifest(record: Mapping[str, Any]) -> Manifest:
    key = SnapshotKey(_text(record["repo_id"]), _text(record["commit"]), _text(record["dtype"]))
    if not is_repo_id(key.repo_id) or not is_commit(key.commit) or key.dtype not in DTYPES:
        raise ValueError("it names no snapshot")
    block_bytes = _count(record["block_bytes"])
    if block_bytes < 4096:
        raise ValueError("block_bytes is too small")
    files = tuple(parse_file_record(file, block_bytes) for file in record["files"])
    check_file_names(file.path for file in files)
    source = record["source"]
    return Manifest(
        key=key,
        created_at=_count(record["created_at"]),
        source=SourceRecord(
            _text(source["kind"]),
            _text(source["location"]),
            _text(source["revision"]),
            _text(source.get("compared_with", "")),
        ),
        files=files,
        stored_unchanged=_text(record["stored_unchanged"]),
        remote_code=_switch(record["remote_code"]),
        block_bytes=block_bytes,
    )


def parse_file_record(record: Mapping[str, Any], block_bytes: int) -> FileRecord:
    """The inverse of `file_as_json`. Raises KeyError, TypeError or ValueError; names are checked by the caller."""
    path, size_bytes, sha256, blocks = _text(record["path"]), _count(record["size"]), record["sha256"], record["blocks"]
    expected = -(-size_bytes // block_bytes) * CHECKSUM_HEX
    # A value that is no string is a TypeError of `fullmatch`.
    if not _SHA256.fullmatch(sha256) or not _HEX.fullmatch(blocks) or len(blocks) != expected:
        raise ValueError(f"the digests of {path!r} are not complete")
    if (origin := record.get("origin")) is None:
        return FileRecord(path, size_bytes, sha256, blocks)
    return FileRecord(path, size_bytes, sha256, blocks, Origin(_count(origin["size"]), _text(origin["sha256"])))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is not true or false")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r} is not a size")
    return value
