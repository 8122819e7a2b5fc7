"""Removing snapshots: plan first, then act.

A snapshot is unpublished by one rename into `trash/`, then deleted: from that moment nobody finds it, and whoever has
opened its files reads them to the end. What a crash leaves in `trash/` the next removal deletes.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from modelstore import durable
from modelstore.layout import Layout, SnapshotKey


@dataclass(frozen=True, slots=True)
class Removal:
    """Snapshots that are to go, damaged or not; print it before running it."""

    keys: tuple[SnapshotKey, ...]

    def size_bytes(self, layout: Layout) -> int:
        """What their folders take."""
        folders = [layout.snapshot(key) for key in self.keys]
        return sum(path.lstat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())

    def run(self, layout: Layout) -> None:
        """Unpublish, then delete. A snapshot that somebody else removed meanwhile is fine."""
        for key in self.keys:
            path = layout.snapshot(key)
            aside = layout.trash(f"{'--'.join(key.parts)}.{secrets.token_hex(4)}")
            durable.make_folder(aside.parent)
            try:
                durable.rename(path, aside)
            except FileNotFoundError:
                continue
            durable.sync_path(path.parent)
        for leftover in _entries(layout.root / "trash"):
            durable.remove_tree(leftover)


def _entries(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in sorted(os.listdir(folder))]
    except FileNotFoundError:
        return []
