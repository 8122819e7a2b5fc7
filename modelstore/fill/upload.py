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

import base64
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from modelstore.errors import (
    AccessDenied,
    IntegrityError,
    ModelStoreError,
    NoSpace,
    NotFound,
    ObjectMissing,
    UsageError,
    VolumeUnavailable,
)
from modelstore.fill.observer import SILENT, Observer
from modelstore.fill.progress import Progress
from modelstore.volume import durable, refs
from modelstore.volume.layout import MANIFEST, Layout
from modelstore.volume.manifest import FileRecord, parse_manifest
from modelstore.volume.snapshots import Snapshot

PART_BYTES = 32 << 20
_MAX_PARTS = 10_000
_AT_ONCE = 8
_ATTEMPTS = 8
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 522, 524})
_FULL = 507

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """A store's folder on a volume, as S3 names it."""

    volume: str
    datacenter: str
    folder: str = "modelstore"

    def __str__(self) -> str:
        return f"s3://{self.volume}@{self.datacenter}"

    @property
    def endpoint(self) -> str:
        """RunPod's address for the datacenter."""
        return f"https://s3api-{self.datacenter.lower()}.runpod.io"


def parse_target(text: str) -> Target:
    """`s3://<volume-id>@<datacenter>[/<folder>]`. Raises UsageError."""
    try:
        parts = urlsplit(text)
    except ValueError:
        parts = urlsplit("")
    volume, at, datacenter = parts.netloc.partition("@")
    plain = all(part and part.replace("-", "").isalnum() and part.isascii() for part in (volume, datacenter))
    folder = parts.path.strip("/") or "modelstore"
    if parts.scheme != "s3" or not at or not plain or ".." in folder or parts.query or parts.fragment:
        raise UsageError(f"{text!r} is no volume: write it like s3://abc123def@EU-RO-1")
    return Target(volume, datacenter, folder)


