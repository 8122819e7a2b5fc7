"""The whole of a start in one page: find the snapshot or make it, and have its bytes in flight.

found = begin(settings)        the standard library, the store and the reader; no torch
import torch, transformers     beside the read
load_model(found.snapshot, reading=found.reading, timeline=found.timeline)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelstore.catalog import Catalog, Snapshot, Status
from modelstore.errors import InvalidSetting
from modelstore.layout import Layout, SnapshotKey
from modelstore.observer import Observer
from modelstore.reader import Reading, start_reading
from modelstore.settings import Settings
from modelstore.timeline import Outcome, Timeline

if TYPE_CHECKING:
    from modelstore.claim import Holder

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 5.0
_OUTCOMES: Mapping[Status, tuple[Outcome, str]] = {
    "present": ("hit", "the snapshot was on the volume"),
    "waited": ("waited", "another worker was making the snapshot"),
    "resumed": ("resumed", "an earlier worker had left the download unfinished"),
    "downloaded": ("downloaded", "the snapshot was not on the volume"),
}


@dataclass(frozen=True, slots=True)
class Begun:
    """A start whose bytes are in flight."""

    snapshot: Snapshot
    reading: Reading
    timeline: Timeline


class LogObserver(Observer):
    """Progress as log lines, a few a minute: a billed GPU that waits says for what."""

    def __init__(self) -> None:
        self._last = 0.0

    def filling(self, key: SnapshotKey, *, done: int, total: int, reused: int, eta_s: float | None) -> None:
        if self._due():
            eta = f", about {eta_s:.0f} s left" if eta_s is not None else ""
            logger.info("downloading %s: %.2f of %.2f GB%s", key, done / 1e9, total / 1e9, eta)

    def waiting(self, key: SnapshotKey, holder: Holder, *, left_s: float) -> None:
        if self._due():
            logger.info("waiting for %s from %s; giving up in %.0f s", key, holder.describe(), left_s)

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self._last < _LOG_EVERY_S:
            return False
        self._last = now
        return True


def begin(settings: Settings, *, observer: Observer | None = None) -> Begun:
    """Make sure that the model is on the volume, and start to read its weights.

    Raises InvalidSetting where no model is set, and whatever `ModelStore.ensure` raises.
    """
    if settings.model is None:
        raise InvalidSetting("MODEL_ID is not set: name the model to serve, as in MODEL_ID=org/name")
    timeline = Timeline(worker=settings.worker_id, model=str(settings.model), dtype=settings.dtype)
    settings.check_allowed(settings.model)
    with timeline.span("lookup"):
        snapshot = Catalog(Layout(settings.root)).find(settings.model, settings.dtype)
    if snapshot is None:
        from modelstore.store import ModelStore  # its imports (numpy, HTTP) are for a miss alone

        store = ModelStore(settings.root, settings=settings)
        snapshot = store.ensure(settings.model, timeline=timeline, observer=observer or LogObserver())
    timeline.commit, timeline.dtype = snapshot.commit, snapshot.dtype
    timeline.outcome, timeline.reason = _OUTCOMES[snapshot.status]
    return Begun(snapshot, start_reading(snapshot), timeline)
