"""The weights of a snapshot that is still being made, in memory before it is published.

The filling worker keeps the bytes it writes; waiting workers poll the staging folder, and read the finished files
there: each was verified, and has a record with its checksums. Nothing of it is used before the snapshot is published
and its manifest names the same bytes.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from modelstore.errors import ModelStoreError, SnapshotNotFound
from modelstore.fill.observer import ForwardingObserver, Observer
from modelstore.fill.staging import finished_record, staging_folders
from modelstore.load.reader import Reading, host_memory
from modelstore.volume import tree
from modelstore.volume.layout import Layout, SnapshotKey, StagingLayout
from modelstore.volume.manifest import BLOCK_BYTES, FileRecord
from modelstore.volume.snapshots import Snapshot

if TYPE_CHECKING:
    from modelstore.volume.claim import Holder

logger = logging.getLogger(__name__)

_CHECK_EVERY_S = 0.5


class StagingPrefetch(ForwardingObserver):
    """Watches a fill, passes all calls on to `observer`, and has `reading` take the finished files.

    Use `finish` for the snapshot that was made, and `give_up` if there will be none.
    """

    def __init__(
        self,
        layout: Layout,
        observer: Observer,
        reading: Reading,
        *,
        keep_bytes: float = float("inf"),
    ) -> None:
        """`keep_bytes`: host memory for the bytes that this process writes itself."""
        super().__init__(observer)
        self._layout = layout
        self._reading = reading
        self._room_bytes = keep_bytes
        self._given: dict[str, int] = {}  # bytes of memory, by file
        self._key: SnapshotKey | None = None
        self._followed: dict[str, FileRecord] = {}
        self._looked = float("-inf")
        self._lock = threading.Lock()

    def waiting(self, key: SnapshotKey, holder: Holder, *, left_s: float) -> None:
        super().waiting(key, holder, left_s=left_s)
        now = time.monotonic()
        if now - self._looked >= _CHECK_EVERY_S:
            self._looked = now
            try:
                self._look(key)
            except (ModelStoreError, OSError) as error:  # it moves under us, when it is published or taken over
                logger.debug("the staging of %s cannot be followed just now: %s", key, error)

    def memory(self, key: SnapshotKey, path: str, size_bytes: int) -> memoryview | None:
        with self._lock:
            self._room_bytes += self._given.pop(path, 0)
            if not self._is_of(key) or path in self._followed or size_bytes > self._room_bytes:
                return None
            memory = host_memory(size_bytes)
            self._given[path] = len(memory)
            self._room_bytes -= len(memory)
            return memory

    def finished(self, key: SnapshotKey, folder: Path, record: FileRecord, memory: memoryview | None = None) -> None:
        super().finished(key, folder, record, memory)
        try:
            self._take(key, folder, record, memory)
        except (ModelStoreError, OSError) as error:
            logger.debug("%s cannot be read just now: %s", record.path, error)

    def finish(self, snapshot: Snapshot) -> bool:
        """Read the rest of the snapshot, too; whether that is possible. It is not if other bytes were published."""
        contents = {file.path: file for file in snapshot.manifest.contents}
        if any(contents.get(path) != record for path, record in self._followed.items()):
            logger.info("%s was published with other bytes than those followed: it is read again", snapshot.key)
            self.give_up()
            return False
        missing = [file for file in contents.values() if file.path not in self._followed]
        try:
            self._reading.add(snapshot.path, missing, block_bytes=snapshot.manifest.block_bytes)
        except SnapshotNotFound:  # evicted already: whoever asks will look again
            self.give_up()
            return False
        self._reading.no_more()
        return True

    def give_up(self) -> None:
        """Stop to read."""
        self._reading.close()

    def _is_of(self, key: SnapshotKey) -> bool:
        """Whether this is the snapshot that is followed, the first one; if float16 overflows, another comes."""
        self._key = self._key or key
        return self._key == key

    def _take(self, key: SnapshotKey, folder: Path, record: FileRecord, memory: memoryview | None = None) -> None:
        with self._lock:
            content = record.content
            if memory is None:
                self._room_bytes += self._given.pop(content.path, 0)
            if not self._is_of(key) or content.path in self._followed:
                return
            if memory is not None:
                self._reading.adopt(folder, content, memory, block_bytes=BLOCK_BYTES)
            else:
                self._reading.add(folder, [content], block_bytes=BLOCK_BYTES)
            self._followed[content.path] = content

    def _look(self, key: SnapshotKey) -> None:
        folders = staging_folders(self._layout.staging(key))
        if not folders:
            return
        staging = StagingLayout(folders[0][1])
        for path in tree.entries(staging.done):
            name = path.name.removesuffix(".json")
            if name in self._followed or not name.endswith(".safetensors"):
                continue
            record = finished_record(path)
            if record is not None and record.content.path == name:
                logger.info("reading %s, which is finished, while the rest is made", name)
                self._take(key, staging.snapshot, record)