class RemoteVolume:
    """One volume over S3."""

    def __init__(
        self, target: Target, *, endpoint: str | None = None, sleep: Callable[[float], object] | None = None
    ) -> None:
        """`endpoint`: another address than RunPod's. Credentials are boto3's: AWS_ACCESS_KEY_ID and the like.

        Raises NotFound if boto3 is not installed, AccessDenied if there are no credentials.
        """
        try:
            import boto3
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError
        except ModuleNotFoundError as error:
            raise NotFound("boto3 is not installed: pip install 'runpod-modelstore[s3]'") from error
        self.target = target
        self.stopped = threading.Event()
        self._sleep = sleep or self.stopped.wait
        config = Config(
            s3={"addressing_style": "path"},
            max_pool_connections=2 * _AT_ONCE,
            retries={"total_max_attempts": 1},  # tried again here, by the meaning of RunPod's answers
            connect_timeout=10,
            read_timeout=120,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        try:
            session = boto3.Session(region_name=target.datacenter)
            has_credentials = session.get_credentials() is not None
        except BotoCoreError as error:  # half a pair, a profile that is not there
            raise AccessDenied(f"the S3 keys cannot be used: {error}") from error
        if not has_credentials:
            raise AccessDenied(
                "there are no S3 keys: make a pair in RunPod's settings, and set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY"
            )
        self._client: Any = session.client("s3", endpoint_url=endpoint or target.endpoint, config=config)

    def has(self, snapshot: Snapshot) -> bool:
        """Whether the volume holds this snapshot, every file with its size."""
        data = self._read(self._key(snapshot, MANIFEST))
        if data is None:
            return False
        try:
            manifest = parse_manifest(data, where=str(self.target))
        except ModelStoreError as error:
            logger.warning("%s: %s: it is written again", self.target, error)
            return False
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            sizes = pool.map(lambda file: self._size(self._key(snapshot, file.path)), manifest.files)
            return all(size == file.size_bytes for size, file in zip(sizes, manifest.files, strict=True))

    def verify(self, snapshot: Snapshot) -> None:
        """Read all of it back and compare. Raises IntegrityError."""

        def compare(path: str, size: int, sha256: str) -> None:
            digest = hashlib.sha256()
            try:
                for start in range(0, size, PART_BYTES):
                    digest.update(self._body(self._key(snapshot, path), start, min(start + PART_BYTES, size) - 1))
            except ObjectMissing:
                digest = hashlib.sha256(b"?")
            if digest.hexdigest() != sha256:
                self.call("delete_object", Key=self._key(snapshot, MANIFEST))
                raise IntegrityError(
                    f"{self.target}: {path} of {snapshot.key} differs from the uploaded file: unpublished, "
                    "upload it again"
                )

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            _all_of(
                pool, [partial(compare, file.path, file.size_bytes, file.sha256) for file in snapshot.manifest.files]
            )

    def upload(self, snapshot: Snapshot, *, observer: Observer = SILENT) -> int:
        """Send the files that the volume lacks of a snapshot, the manifest last; returns how many bytes were sent.

        Raises NoSpace, AccessDenied, NotFound, IntegrityError, VolumeUnavailable.
        """
        self._check_format()
        progress = Progress(snapshot.size_bytes)
        files = [_Upload(self, snapshot, file, progress, observer) for file in snapshot.manifest.files]
        pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="s3")
        try:
            _all_of(pool, [file.begin for file in files])
            _all_of(pool, [part for file in files for part in file.parts()])
            _all_of(pool, [file.end for file in files])
        except BaseException as error:
            self.stopped.set()  # the waits before new attempts end; a part that is on its way is not waited for
            pool.shutdown(wait=not isinstance(error, KeyboardInterrupt), cancel_futures=True)
            if not isinstance(error, KeyboardInterrupt):
                self.stopped.clear()  # for the next snapshot
            raise
        pool.shutdown()
        manifest = durable.read_file(snapshot.path / MANIFEST, durable.MANIFEST_BYTES)
        self._put(self._key(snapshot, MANIFEST), manifest)
        if self._read(self._key(snapshot, MANIFEST)) != manifest:
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

    def record_commit(self, layout: Layout, snapshot: Snapshot, revision: str) -> None:
        """Let workers on that volume use this commit for the revision."""
        for name in refs.recorded_revisions(snapshot.repo_id, revision):
            path = layout.ref(snapshot.repo_id, name).relative_to(layout.root)
            self._put(f"{self.target.folder}/{path}", refs.commit_record(name, snapshot.commit))

    def _check_format(self) -> None:
        key = f"{self.target.folder}/FORMAT"
        data = self._read(key)
        if data is None:
            self._put(key, refs.FORMAT_BYTES)
        else:
            refs.check_format_bytes(data, store=str(self.target))

    def _key(self, snapshot: Snapshot, path: str) -> str:
        return "/".join((self.target.folder, "models", *snapshot.key.parts, path))

    def _put(self, key: str, data: bytes) -> None:
        self.call("put_object", Key=key, Body=data, ContentMD5=_md5(data))

    def _read(self, key: str) -> bytes | None:
        try:
            return self._body(key)
        except ObjectMissing:
            return None

    def _body(self, key: str, start: int | None = None, last: int | None = None) -> bytes:
        """An object's bytes, or a range of them; a connection that breaks meanwhile is made again."""
        from botocore.exceptions import BotoCoreError

        how: dict[str, Any] = {} if start is None else {"Range": f"bytes={start}-{last}"}
        for attempt in range(_ATTEMPTS):
            try:
                return bytes(self.call("get_object", Key=key, **how)["Body"].read())
            except (BotoCoreError, OSError) as error:
                reason = type(error).__name__
                self.pause(attempt)
        raise VolumeUnavailable(f"{self.target} breaks off while {key} is read ({reason}): try again later")

    def _head(self, key: str) -> tuple[int | None, str]:
        """An object's size and tag; None and nothing if there is none."""
        try:
            head = self.call("head_object", Key=key)
        except ObjectMissing:
            return None, ""
        return int(head["ContentLength"]), str(head.get("ETag", "")).strip('"')

    def _size(self, key: str) -> int | None:
        return self._head(key)[0]

    def pause(self, attempt: int) -> None:
        """Wait before the next attempt, longer each time; not at all if the upload is given up."""
        self._sleep(min(30.0, 0.5 * 2**attempt))

    def call(self, operation: str, *, attempts: int = _ATTEMPTS, **arguments: Any) -> Any:
        """One request, again and again if the answer means that this may help."""
        from botocore.exceptions import BotoCoreError, ClientError

        for attempt in range(attempts):
            try:
                return getattr(self._client, operation)(Bucket=self.target.volume, **arguments)
            except ClientError as error:
                status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
                code = str(error.response.get("Error", {}).get("Code", ""))
                if (failed := self._meaning(status, code, arguments.get("Key", ""))) is not None:
                    raise failed from error
                reason = f"{status} {code}"
            except BotoCoreError as error:  # the network
                reason = type(error).__name__
            if attempt + 1 < attempts and not self.stopped.is_set():
                self.pause(attempt)
        raise VolumeUnavailable(
            f"{self.target} does not take {operation} ({reason}): try again later, it goes on from here"
        )

    def _meaning(self, status: int, code: str, key: str) -> Exception | None:
        """The error that an answer stands for; None if the same request may succeed later."""
        if status == _FULL or code in ("InsufficientStorage", "QuotaExceeded"):
            return NoSpace(f"{self.target} is full: remove a model there, or enlarge the volume")
        if code == "NoSuchBucket":
            return NotFound(f"{self.target}: there is no such volume in this datacenter: look at its page")
        if code == "NoSuchUpload" or status == 404:
            return ObjectMissing(f"{self.target} has no {key or code} any more: try again, it goes on from here")
        if status in (401, 403):
            return AccessDenied(f"{self.target} refuses these S3 keys ({code}): a pair belongs to one account")
        if code == "BadDigest":
            return None
        return None if status in _BUSY or not status else VolumeUnavailable(f"{self.target} answers {status} {code}")


