"""A snapshot to a network volume from afar, over RunPod's S3 API: no pod, no mount.

    s3://<volume-id>@<datacenter>[/<folder>]     the folder is `modelstore`, as workers look for it on the volume

The API has no rename, so the manifest goes last: until it is there the snapshot is not published. Keys are paths, the
bucket is the volume, the region the datacenter. Differences from Amazon's: objects above 500 MB go in parts; completing
many parts may end in 524 or a timeout though it is done (the object's size tells); 507 means that the volume is full;
there is no batch delete, and listing is slow, so nothing is ever listed but the parts of an upload that goes on.

Each part is sent with its MD5, which the server compares, and each object's size is looked at before the manifest says
that it is there. An upload that was cut short goes on with the parts that the server has.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from modelstore.dtypes import DEFAULT_DTYPE
from modelstore.errors import (
    IntegrityError,
    ModelStoreError,
    ObjectMissing,
    VolumeUnavailable,
)
from modelstore.fill.bucket import AT_ONCE, ATTEMPTS, Bucket, Target, md5_of
from modelstore.fill.observer import SILENT, Observer
from modelstore.fill.progress import Progress
from modelstore.reference import Reference, repo_id_of, revision_of
from modelstore.volume import durable, refs
from modelstore.volume.layout import MANIFEST, Layout, SnapshotKey
from modelstore.volume.manifest import FileRecord, Manifest, parse_manifest
from modelstore.volume.snapshots import Snapshot

PART_BYTES = 32 << 20
_MAX_PARTS = 10_000

logger = logging.getLogger(__name__)
T = TypeVar("T")


class RemoteVolume:
    """One volume over S3."""

    def __init__(
        self, target: Target, *, endpoint: str | None = None, sleep: Callable[[float], object] | None = None
    ) -> None:
        self.bucket = Bucket(target, endpoint=endpoint, sleep=sleep)
        self.target = target

    def has(self, snapshot: Snapshot) -> bool:
        """Whether the volume holds this snapshot, every file with its size."""
        manifest = self._manifest(snapshot)
        if manifest is None:
            return False
        with ThreadPoolExecutor(AT_ONCE) as pool:
            sizes = pool.map(lambda file: self.bucket.size(self.key_of(snapshot, file.path)), manifest.files)
            return all(size == file.size_bytes for size, file in zip(sizes, manifest.files, strict=True))

    def _manifest(self, snapshot: Snapshot) -> Manifest | None:
        """The manifest in the snapshot's place on the volume; None if there is none that can be trusted."""
        data = self.bucket.read(self.key_of(snapshot, MANIFEST))
        try:
            return parse_manifest(data, where=str(self.target)) if data is not None else None
        except ModelStoreError as error:
            logger.warning("%s: %s: it is written again", self.target, error)
            return None

    def verify(self, snapshot: Snapshot) -> None:
        """Read all of it back and compare with the manifest there, which has to be of this snapshot. Raises
        IntegrityError."""

        def unpublished(problem: str) -> IntegrityError:
            self.bucket.call("delete_object", Key=self.key_of(snapshot, MANIFEST))
            return IntegrityError(f"{self.target}: {problem}: unpublished, upload it again")

        def compare(path: str, size: int, sha256: str) -> None:
            digest = hashlib.sha256()
            try:
                for start in range(0, size, PART_BYTES):
                    digest.update(
                        self.bucket.body(self.key_of(snapshot, path), start, min(start + PART_BYTES, size) - 1)
                    )
            except ObjectMissing:
                digest = hashlib.sha256(b"?")
            if digest.hexdigest() != sha256:
                raise unpublished(f"{path} of {snapshot.key} differs from the uploaded file")

        manifest = self._manifest(snapshot)
        if manifest is None or not manifest.has_contents_of(snapshot.manifest):
            raise unpublished(f"{snapshot.key} is not the snapshot that was uploaded")
        with ThreadPoolExecutor(AT_ONCE) as pool:
            _all_of(pool, [partial(compare, file.path, file.size_bytes, file.sha256) for file in manifest.files])

    def upload(self, snapshot: Snapshot, *, observer: Observer = SILENT) -> int:
        """Send the files that the volume lacks of a snapshot, the manifest last; returns how many bytes were sent.

        Raises NoSpace, AccessDenied, NotFound, IntegrityError, VolumeUnavailable.
        """
        self._check_format()
        progress = Progress(snapshot.size_bytes)
        files = [_Upload(self, snapshot, file, progress, observer) for file in snapshot.manifest.files]
        pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="s3")
        try:
            _all_of(pool, [file.begin for file in files])
            _all_of(pool, [part for file in files for part in file.parts()])
            _all_of(pool, [file.end for file in files])
        except BaseException as error:
            self.bucket.stopped.set()  # the waits before new attempts end; a part that is on its way is not waited for
            pool.shutdown(wait=not isinstance(error, KeyboardInterrupt), cancel_futures=True)
            if not isinstance(error, KeyboardInterrupt):
                self.bucket.stopped.clear()  # for the next snapshot
            raise
        pool.shutdown()
        manifest = durable.read_file(snapshot.path / MANIFEST, durable.MANIFEST_BYTES)
        self.bucket.put(self.key_of(snapshot, MANIFEST), manifest)
        if self.bucket.read(self.key_of(snapshot, MANIFEST)) != manifest:
            raise IntegrityError(f"{self.target}: the manifest of {snapshot.key} does not read back: upload it again")
        return progress.network + len(manifest)

    def record(self, snapshot: Snapshot, *, sent: int, status: str) -> dict[str, Any]:
        """The record of one upload; `sent` in bytes."""
        return {
            "to": str(self.target),
            **snapshot.key.as_json(),
            "files": len(snapshot.manifest.files),
            "bytes": snapshot.size_bytes,
            "uploaded_bytes": sent,
            "status": status,
        }

    def record_commit(self, layout: Layout, snapshot: Snapshot, reference: Reference) -> None:
        """Let workers on that volume use this snapshot for the reference that it was seeded by."""
        key = snapshot.key
        for name, revision in refs.record_places(key.repo_id, revision_of(reference), repo_id_of(reference)):
            self._put_record(layout, name, revision, refs.Recorded(key.repo_id, key.commit))
        record = self._record_key(layout, key.repo_id, key.commit)
        usual = replace(key, dtype=DEFAULT_DTYPE)
        is_export = key.dtype == "keep" and any(
            self.bucket.read(self._key(each, MANIFEST)) is not None for each in (usual, usual.twin)
        )
        if not is_export and (key.dtype != DEFAULT_DTYPE or self.bucket.read(record) is not None):
            self._put_record(layout, key.repo_id, key.commit, refs.Recorded(key.repo_id, key.commit, key.dtype))

    def _put_record(self, layout: Layout, name: str, revision: str, to: refs.Recorded) -> None:
        self.bucket.put(self._record_key(layout, name, revision), refs.encode_record(revision, to, name))

    def _record_key(self, layout: Layout, name: str, revision: str) -> str:
        return f"{self.target.folder}/{layout.ref(name, revision).relative_to(layout.root)}"

    def _check_format(self) -> None:
        key = f"{self.target.folder}/FORMAT"
        data = self.bucket.read(key)
        if data is not None or not self.bucket.put_if_new(key, refs.FORMAT_BYTES):
            refs.check_format_bytes(data or self.bucket.read(key) or b"", store=str(self.target))

    def key_of(self, snapshot: Snapshot, path: str) -> str:
        """The key of a file of a snapshot."""
        return self._key(snapshot.key, path)

    def _key(self, key: SnapshotKey, path: str) -> str:
        return "/".join((self.target.folder, "models", *key.parts, path))


