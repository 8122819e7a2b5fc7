"""The manifest: the files of a published snapshot, byte for byte, and their source.

    {"format_version": 1, "repo_id": "org/name", "commit": "…", "dtype": "float16", "created_at": 1790000000,
     "source": {"kind": "hub", "location": "https://huggingface.co", "revision": "main"},
     "block_bytes": 8388608,
     "files": [{"path": "model.safetensors", "size": 123, "sha256": "…", "blocks": "16 hex digits a block",
                "origin": {"size": 246, "sha256": "…"}}],
     "stored_unchanged": "", "remote_code": false, "digest": "…"}

A compressed snapshot has `format_version` 2, so that earlier versions refuse it, and `"compressed": true`; its weights
lie in files such as `model.safetensors.compressed`, whose records say what they hold:

     "plain": {"format_version": 1, "size": 123, "sha256": "…", "blocks": "…", "table": [[3, 4194304, 1527966], …]}

`blocks` are those of the plain bytes, and `table` has an entry for each: see `planes.py`.

Otherwise `blocks` are the XXH3-64 checksums of the file's consecutive blocks, joined; the last block may be short.
`origin` describes the file before conversion and is absent if it was stored as it came. `digest` is the SHA-256 of the
record without itself, so that a flipped bit in the manifest is found like one in a weight. Parsing is strict: an
unknown format, a missing field or an unsafe name is BadManifest (or FormatTooNew), never a guess. Standard library
only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from modelstore.dtypes import DTYPES
from modelstore.errors import BadManifest, FormatTooNew, UnsafeName
from modelstore.reference import is_commit, is_repo_id
from modelstore.volume.block_table import ALIGNMENT, block_lengths, check_entry, stored_length
from modelstore.volume.layout import FORMAT_VERSION, SnapshotKey, check_file_names

BLOCK_BYTES = 8 << 20
CHECKSUM_HEX = 16
COMPRESSED_SUFFIX = ".compressed"
COMPRESSED_FORMAT_VERSION = 2
PLAIN_FORMAT_VERSION = 1  # of the table of a compressed file
_BLOCKS_OF_COMPRESSED = range(1 << 20, (64 << 20) + 1)  # bytes: a reader has memory for several of them

_SHA256 = re.compile(r"[0-9a-f]{64}")
_HEX = re.compile(r"[0-9a-f]*")


@dataclass(frozen=True, slots=True)
class Origin:
    """A converted file as its source had it."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class PlainForm:
    """What a compressed file holds; `table` has an entry of `planes.py` for each of its blocks."""

    size_bytes: int
    sha256: str
    blocks: str
    table: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a snapshot, as it lies on the volume; `blocks` are XXH3-64 checksums in hex, 16 digits a block.

    `plain`: the file that it holds, if it is compressed. `stored`: in a record that `content` makes, the record of the
    compressed file on the volume.
    """

    path: str
    size_bytes: int
    sha256: str
    blocks: str
    origin: Origin | None = None
    plain: PlainForm | None = None
    stored: FileRecord | None = None

    @property
    def original(self) -> Origin:
        """The file as its source had it, converted or not."""
        content = self.content
        return self.origin or Origin(content.size_bytes, content.sha256)

    @property
    def content(self) -> FileRecord:
        """The file that the model has: this one, or the plain form of a compressed one."""
        if self.plain is None:
            return self
        path, plain = self.path.removesuffix(COMPRESSED_SUFFIX), self.plain
        return FileRecord(path, plain.size_bytes, plain.sha256, plain.blocks, self.origin, stored=self)

    @property
    def on_volume(self) -> FileRecord:
        """The file to open: the inverse of `content`."""
        return self.stored or self

    @property
    def table(self) -> tuple[tuple[int, ...], ...]:
        """The table of the file that a content lies in; empty if that is plain."""
        plain = self.on_volume.plain
        return plain.table if plain is not None else ()


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
    def contents(self) -> tuple[FileRecord, ...]:
        """The files as the model has them: see `FileRecord.content`."""
        return tuple(file.content for file in self.files)

    @property
    def plain_bytes(self) -> int:
        """Bytes of all files as the model has them."""
        return sum(file.size_bytes for file in self.contents)

    def has_contents_of(self, other: Manifest) -> bool:
        """Whether both are of the same model's files; how those are stored may differ."""
        contents = ([replace(file, stored=None) for file in each.contents] for each in (self, other))
        return next(contents) == next(contents)

    def is_of(self, other: Manifest) -> bool:
        """Whether both describe one snapshot. A compressed one that was mended may be stored in other bytes."""
        return replace(self, files=()) == replace(other, files=()) and self.has_contents_of(other)

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
            "format_version": COMPRESSED_FORMAT_VERSION if self.key.compressed else FORMAT_VERSION,
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
        if isinstance(version, int) and version > COMPRESSED_FORMAT_VERSION:
            raise FormatTooNew(
                f"{where} has format {version}, this version reads {COMPRESSED_FORMAT_VERSION}: upgrade modelstore"
            )
        digest = record.pop("digest")
        if digest != digest_of(record):
            raise ValueError("its digest does not match")
        manifest = _manifest(record)
        if version != (COMPRESSED_FORMAT_VERSION if manifest.key.compressed else FORMAT_VERSION):
            raise ValueError("its format is not that of its variant")
        return manifest
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
    if file.plain:
        record["plain"] = {
            "format_version": PLAIN_FORMAT_VERSION,
            "size": file.plain.size_bytes,
            "sha256": file.plain.sha256,
            "blocks": file.plain.blocks,
            "table": file.plain.table,
        }
    return record