class _Upload:
    """One file on its way: `begin`, then all `parts` in any order, then `end`."""

    def __init__(
        self, volume: RemoteVolume, snapshot: Snapshot, file: FileRecord, progress: Progress, observer: Observer
    ) -> None:
        self._volume = volume
        self._snapshot = snapshot
        self._name = file.path
        self._path = snapshot.path / file.path
        self._key = volume._key(snapshot, file.path)
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
        size, etag = self._volume._head(self._key)
        if size == self._size and etag == self._whole_etag():
            self._there = True
            self._count(self._size, sent=False)
        else:
            self._upload_id = (
                self._open_upload() or self._volume.call("create_multipart_upload", Key=self._key)["UploadId"]
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
        if (size := self._volume._size(self._key)) != self._size:
            raise IntegrityError(
                f"{self._volume.target}: {self._key} has {size} bytes, not {self._size}: upload it again"
            )

    def _whole_etag(self) -> str:
        """S3's tag of an object that was sent in these parts: the MD5 of their MD5s."""
        fd = durable.open_for_read(self._path)
        try:
            parts = [
                hashlib.md5(os.pread(fd, self._part_bytes, offset), usedforsecurity=False).digest()
                for offset in range(0, self._size, self._part_bytes)
            ]
        finally:
            os.close(fd)
        return f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"

    def _open_upload(self) -> str:
        """An upload of this file that was cut short, and the parts that it has; empty if there is none."""
        try:
            candidates = self._volume.call("list_multipart_uploads", Prefix=self._key, attempts=2).get("Uploads", [])
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
            page = self._volume.call("list_parts", Key=self._key, UploadId=upload_id, PartNumberMarker=marker)
            for part in page.get("Parts", []):
                yield int(part["PartNumber"]), (str(part["ETag"]), int(part["Size"]))
            if not page.get("IsTruncated"):
                return
            marker = int(page["NextPartNumberMarker"])

    def _send_whole(self) -> None:
        if self._volume.stopped.is_set():
            return
        self._progress.begin(self._name, self._size)
        self._volume._put(self._key, durable.read_file(self._path, self._size))
        self._count(self._size, sent=True)

    def _send_part(self, number: int) -> None:
        if self._volume.stopped.is_set():
            return
        self._progress.begin(self._name, self._size)
        offset = (number - 1) * self._part_bytes
        length = min(self._part_bytes, self._size - offset)
        fd = durable.open_for_read(self._path)
        try:
            data = os.pread(fd, length, offset)
        finally:
            os.close(fd)
        etag, size = self._known.get(number, ("", 0))
        if size == length and etag.strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest():
            self._etags[number] = etag
            self._count(length, sent=False)
            return
        answer = self._volume.call(
            "upload_part", Key=self._key, UploadId=self._upload_id, PartNumber=number, Body=data, ContentMD5=_md5(data)
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
        for attempt in range(_ATTEMPTS):
            try:
                self._volume.call(
                    "complete_multipart_upload",
                    Key=self._key, UploadId=self._upload_id, MultipartUpload={"Parts": parts}, attempts=1,
                )  # fmt: skip
                return
            except VolumeUnavailable as error:
                logger.info("completing %s: %s", self._key, error)
            if self._volume._size(self._key) == self._size:
                return
            self._volume.pause(attempt)
        raise VolumeUnavailable(f"{self._volume.target}: {self._key} is not completed: try again, its parts are there")


def _all_of(pool: ThreadPoolExecutor, jobs: list[Callable[[], None]]) -> None:
    """Run all; raise the first error, without waiting for the rest."""
    done, _left = wait([pool.submit(job) for job in jobs], return_when=FIRST_EXCEPTION)
    for failed in done:
        failed.result()


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