class _Upload:
    """One file on its way: `begin`, then all `parts` in any order, then `end`."""

    def __init__(
        self, volume: RemoteVolume, snapshot: Snapshot, file: FileRecord, progress: Progress, observer: Observer
    ) -> None:
        self._bucket = volume.bucket
        self._snapshot = snapshot
        self._name = file.path
        self._path = snapshot.path / file.path
        self._key = volume.key_of(snapshot, file.path)
        self._size = size = file.size_bytes
        self._progress = progress
        self._observer = observer
        self._part_bytes = max(PART_BYTES, -(-size // _MAX_PARTS))
        self._there = False
        self._upload_id = ""
        self._etags: dict[int, str] = {}
        self._known: dict[int, tuple[str, int]] = {}

    def begin(self) -> None:
        """Look at the object on the volume, and open an upload in parts if the file needs one."""
        if self._size <= self._part_bytes:
            return  # sent again rather than trusted by its size
        size, etag = self._bucket.head(self._key)
        if size == self._size and etag == self._whole_etag():
            self._there = True
            self._count(self._size, sent=False)
        else:
            self._upload_id = (
                self._open_upload() or self._bucket.call("create_multipart_upload", Key=self._key)["UploadId"]
            )

    def parts(self) -> Iterator[Callable[[], None]]:
        """The parts to send."""
        if self._there:
            return
        if not self._upload_id:
            yield self._send_whole
            return
        for number in range(1, -(-self._size // self._part_bytes) + 1):
            yield lambda number=number: self._send_part(number)  # type: ignore[misc]

    def end(self) -> None:
        """Have the parts made one object, and look at its size."""
        if self._there:
            return
        if self._upload_id:
            self._complete()
        if (size := self._bucket.size(self._key)) != self._size:
            raise IntegrityError(
                f"{self._bucket.target}: {self._key} has {size} bytes, not {self._size}: upload it again"
            )

    def _whole_etag(self) -> str:
        """S3's tag of an object that was sent in these parts: the MD5 of their MD5s."""
        with durable.opened(self._path) as fd:
            parts = [
                hashlib.md5(os.pread(fd, self._part_bytes, offset), usedforsecurity=False).digest()
                for offset in range(0, self._size, self._part_bytes)
            ]
        return f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"

    def _open_upload(self) -> str:
        """An upload of this file that was cut short, and the parts that it has; empty if there is none."""
        try:
            candidates = self._bucket.call("list_multipart_uploads", Prefix=self._key, attempts=2).get("Uploads", [])
            uploads = sorted(
                (upload for upload in candidates if upload["Key"] == self._key),
                key=lambda upload: str(upload.get("Initiated")),
            )
            if not uploads:
                return ""
            upload_id = str(uploads[-1]["UploadId"])
            self._known = dict(self._listed_parts(upload_id))
        except (ModelStoreError, KeyError) as error:
            logger.debug("no earlier upload of %s: %s", self._key, error)
            return ""
        return upload_id

    def _listed_parts(self, upload_id: str) -> Iterator[tuple[int, tuple[str, int]]]:
        marker = 0
        while True:
            page = self._bucket.call("list_parts", Key=self._key, UploadId=upload_id, PartNumberMarker=marker)
            for part in page.get("Parts", []):
                yield int(part["PartNumber"]), (str(part["ETag"]), int(part["Size"]))
            if not page.get("IsTruncated"):
                return
            marker = int(page["NextPartNumberMarker"])

    def _send_whole(self) -> None:
        if self._bucket.stopped.is_set():
            return
        self._progress.begin(self._name, self._size)
        self._bucket.put(self._key, durable.read_file(self._path, self._size))
        self._count(self._size, sent=True)

    def _send_part(self, number: int) -> None:
        if self._bucket.stopped.is_set():
            return
        self._progress.begin(self._name, self._size)
        offset = (number - 1) * self._part_bytes
        length = min(self._part_bytes, self._size - offset)
        with durable.opened(self._path) as fd:
            data = os.pread(fd, length, offset)
        etag, size = self._known.get(number, ("", 0))
        if size == length and etag.strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest():
            self._etags[number] = etag
            self._count(length, sent=False)
            return
        answer = self._bucket.call(
            "upload_part",
            Key=self._key,
            UploadId=self._upload_id,
            PartNumber=number,
            Body=data,
            ContentMD5=md5_of(data),
        )
        self._etags[number] = str(answer["ETag"])
        self._count(length, sent=True)

    def _count(self, size: int, *, sent: bool) -> None:
        """Bytes that are on the volume now, sent by this process or before."""
        self._progress.add(self._name, done=size, **{"network" if sent else "reused": size})
        self._observer.filling(self._snapshot.key, self._progress)

    def _complete(self) -> None:
        """Completing a large upload may take longer than the server's own time limit: then the object's size tells."""
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in sorted(self._etags.items())]
        for attempt in range(ATTEMPTS):
            try:
                self._bucket.call(
                    "complete_multipart_upload",
                    Key=self._key, UploadId=self._upload_id, MultipartUpload={"Parts": parts}, attempts=1,
                )  # fmt: skip
                return
            except VolumeUnavailable as error:
                logger.info("completing %s: %s", self._key, error)
            if self._bucket.size(self._key) == self._size:
                return
            self._bucket.pause(attempt)
        raise VolumeUnavailable(f"{self._bucket.target}: {self._key} is not completed: try again, its parts are there")


def _all_of(pool: ThreadPoolExecutor, jobs: list[Callable[[], None]]) -> None:
    """Run all; raise the first error, without waiting for the rest."""
    done, _left = wait([pool.submit(job) for job in jobs], return_when=FIRST_EXCEPTION)
    for failed in done:
        failed.result()
