"""Whether a snapshot still is what its manifest says: offline, reading every byte."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from modelstore.catalog import Snapshot
from modelstore.errors import BadManifest, FormatTooNew
from modelstore.fill import has_blocks
from modelstore.layout import MANIFEST, SnapshotKey
from modelstore.manifest import FileRecord, parse_manifest


@dataclass(frozen=True, slots=True)
class Finding:
    """One file that is not as the manifest has it."""

    path: str
    problem: str


def verify_folder(
    folder: Path, key: SnapshotKey, *, on_bytes: Callable[[int], None] | None = None
) -> tuple[Finding, ...]:
    """Compare every file with the manifest's checksums, and look for files that do not belong.

    `folder` is where the snapshot `key` belongs, damaged or not. `on_bytes` gets what was read, as it is read.
    """
    try:
        manifest = parse_manifest((folder / MANIFEST).read_bytes(), where=MANIFEST)
    except (OSError, BadManifest, FormatTooNew) as error:
        return (Finding(MANIFEST, str(error)),)
    if manifest.key != key:
        return (Finding(MANIFEST, f"it is the manifest of {manifest.key}"),)
    findings = [
        Finding(file.path, _problem(folder / file.path, file))
        for file in manifest.files
        if not has_blocks(folder / file.path, file, on_block=on_bytes)
    ]
    known = {MANIFEST, *(file.path for file in manifest.files)}
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for name in [*names, *links]:
            path = str(Path(parent, name).relative_to(folder))
            if path not in known:
                findings.append(Finding(path, "not named by the manifest"))
    return tuple(sorted(findings, key=lambda finding: finding.path))


def verify_snapshot(snapshot: Snapshot) -> tuple[Finding, ...]:
    """`verify_folder` for a snapshot that was found."""
    return verify_folder(snapshot.path, snapshot.key)


def _problem(path: Path, file: FileRecord) -> str:
    try:
        state = os.lstat(path)
    except OSError:
        return "missing"
    if not stat.S_ISREG(state.st_mode):
        return "not a regular file"
    if state.st_size != file.size_bytes:
        return f"{state.st_size} bytes where {file.size_bytes} were published"
    return "not the bytes that were published"
