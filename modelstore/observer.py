"""What a caller can watch while a snapshot is made or waited for. The command line draws it, a worker logs it and keeps
the bytes that pass through its hands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from modelstore.layout import SnapshotKey
from modelstore.manifest import FileRecord

if TYPE_CHECKING:
    from modelstore.claim import Holder


class Observer:
    """Override what is of interest; every call must return quickly. What `planned`, `filling` and `waiting` raise ends
    the work; the others must not raise."""

    def planned(self, key: SnapshotKey, *, weights_bytes: int) -> None:
        """This process is about to fill `key`, whose weights will take so much. What is raised here stops it."""

    def filling(self, key: SnapshotKey, *, done: int, total: int, reused: int, eta_s: float | None) -> None:
        """This process fills `key`; `done`, `total` and `reused` in bytes of the source, `eta_s` in seconds."""

    def waiting(self, key: SnapshotKey, holder: Holder, *, left_s: float) -> None:
        """Somebody else fills `key`; this process gives up in `left_s` seconds."""

    def memory(self, key: SnapshotKey, path: str, size_bytes: int) -> memoryview | None:
        """Host memory, at least as long as the file, that the bytes of a weights file shall go to beside the volume;
        None for none. Asked again where the file is begun again. Called by several threads."""
        return None

    def finished(self, key: SnapshotKey, folder: Path, record: FileRecord) -> None:
        """A weights file lies in `folder`, verified, and in the memory that was given for it last. Called by several
        threads."""


SILENT = Observer()