def _manifest(record: Mapping[str, Any]) -> Manifest:
    key = SnapshotKey(
        _text(record["repo_id"]),
        _text(record["commit"]),
        _text(record["dtype"]),
        _switch(record.get("compressed", False)),
    )
    if not is_repo_id(key.repo_id) or not is_commit(key.commit) or key.dtype not in DTYPES:
        raise ValueError("it names no snapshot")
    block_bytes = _count(record["block_bytes"])
    if block_bytes < ALIGNMENT or block_bytes % ALIGNMENT:  # each block begins at a page of the file, and of memory
        raise ValueError(f"block_bytes is no multiple of {ALIGNMENT}")
    files = tuple(parse_file_record(file, block_bytes) for file in record["files"])
    check_file_names(file.path for file in files)
    check_file_names(file.content.path for file in files)
    if not key.compressed and any(file.plain for file in files):
        raise ValueError("it holds compressed files")
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
    path = _text(record["path"])
    size_bytes, sha256, blocks = _sized(record, path, block_bytes)
    origin = record.get("origin")
    return FileRecord(
        path,
        size_bytes,
        sha256,
        blocks,
        None if origin is None else Origin(_count(origin["size"]), _text(origin["sha256"])),
        None if record.get("plain") is None else _plain_form(record["plain"], path, size_bytes, block_bytes),
    )


def _sized(record: Mapping[str, Any], path: str, block_bytes: int) -> tuple[int, str, str]:
    """Size, SHA-256 and block checksums."""
    size_bytes, sha256, blocks = _count(record["size"]), record["sha256"], record["blocks"]
    expected = -(-size_bytes // block_bytes) * CHECKSUM_HEX
    # A value that is no string is a TypeError of `fullmatch`.
    if not _SHA256.fullmatch(sha256) or not _HEX.fullmatch(blocks) or len(blocks) != expected:
        raise ValueError(f"the digests of {path!r} are not complete")
    return size_bytes, sha256, blocks


def _plain_form(record: Mapping[str, Any], path: str, stored_bytes: int, block_bytes: int) -> PlainForm:
    """What the compressed file `path` holds: its table accounts for each of its `stored_bytes`."""
    version = record["format_version"]
    if isinstance(version, int) and version > PLAIN_FORMAT_VERSION:
        raise FormatTooNew(f"{path} is compressed in format {version}: upgrade modelstore")
    if version != PLAIN_FORMAT_VERSION or not path.endswith(f".safetensors{COMPRESSED_SUFFIX}"):
        raise ValueError(f"{path!r} is no compressed file")
    if block_bytes not in _BLOCKS_OF_COMPRESSED:
        raise ValueError("block_bytes is too small or too large")
    size_bytes, sha256, blocks = _sized(record, path, block_bytes)
    table = tuple(tuple(map(_count, entry)) for entry in record["table"])
    lengths = block_lengths(size_bytes, block_bytes)
    if len(table) != len(lengths):
        raise ValueError(f"the table of {path!r} is not complete")
    for entry, length in zip(table, lengths, strict=True):
        check_entry(entry, length)
    if sum(map(stored_length, table, lengths)) != stored_bytes:
        raise ValueError(f"the table of {path!r} is not that of its bytes")
    return PlainForm(size_bytes, sha256, blocks, table)


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
