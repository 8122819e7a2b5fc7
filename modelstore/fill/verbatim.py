"""A published snapshot of another place, copied as it is into a store: the same files, the same manifest.

Under the claim of the snapshot, as a download is. Each block is compared with the manifest's checksum before it counts;
a copy that was cut short goes on with the blocks that are there. The snapshot appears by one rename.
"""

from __future__ import annotations

import os
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import xxhash

from modelstore.errors import BadManifest, DigestMismatch
from modelstore.fill.observer import Observer
from modelstore.fill.progress import Progress
from modelstore.fill.publication import Publication
from modelstore.fill.staging import Staging
from modelstore.fill.store_roots import StoreRoot
from modelstore.settings import Settings
from modelstore.volume import durable
from modelstore.volume.checksums import block_count, digests_of_file, has_block
from modelstore.volume.claim import Claim
from modelstore.volume.layout import Layout
from modelstore.volume.manifest import CHECKSUM_HEX, FileRecord, parse_manifest

_AT_ONCE = 4
_MOST_BLOCK_BYTES = 64 << 20


class VerbatimCopy:
    """A copy of one snapshot. Use once."""

    def __init__(
        self,
        source: StoreRoot,
        manifest: bytes,
        layout: Layout,
        settings: Settings,
        *,
        observer: Observer,
    ) -> None:
        """`manifest`: its file's bytes at the source. `layout`, `settings`: of the store that gets it. Raises
        BadManifest."""
        self._source = source
        self._data = manifest
        self._manifest = parse_manifest(manifest, where=source.label)
        self._key = self._manifest.key
        if self._manifest.block_bytes > _MOST_BLOCK_BYTES:
            raise BadManifest(
                f"{self._key} at {source.label} has blocks of {self._manifest.block_bytes} bytes: seed it"
            )
        self._observer = observer
        self._publication = Publication(layout, settings, self._key, observer=observer)
        self._progress = Progress(self._manifest.size_bytes)

    def run(self) -> int:
        """Copy what is missing, and publish it; returns the bytes that were copied, 0 if it was there.

        Raises DigestMismatch if the source's bytes are not those of its manifest, the errors of the source, and what
        `Publication.run` raises.
        """
        self._publication.run(self._fill, needed_bytes=self._progress.total)
        return self._progress.network

    def _fill(self, staging: Staging, claim: Claim) -> bytes:
        for file in self._manifest.files:
            claim.check()
            self._copy(file, staging.paths.snapshot_file(file.path), claim)
        return self._data

    def _copy(self, file: FileRecord, target: Path, claim: Claim) -> None:
        durable.make_folder(target.parent)
        self._progress.begin(file.path, file.size_bytes)
        if os.path.lexists(target) and target.lstat().st_nlink > 1:  # another fill's link to a file of somebody else
            durable.remove_file(target)
        fd = durable.open_for_write(target)
        try:
            durable.set_size(fd, file.size_bytes, path=target)
            blocks = [partial(self._copy_block, file, index, fd, target, claim) for index in range(block_count(file))]
            pool = ThreadPoolExecutor(_AT_ONCE)
            try:
                for job in wait([pool.submit(block) for block in blocks], return_when=FIRST_EXCEPTION).done:
                    job.result()
            finally:  # an error, or a person who has seen enough, waits for no more than the blocks on their way
                pool.shutdown(cancel_futures=True)
            durable.sync(fd, path=target)
        finally:
            durable.close(fd, path=target)
        if digests_of_file(target).sha256 != file.sha256:
            raise DigestMismatch(f"{file.path} of {self._key} at {self._source.label} has not its manifest's digest")

    def _copy_block(self, file: FileRecord, index: int, fd: int, target: Path, claim: Claim) -> None:
        block_bytes = self._manifest.block_bytes
        start = index * block_bytes
        length = min(block_bytes, file.size_bytes - start)
        if has_block(fd, file, index, block_bytes):
            self._progress.add(file.path, done=length, reused=length)
            return
        path = "/".join(("models", *self._key.parts, file.path))
        data = self._source.part(path, start, length)
        expected = file.blocks[index * CHECKSUM_HEX : (index + 1) * CHECKSUM_HEX]
        if len(data) != length or xxhash.xxh3_64_hexdigest(data) != expected:
            raise DigestMismatch(
                f"{file.path} of {self._key} at {self._source.label} is not as it was published, at byte {start}: "
                "mend it there, `modelstore verify` and `seed`"
            )
        durable.write_at(fd, data, start, path=target)
        self._progress.add(file.path, done=length, network=length)
        progress = self._progress
        claim.report("copying", done=progress.done, total=progress.total, eta_s=progress.eta_s)
        self._observer.filling(self._key, progress)
