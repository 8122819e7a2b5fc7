"""The finished weights of a snapshot that somebody else is making, read before it is published.

Whoever waits for a download looks at its staging now and then: what is finished there was verified, and has a record
with its checksums. Nothing of it is used before the snapshot is published and its manifest names the same bytes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from modelstore import durable
from modelstore.catalog import Snapshot
from modelstore.errors import ModelStoreError, SnapshotNotFound
from modelstore.finished import finished_record
from modelstore.layout import Layout, SnapshotKey, StagingLayout
from modelstore.manifest import BLOCK_BYTES, FileRecord
from modelstore.observer import Observer
from modelstore.reader import Reading

if TYPE_CHECKING:
    from modelstore.claim import Holder

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5


class Following(Observer):
    """Watches a wait, tells `observer` of it, and reads what is finished; `start` makes the reading when there is some.

    Use `finish` for the snapshot that was waited for, and `give_up` where there will be none.
    """

    def __init__(self, layout: Layout, observer: Observer, start: Callable[[], Reading]) -> None:
        self._layout = layout
        self._observer = observer
        self._start = start
        self._reading: Reading | None = None
        self._followed: dict[str, FileRecord] = {}
        self._looked = float("-inf")

    def filling(self, key: SnapshotKey, *, done: int, total: int, reused: int, eta_s: float | None) -> None:
        self._observer.filling(key, done=done, total=total, reused=reused, eta_s=eta_s)

    def waiting(self, key: SnapshotKey, holder: Holder, *, left_s: float) -> None:
        self._observer.waiting(key, holder, left_s=left_s)
        now = time.monotonic()
        if now - self._looked >= _LOOK_EVERY_S:
            self._looked = now
            try:
                self._look(self._layout.staging(key))
            except (ModelStoreError, OSError) as error:  # it moves under us, when it is published or taken over
                logger.debug("the staging of %s cannot be followed just now: %s", key, error)

    def finish(self, snapshot: Snapshot) -> Reading | None:
        """The reading of all of the snapshot, of which a part has arrived; None where nothing was finished in time, or
        what was is not what was published."""
        reading, self._reading = self._reading, None
        if reading is None:
            return None
        if any(snapshot.manifest.file(path) != record for path, record in self._followed.items()):
            logger.info("%s was published otherwise than what was followed: it is read again", snapshot.key)
            reading.close()
            return None
        rest = [file for file in snapshot.manifest.files if file.path not in self._followed]
        try:
            reading.add(snapshot.path, rest, block_bytes=snapshot.manifest.block_bytes)
        except SnapshotNotFound:  # evicted already: whoever asks will look again
            reading.close()
            return None
        reading.no_more()
        return reading

    def give_up(self) -> None:
        """Stop to read."""
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def _look(self, folder: Path) -> None:
        generations = [path for path in durable.entries(folder) if path.name.isascii() and path.name.isdigit()]
        if not generations:
            return
        staging = StagingLayout(max(generations, key=lambda path: int(path.name)))
        for path in durable.entries(staging.done):
            name = path.name.removesuffix(".json")
            if name in self._followed or not name.endswith(".safetensors"):
                continue
            record = finished_record(path)
            if record is None or record.path != name:
                continue
            if self._reading is None:
                self._reading = self._start()
            self._reading.add(staging.snapshot, [record], block_bytes=BLOCK_BYTES)
            self._followed[name] = record
            logger.info("reading %s, which is finished, while the rest is made", name)
