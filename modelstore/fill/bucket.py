"""A network volume as RunPod's S3 API shows it: one bucket, its requests, and the meaning of its answers.

Differences from Amazon's: completing many parts may end in 524 or a timeout though it is done, and 507 means that the
volume is full. A request that may succeed later is sent again.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from modelstore.errors import (
    AccessDenied,
    AlreadyThere,
    NoSpace,
    NotFound,
    ObjectMissing,
    UsageError,
    VolumeUnavailable,
)

logger = logging.getLogger(__name__)

ATTEMPTS = 8
AT_ONCE = 8
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 522, 524})
_FULL = 507


@dataclass(frozen=True, slots=True)
class Target:
    """A store's folder on a volume, as S3 names it."""

    volume: str
    datacenter: str
    folder: str = "modelstore"

    def __str__(self) -> str:
        folder = "" if self.folder == "modelstore" else f"/{self.folder}"
        return f"s3://{self.volume}@{self.datacenter}{folder}"

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


class Bucket:
    """The objects of one volume."""

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
            max_pool_connections=2 * AT_ONCE,
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
        credentials = session.get_credentials().get_frozen_credentials()
        if any(each != each.strip() for each in (credentials.access_key, credentials.secret_key)):
            raise AccessDenied("an S3 key begins or ends with a blank or a line break: copy it again")
        self._takes_conditions: bool | None = None
        self.client: Any = session.client("s3", endpoint_url=endpoint or target.endpoint, config=config)

    def put(self, key: str, data: bytes) -> None:
        """Write a small object."""
        self.call("put_object", Key=key, Body=data, ContentMD5=md5_of(data))

    def put_if_new(self, key: str, data: bytes) -> bool:
        """Write a small object unless there is one; False if there is. Where the server does not take conditions, the
        last of two writers wins."""
        if self._takes_conditions is None:
            self._takes_conditions = self._finds_conditions()
        if not self._takes_conditions:
            if self.read(key) is not None:
                return False
            self.put(key, data)
            return True
        return self._put_new(key, data)

    def _put_new(self, key: str, data: bytes) -> bool:
        try:
            self.call("put_object", Key=key, Body=data, ContentMD5=md5_of(data), IfNoneMatch="*")
        except AlreadyThere:
            return False
        return True

    def _finds_conditions(self) -> bool:
        """Whether the server refuses to write an object that is there, if it is asked to: found by trial."""
        key = f"{self.target.folder}/trash/doctor-{secrets.token_hex(4)}/condition"
        try:
            return self._put_new(key, b"1") and not self._put_new(key, b"2")
        except VolumeUnavailable as error:
            logger.debug("%s takes no conditions: %s", self.target, error)
            return False
        finally:
            self.call("delete_object", Key=key)

    def read(self, key: str) -> bytes | None:
        """A small object's bytes; None if there is none."""
        try:
            return self.body(key)
        except ObjectMissing:
            return None

    def body(self, key: str, start: int | None = None, last: int | None = None) -> bytes:
        """An object's bytes, or a range of them; a connection that breaks meanwhile is made again."""
        from botocore.exceptions import BotoCoreError

        how: dict[str, Any] = {} if start is None else {"Range": f"bytes={start}-{last}"}
        most = None if start is None or last is None else last - start + 1  # a server may send all of it
        for attempt in range(ATTEMPTS):
            try:
                return bytes(self.call("get_object", Key=key, **how)["Body"].read(most))
            except (BotoCoreError, OSError) as error:
                reason = type(error).__name__
                self.pause(attempt)
        raise VolumeUnavailable(f"{self.target} breaks off while {key} is read ({reason}): try again later")

    def listed(self, prefix: str) -> Iterator[str]:
        """The keys right below a prefix that ends with a slash, and the prefixes of what lies deeper. Slow on a large
        volume."""
        more: dict[str, Any] = {}
        tokens: set[str] = set()
        while True:
            page = self.call("list_objects_v2", Prefix=prefix, Delimiter="/", **more)
            yield from (str(each["Key"]) for each in page.get("Contents", []))
            yield from (str(each["Prefix"]) for each in page.get("CommonPrefixes", []))
            if not page.get("IsTruncated"):
                return
            token = str(page.get("NextContinuationToken", ""))
            if not token or token in tokens:
                raise VolumeUnavailable(f"{self.target} does not go on with its listing of {prefix}: try again later")
            tokens.add(token)
            more = {"ContinuationToken": token}

    def head(self, key: str) -> tuple[int | None, str]:
        """An object's size and tag; None and nothing if there is none."""
        try:
            head = self.call("head_object", Key=key)
        except ObjectMissing:
            return None, ""
        return int(head["ContentLength"]), str(head.get("ETag", "")).strip('"')

    def size(self, key: str) -> int | None:
        """An object's size in bytes; None if there is none."""
        return self.head(key)[0]

    def pause(self, attempt: int) -> None:
        """Wait before the next attempt, longer each time; not at all if the upload is given up."""
        self._sleep(min(30.0, 0.5 * 2**attempt))

    def call(self, operation: str, *, attempts: int = ATTEMPTS, **arguments: Any) -> Any:
        """One request, again and again if the answer means that this may help."""
        from botocore.exceptions import BotoCoreError, ClientError

        for attempt in range(attempts):
            try:
                return getattr(self.client, operation)(Bucket=self.target.volume, **arguments)
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
        if status == 412 or code in ("PreconditionFailed", "ConditionalRequestConflict"):
            return AlreadyThere(f"{self.target} has {key} already")
        if code == "NoSuchBucket":
            return NotFound(f"{self.target}: there is no such volume in this datacenter: look at its page")
        if code == "NoSuchUpload" or status == 404:
            return ObjectMissing(f"{self.target} has no {key or code} any more: try again, it goes on from here")
        if status in (401, 403):
            return AccessDenied(f"{self.target} refuses these S3 keys ({code}): a pair belongs to one account")
        if code == "BadDigest":
            return None
        return None if status in _BUSY or not status else VolumeUnavailable(f"{self.target} answers {status} {code}")


def md5_of(data: bytes) -> str:
    """The MD5 of `data` as S3's headers have it."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
