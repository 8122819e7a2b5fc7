"""The calls that report a fill, or the wait for one. The command line draws them, a worker logs them and keeps
the bytes that pass through its hands."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelstore.fill.progress import Progress
from modelstore.units import size
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.manifest import FileRecord

if TYPE_CHECKING:
    from modelstore.volume.claim import Holder


logger = logging.getLogger(__name__)

_LOG_EVERY_S = 5.0


class Observer:
    """Override the calls of interest; every call must return quickly. An error of `described`, `planned`, `filling` and
    `waiting` ends the work; the others must not raise."""

    def described(self, key: SnapshotKey, config: Mapping[str, Any], files: Collection[str]) -> None:
        """This process is about to fill `key`, which has this `config.json`, empty if there is none, and these files.
        An error raised here stops it before a download."""

    def planned(self, key: SnapshotKey, *, weights_bytes: int) -> None:
        """This process is about to fill `key`, whose weights have this size. An error raised here stops it."""

    def filling(self, key: SnapshotKey, progress: Progress) -> None:
        """This process fills `key`, or uploads it, with this progress. Called by several threads."""

    def waiting(self, key: SnapshotKey, holder: Holder, *, left_s: float) -> None:
        """Another process fills `key`; this process gives up in `left_s` seconds."""

    def failed(self, key: SnapshotKey) -> None:
        """This process neither fills `key` nor waits for it any more, because something was raised."""

    def memory(self, key: SnapshotKey, path: str, size_bytes: int) -> memoryview | None:
        """Host memory, at least as long as the file, that the bytes of a weights file shall go to beside the volume;
        None for none. Asked again if the file is begun again. Called by several threads."""
        return None

    def finished(self, key: SnapshotKey, folder: Path, record: FileRecord, memory: memoryview | None = None) -> None:
        """A weights file lies in `folder`, verified, and in `memory`, out of those that were given for it, if that is
        not None. Called by several threads."""


SILENT = Observer()


class ForwardingObserver(Observer):
    """Passes all calls on to another observer; for a subclass, which adds to some of them."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def described(self, key: SnapshotKey, config: Mapping[str, Any], files: Collection[str]) -> None:
        self._observer.described(key, config, files)

    def planned(self, key: SnapshotKey, *, weights_bytes: int) -> None:
        self._observer.planned(key, weights_bytes=weights_bytes)

    def filling(self, key: SnapshotKey, progress: Progress) -> None:
        self._observer.filling(key, progress)

    def waiting(self, key: SnapshotKey, holder: Holder, *, left_s: float) -> None:
        self._observer.waiting(key, holder, left_s=left_s)

    def failed(self, key: SnapshotKey) -> None:
        self._observer.failed(key)

    def memory(self, key: SnapshotKey, path: str, size_bytes: int) -> memoryview | None:
        return self._observer.memory(key, path, size_bytes)

    def finished(self, key: SnapshotKey, folder: Path, record: FileRecord, memory: memoryview | None = None) -> None:
        self._observer.finished(key, folder, record, memory)


class LogObserver(Observer):
    """Progress as log lines, a few a minute: a billed GPU that waits says why."""

    def __init__(self, doing: str = "downloading") -> None:
        self._doing = doing
        self._last = 0.0

    def filling(self, key: SnapshotKey, progress: Progress) -> None:
        if self._due():
            left_s = progress.eta_s  # once: others count on meanwhile
            eta = f", about {left_s:.0f} s left" if left_s is not None else ""
            amount = f": {size(progress.done)} of {size(progress.total)}{eta}" if progress.total else ""
            is_copy = self._doing == "downloading" and not progress.over_network
            logger.info("%s %s%s", "copying" if is_copy else self._doing, key, amount)

    def waiting(self, key: SnapshotKey, holder: Holder, *, left_s: float) -> None:
        if self._due():
            logger.info("waiting for %s from %s; giving up in %.0f s", key, holder.describe(), left_s)

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self._last < _LOG_EVERY_S:
            return False
        self._last = now
        return True
