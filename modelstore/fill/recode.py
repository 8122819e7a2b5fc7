"""A published snapshot made plain or compressed, on the volume, without its source.

Each block is compared with the snapshot's checksums as it is read, and what was written is read back and compared
before it is published. What was cut short goes on with the files that were finished.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace

from modelstore.errors import DigestMismatch, Refused, SnapshotNotFound
from modelstore.fill.observer import Observer
from modelstore.fill.progress import Progress
from modelstore.fill.publication import Publication
from modelstore.fill.source import SourceFile
from modelstore.fill.staging import Staging
from modelstore.fill.stored_file import StoredFile, is_compressible, stored_name
from modelstore.settings import Settings
from modelstore.volume import durable
from modelstore.volume.block_table import block_lengths, stored_length
from modelstore.volume.checksums import content_blocks, has_blocks
from modelstore.volume.claim import Claim
from modelstore.volume.content import check_decoder
from modelstore.volume.layout import Layout
from modelstore.volume.manifest import BLOCK_BYTES, FileRecord
from modelstore.volume.pins import UsageMark, wait_while_evicting
from modelstore.volume.snapshots import Snapshot

_SAMPLES = 4


@dataclass(frozen=True, slots=True)
class Sample:
    """An estimate for a plain snapshot, from a few blocks of its weights: the bytes that it takes compressed, and the
    seconds that one thread takes to decode all of it."""

    stored_bytes: int
    decoding_s: float


def sampled(snapshot: Snapshot) -> Sample:
    """Encode a sample of a plain snapshot's blocks. Raises OSError."""
    from modelstore.volume import planes  # zstandard is for compressed files alone

    block_bytes = snapshot.manifest.block_bytes
    weights = [file for file in snapshot.manifest.files if is_compressible(file.path)]
    places = [
        (file, index * block_bytes, length)
        for file in weights
        for index, length in enumerate(block_lengths(file.size_bytes, block_bytes))
    ]
    plain_bytes = sum(file.size_bytes for file in weights)
    sampled_bytes = stored_bytes = 0
    decoding_s = 0.0
    for file, offset, length in places[:: -(-len(places) // _SAMPLES) or 1]:
        with durable.opened(snapshot.path / file.path) as fd:
            block = os.pread(fd, length, offset)
        entry, parts = planes.encode(block)
        stored, target = memoryview(b"".join(parts)), memoryview(bytearray(len(block)))
        began = time.thread_time()
        planes.decode(entry, stored, target)
        decoding_s += time.thread_time() - began
        sampled_bytes += len(block)
        stored_bytes += stored_length(entry, len(block))
    share = plain_bytes / sampled_bytes if sampled_bytes else 0.0
    others = snapshot.plain_bytes - plain_bytes
    return Sample(others + round(stored_bytes * share), decoding_s * share)


class Recoding:
    """The twin of a snapshot: compressed if that is plain, and the other way round. Use once. It evicts no other model,
    even if MODELSTORE_EVICT is set: it is often run to gain space."""

    def __init__(self, layout: Layout, settings: Settings, snapshot: Snapshot, *, observer: Observer) -> None:
        """Raises NotFound if the library for compressed weights is missing, and Refused for a snapshot of a store that
        has blocks of another size."""
        check_decoder()
        if snapshot.manifest.block_bytes != BLOCK_BYTES:
            raise Refused(f"{snapshot.key} has blocks of {snapshot.manifest.block_bytes} bytes: seed it again")
        self.key = snapshot.key.twin
        self._layout = layout
        self._worker = settings.worker_id
        self._snapshot = snapshot
        self._observer = observer
        self._publication = Publication(layout, replace(settings, evict=False), self.key, observer=observer)
        self._progress = Progress(snapshot.plain_bytes)

    def run(self) -> bool:
        """Publish it; False if it was there. Raises DigestMismatch if the snapshot is not as it was published,
        SnapshotNotFound if it goes meanwhile, and what `Publication.run` raises."""
        mark = UsageMark(self._layout, self._snapshot.key, self._worker)  # no eviction takes what is read here
        try:
            wait_while_evicting(self._layout, self._snapshot.key)  # an eviction that was cut short left it in place
            needed_bytes = sampled(self._snapshot).stored_bytes if self.key.compressed else self._snapshot.plain_bytes
            return self._publication.run(self._fill, needed_bytes=needed_bytes)
        except FileNotFoundError as error:
            raise SnapshotNotFound(f"{self._snapshot.key} was removed meanwhile: look with `modelstore ls`") from error
        finally:
            mark.end()

    def _fill(self, staging: Staging, claim: Claim) -> bytes:
        manifest = self._snapshot.manifest
        for content in manifest.contents:
            file = SourceFile(content.path, content.original.size_bytes, content.original.sha256)
            present = staging.recover(file, stored_unchanged=manifest.stored_unchanged)
            # A download that was cut short leaves files, too, which it would have changed at its end.
            if present is not None and replace(present.content, stored=None) == replace(content, stored=None):
                self._progress.add(content.path, done=content.size_bytes, reused=content.size_bytes)
                continue
            staging.add(file, self._stored(content, staging, claim))
        records = tuple(staging.records[path] for path in sorted(staging.records))
        return replace(manifest, key=self.key, created_at=int(time.time()), files=records).encode()

    def _stored(self, content: FileRecord, staging: Staging, claim: Claim) -> FileRecord:
        """Put one file into the staging."""
        name = stored_name(content.path, compressed=self.key.compressed)
        source, target = self._snapshot.path / content.on_volume.path, staging.paths.snapshot_file(name)
        if name == content.path and content.stored is None:  # no weights
            durable.make_folder(target.parent)
            durable.remove_file(target)
            durable.link_or_copy(source, target)
            if not has_blocks(target, content):
                raise DigestMismatch(f"{source} differs from the published bytes: seed it again")
            return content
        with StoredFile(target) as stored:
            for block in content_blocks(source, content, self._snapshot.manifest.block_bytes):
                claim.check()
                stored.write(block)
                self._progress.add(content.path, done=len(block))
                self._report(claim)
            record = stored.finish(name, content.origin)
        for _block in content_blocks(target, record.content, BLOCK_BYTES):
            claim.check()
        if (record.content.size_bytes, record.content.sha256) != (content.size_bytes, content.sha256):
            raise DigestMismatch(f"{source} has not the digest of its manifest: seed it again")
        return record

    def _report(self, claim: Claim) -> None:
        progress = self._progress
        claim.report("converting", done=progress.done, total=progress.total, eta_s=progress.eta_s)
        self._observer.filling(self.key, progress)
