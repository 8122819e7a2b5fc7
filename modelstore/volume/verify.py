"""Whether a snapshot still is as its manifest says: offline, whole or a sample, at once or in parts.

Blocks are counted over all files of a snapshot. A sample of 1/20 compares the blocks r, r + 20, r + 40, … and the next
run takes the next r, so that twenty runs have compared every byte. The position that a run reached is kept beside the
snapshot (`verified/`), so that the next run continues there. The first problem is kept there, too, until the snapshot
is made again or a whole run finds nothing. Names, sizes and foreign files are compared in every run. Bytes come from
the volume: this machine's page cache of a file is dropped first.
"""

from __future__ import annotations

import json
import operator
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelstore.errors import BadManifest, FormatTooNew, ModelStoreError, UsageError
from modelstore.units import printable
from modelstore.volume import durable, tree
from modelstore.volume.checksums import block_count, has_block, wrong_content
from modelstore.volume.layout import MANIFEST, Layout, SnapshotKey
from modelstore.volume.manifest import FileRecord, Manifest, parse_manifest
from modelstore.volume.snapshots import Snapshot

_SAVE_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One file that is not as the manifest has it."""

    path: str
    problem: str
    foreign: bool = False  # a file that does not belong, and is never read


@dataclass(frozen=True, slots=True)
class Position:
    """The position of a verification: `done` of the blocks whose number is `first` modulo `stride` were compared."""

    stride: int = 1
    first: int = 0
    done: int = 0


@dataclass(frozen=True, slots=True)
class Verified:
    """The result of one run. `compared` of `planned` bytes were read; the next run goes on at `position`."""

    findings: tuple[Finding, ...]
    compared: int = 0
    planned: int = 0
    position: Position = Position()

    @property
    def ok(self) -> bool:
        return not self.findings

    @property
    def intact(self) -> bool:
        """Whether the files that the manifest names are as it says."""
        return all(finding.foreign for finding in self.findings)

    @property
    def complete(self) -> bool:
        """Whether the run compared all that it planned to."""
        return self.compared == self.planned


def parse_sample(text: str) -> int:
    """`1/20`, `5%` or `0.05` as 20: one block of how many. Raises UsageError."""
    match = re.fullmatch(r"1/(\d{1,6})", text.strip())
    try:
        number = text.strip()
        share = float(number[:-1]) / 100 if number.endswith("%") else float(number) if not match else 1.0
        stride = int(match[1]) if match else round(1 / share) if 0 < share <= 1 else 0
    except (ValueError, OverflowError):
        stride = 0
    if not 1 <= stride <= 1_000_000:
        raise UsageError(f"--sample {text!r} is no sample: write it like 1/20 or 5%")
    return stride


def verify_snapshot(snapshot: Snapshot) -> Verified:
    """`verify_folder` for a snapshot that was found, every byte of it."""
    return verify_folder(snapshot.path, snapshot.key)


def is_as_published(snapshot: Snapshot, verified: Verified | None = None) -> bool:
    """Whether all files read back as they were published; of compressed ones also the files that they hold, which
    `verify_snapshot` does not decode. `verified`: the result of that, if it is known."""
    verified = verified or verify_snapshot(snapshot)
    return verified.intact and not (snapshot.key.compressed and wrong_bytes(snapshot.path, snapshot.key))


def wrong_bytes(folder: Path, key: SnapshotKey) -> str:
    """Which bytes of a snapshot's folder were read and are wrong, or that it holds what no store puts there: links,
    pipes; empty if neither is so.

    Files that are missing, cut or unreadable are not told: this host's view of a folder may be older than the folder.
    """
    if folder.is_symlink() or not folder.is_dir():
        return "it is no folder"
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            try:
                mode = os.lstat(os.path.join(parent, name)).st_mode
            except OSError:
                continue
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                return f"{printable(name)} is a link, or no file of a store"
    try:
        data = durable.read_file(folder / MANIFEST, durable.MANIFEST_BYTES)
    except OSError as error:
        return f"{MANIFEST} is no file of a store" if durable.is_no_file_of_ours(error) else ""
    try:
        manifest = parse_manifest(data, where=MANIFEST) if data else None
    except BadManifest as error:
        return str(error)
    if manifest is None:
        return ""
    if manifest.key != key:
        return f"{MANIFEST} is that of {manifest.key}"
    return next(filter(None, (_wrong_in(folder, file, manifest.block_bytes) for file in manifest.files)), "")


def _wrong_in(folder: Path, file: FileRecord, block_bytes: int) -> str:
    try:
        fd = durable.open_for_read(folder / file.path)
    except OSError as error:
        return f"{file.path} is no regular file" if durable.is_no_file_of_ours(error) else ""
    try:
        for index in range(block_count(file)):
            begin = index * block_bytes
            length = min(block_bytes, file.size_bytes - begin)
            if len(os.pread(fd, length, begin)) == length and not has_block(fd, file, index, block_bytes):
                return f"{file.path}: not the bytes that were published, at byte {begin}"
        if os.pread(fd, 1, file.size_bytes):
            return f"{file.path} is longer than published"
        return wrong_content(folder / file.path, file, block_bytes)
    except OSError:
        return ""
    finally:
        os.close(fd)


def verify_folder(
    folder: Path,
    key: SnapshotKey,
    position: Position | None = None,
    *,
    until: float = float("inf"),
    on_position: Callable[[Position], object] | None = None,
) -> Verified:
    """Compare files with the manifest's checksums from `position` on, and look for files that do not belong.

    `folder` is the place of the snapshot `key`, damaged or not. `until`: monotonic seconds at which to stop.
    `on_position` gets the position of the run, every few seconds.
    """
    position = position or Position()
    try:
        manifest = parse_manifest(durable.read_file(folder / MANIFEST, durable.MANIFEST_BYTES), where=MANIFEST)
    except (OSError, BadManifest, FormatTooNew) as error:
        return Verified((Finding(MANIFEST, str(error)),))
    if manifest.key != key:
        return Verified((Finding(MANIFEST, f"it is the manifest of {manifest.key}"),))
    problems = {file.path: problem for file in manifest.files if (problem := _at_a_glance(folder, file))}
    blocks = list(_blocks(manifest))[position.first :: position.stride]
    if position.done >= len(blocks):  # a run that came to the end has kept the next one's start
        position = replace(position, done=0)
    planned = sum(_length(manifest, file, index) for file, index in blocks[position.done :])
    compared, checked_blocks, last_report_at = 0, position.done, time.monotonic()
    with _Files(folder) as files:
        for file, index in blocks[position.done :]:
            if time.monotonic() >= until:
                break
            if file.path not in problems and (problem := _in_block(files, file, index, manifest.block_bytes)):
                problems[file.path] = f"{problem}, at byte {index * manifest.block_bytes}"
            compared += _length(manifest, file, index)
            checked_blocks += 1
            if on_position is not None and time.monotonic() - last_report_at > _SAVE_EVERY_S:
                last_report_at = time.monotonic()
                on_position(Position(position.stride, position.first, checked_blocks))
    findings = [*(Finding(path, problem) for path, problem in problems.items()), *_foreign(folder, manifest)]
    whole = checked_blocks >= len(blocks)
    after = Position(position.stride, (position.first + 1) % position.stride) if whole else None
    return Verified(
        tuple(sorted(findings, key=lambda finding: finding.path)),
        compared,
        planned,
        after or Position(position.stride, position.first, checked_blocks),
    )


def saved_position(layout: Layout, key: SnapshotKey, stride: int) -> Position:
    """The position that the last run with this stride reached; the start if there was none. Raises RootUnusable if its
    record cannot be read."""
    record = _record(layout, key)
    try:
        position = Position(*(operator.index(record[name]) for name in ("stride", "first", "done")))
    except (KeyError, TypeError):
        return Position(stride)
    usable = position.stride == stride and 0 <= position.first < stride and position.done >= 0
    return position if usable else Position(stride)


def known_problem(layout: Layout, key: SnapshotKey) -> str:
    """What an earlier run found wrong with the snapshot that is there now; empty if it found nothing."""
    record = _record(layout, key)
    is_this = record.get("snapshot") == _identity(layout, key)
    return printable(str(record.get("problem", "")))[:200] if is_this else ""


def save_position(layout: Layout, key: SnapshotKey, position: Position) -> bool:
    """Keep the position of a run; False if the volume cannot be written, and the next run starts over."""
    return _save(layout, key, {"stride": position.stride, "first": position.first, "done": position.done})


def save_result(layout: Layout, key: SnapshotKey, verified: Verified, *, whole: bool, in_parts: bool = False) -> bool:
    """Keep the first problem of a run, and its position if it was one of several parts. `whole`: it compared every
    byte, so that if it found nothing, an earlier problem is gone. False if the volume cannot be written."""
    problem = known_problem(layout, key)
    if not verified.intact:
        first = next(finding for finding in verified.findings if not finding.foreign)
        problem = f"{first.path}: {first.problem}"
    elif whole:
        problem = ""
    if not in_parts and not problem and not tree.exists(layout.verified(key)):
        return True
    changes: dict[str, Any] = {"problem": problem, "snapshot": _identity(layout, key)} if problem else {"problem": ""}
    if in_parts:
        position = verified.position
        changes |= {"stride": position.stride, "first": position.first, "done": position.done}
    return _save(layout, key, changes)


def _identity(layout: Layout, key: SnapshotKey) -> str:
    """What tells the snapshot that is there from one that is made in its place: its manifest's inode and time."""
    try:
        state = os.lstat(layout.snapshot(key) / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return "without a manifest"
    return f"{state.st_ino}.{state.st_mtime_ns}"


def _record(layout: Layout, key: SnapshotKey) -> dict[str, Any]:
    try:
        record = json.loads(durable.read_record(layout.verified(key), 4096) or b"")
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _save(layout: Layout, key: SnapshotKey, changes: dict[str, Any]) -> bool:
    try:
        record = _record(layout, key) | changes
        tree.check_no_links(layout.root, layout.verified(key))
        durable.write_atomic(layout.verified(key), json.dumps(record).encode() + b"\n")
    except (ModelStoreError, OSError):
        return False
    return True


def _blocks(manifest: Manifest) -> Iterator[tuple[FileRecord, int]]:
    for file in manifest.files:
        for index in range(block_count(file)):
            yield file, index


def _length(manifest: Manifest, file: FileRecord, index: int) -> int:
    return min(manifest.block_bytes, file.size_bytes - index * manifest.block_bytes)


class _Files:
    """Opens one file at a time, without its pages in the page cache."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = ""
        self._fd = -1

    def open(self, file: FileRecord) -> int:
        if file.path != self._path:
            self.close()
            self._fd = durable.open_for_read(self._folder / file.path)
            self._path = file.path
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def _in_block(files: _Files, file: FileRecord, index: int, block_bytes: int) -> str:
    try:
        return "" if has_block(files.open(file), file, index, block_bytes) else "not the bytes that were published"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _at_a_glance(folder: Path, file: FileRecord) -> str:
    """The problem of a file as its folder shows it."""
    try:
        state = os.lstat(folder / file.path)
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not stat.S_ISREG(state.st_mode):
        return "not a regular file"
    if state.st_size != file.size_bytes:
        return f"{state.st_size} bytes, and {file.size_bytes} were published"
    return ""


def _foreign(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    known = {MANIFEST, *(file.path for file in manifest.files)}
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for name in [*names, *links]:
            path = str(Path(parent, name).relative_to(folder))
            if path not in known and not durable.is_held_open(name):
                yield Finding(printable(path), "not named by the manifest", foreign=True)
