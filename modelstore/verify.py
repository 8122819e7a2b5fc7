"""Whether a snapshot still is what its manifest says: offline, reading every byte."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from modelstore.catalog import Snapshot
from modelstore.fill import has_blocks
from modelstore.layout import MANIFEST


@dataclass(frozen=True, slots=True)
class Finding:
    """One file that is not as the manifest has it."""

    path: str
    problem: str


def verify_snapshot(snapshot: Snapshot, *, on_bytes: Callable[[int], None] | None = None) -> tuple[Finding, ...]:
    """Compare every file with its checksums, and look for files that do not belong. `on_bytes` gets what was read."""
    findings = [
        Finding(file.path, "missing, not a regular file, of another size, or with other bytes")
        for file in snapshot.manifest.files
        if not has_blocks(snapshot.path / file.path, file, on_block=on_bytes)
    ]
    known = {MANIFEST, *(file.path for file in snapshot.manifest.files)}
    for parent, folders, names in os.walk(snapshot.path):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for name in [*names, *links]:
            path = str(Path(parent, name).relative_to(snapshot.path))
            if path not in known:
                findings.append(Finding(path, "not named by the manifest"))
    return tuple(sorted(findings, key=lambda finding: finding.path))
