"""What a caller can watch while a snapshot is made or waited for. The command line draws it, a worker logs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelstore.layout import SnapshotKey

if TYPE_CHECKING:
    from modelstore.claim import Holder


class Observer:
    """Override what is of interest; every call must return quickly and must not raise."""

    def filling(self, key: SnapshotKey, *, done: int, total: int, reused: int, eta_s: float | None) -> None:
        """This process fills `key`; `done`, `total` and `reused` in bytes of the source, `eta_s` in seconds."""

    def waiting(self, key: SnapshotKey, holder: Holder, *, left_s: float) -> None:
        """Somebody else fills `key`; this process gives up in `left_s` seconds."""


SILENT = Observer()
