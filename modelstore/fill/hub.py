"""The Hub as a source: metadata and auth through huggingface_hub, bytes by HTTP ranges (`http_range.py`).

The library's own download is not used because it cannot resume in another process and accepts wrong bytes of the right
size. Every error of the library and of HTTP becomes one of ours here; none of them ever carries a token or the query
string of a signed address.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import huggingface_hub
from huggingface_hub import HfApi, RepoFile, hf_hub_url
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

from modelstore.environment import trust_authorities
from modelstore.errors import (
    AccessDenied,
    DigestMismatch,
    HubUnavailable,
    ModelStoreError,
    NotFound,
    RepoNotFound,
    RevisionNotFound,
)
from modelstore.fill.http_range import open_url, proxies, proxy_of
from modelstore.fill.source import ByteStream, Resolved, Source, SourceFile, backoff_s
from modelstore.reference import Reference, is_commit, is_local, is_repo_id
from modelstore.settings import Settings
from modelstore.volume.manifest import SourceRecord

_TIMEOUT_S = 30.0
_METADATA_ATTEMPTS = 5
_METADATA_LIMIT_S = 120.0
_METADATA_PATIENCE_S = 15.0  # the library tries a listing again by itself, for 23 s
_CONFIRMED_WITHIN_S = 10.0  # for a listing that a cache is compared with: a Hub that is down must not hold up a start
_MAX_REDIRECTS = 5
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})

# The library's HTTP stack is httpx in some versions and httpx2 in others; both derive their errors from this class.
_HTTPError: type[Exception] = getattr(hub_errors, "HTTPError")  # noqa: B009  not exported, so mypy does not see it

T = TypeVar("T")

logger = logging.getLogger(__name__)

# The HTTP libraries log every address they ask for, and a storage address carries its signature in the query.
for _name in ("httpx", "httpx2", "httpcore", "httpcore2"):
    logging.getLogger(_name).setLevel(logging.WARNING)
# The library reports each attempt; the error reports it once.
logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)


def check_token(settings: Settings) -> str:
    """The account that HF_TOKEN belongs to. Raises AccessDenied, HubUnavailable."""
    try:
        name = HfApi(endpoint=settings.hf_endpoint, token=settings.hf_token).whoami()["name"]
    except (hub_errors.HfHubHTTPError, _HTTPError, OSError) as error:
        response = getattr(error, "response", None)
        if response is not None and response.status_code in (401, 403):
            raise AccessDenied("the Hub does not know HF_TOKEN: copy it again, or make a new one") from error
        raise HubUnavailable(f"{settings.hf_endpoint} cannot be asked about HF_TOKEN: try again later") from error
    return str(name)


class HubSource(Source):
    """One model on the Hub, at the commit that a revision resolves to."""

    over_network = True

    def __init__(
        self,
        reference: Reference,
        settings: Settings,
        *,
        attempts: int | None = None,
        limit_s: float | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`attempts`, and `limit_s` for each: how often, and how long, metadata is asked for, if not as usual."""
        self._attempts = _METADATA_ATTEMPTS if attempts is None else attempts
        self._limit_s = _METADATA_LIMIT_S if limit_s is None else limit_s
        trust_authorities()
        proxies()
        self._reference = reference
        self._endpoint = settings.hf_endpoint
        self._token = settings.hf_token
        self._api = HfApi(endpoint=settings.hf_endpoint, token=settings.hf_token)
        self._sleep = sleep
        self._locations: dict[str, str] = {}
        self._locations_lock = threading.Lock()

    def resolve(self) -> Resolved:
        """The commit that the revision stands for now, of the repo by the id that the Hub gives it: one metadata
        call."""
        name, revision = self._reference.name, self._reference.revision
        record = SourceRecord(kind="hub", location=self._endpoint, revision=revision, compared_with="hub")
        if is_local(name) and is_commit(revision):  # for a snapshot that is present: no Hub knows it
            return Resolved(name, revision, revision, record)
        info = self._info()
        commit = revision if is_commit(revision) else info.sha or ""
        if not is_commit(commit):
            raise HubUnavailable(f"{self._endpoint} gave no commit for {self._reference}: try again later")
        return Resolved(self._repo_id(info), commit, revision, record)

    def described(self) -> tuple[str, tuple[SourceFile, ...]]:
        """The id that the Hub gives the repo, and the files of the revision: one call for both."""
        info = self._info(files_metadata=True)
        files = [
            SourceFile(each.rfilename, each.size or 0, each.lfs.sha256)
            if each.lfs
            else SourceFile(each.rfilename, each.size or 0, git_oid=each.blob_id)
            for each in info.siblings or ()
        ]
        return self._repo_id(info), tuple(files)

    def _info(self, *, files_metadata: bool = False) -> huggingface_hub.ModelInfo:
        name, revision = self._reference.name, self._reference.revision
        return self._retrying(
            lambda: self._api.model_info(name, revision=revision, files_metadata=files_metadata, timeout=_TIMEOUT_S)
        )

    def _repo_id(self, info: huggingface_hub.ModelInfo) -> str:
        """The id of the repo, which may be another one than it was asked for by; that is reported."""
        name = self._reference.name
        if info.id == name or not is_repo_id(info.id or "") or is_local(info.id):
            return name
        logger.warning("%s is called %s on the Hub: it is stored and listed under that name", name, info.id)
        return info.id

    def reach(self) -> str:
        return f"is within reach, at {self.resolve().commit[:12]}"

    def may_bring_code(self, resolved: Resolved, settings: Settings, *, named: Reference | None) -> bool:
        names = {resolved.repo_id, self._reference.name}
        return any(settings.may_run_code_of(name, resolved.commit, named=named) for name in names)

    def list_files(self, resolved: Resolved) -> tuple[SourceFile, ...]:
        """Every file of the commit with its size and digest as the Hub states them."""
        entries = self._retrying(
            lambda: list(self._api.list_repo_tree(resolved.repo_id, recursive=True, revision=resolved.commit))
        )
        return tuple(
            SourceFile(
                path=entry.path,
                size_bytes=entry.lfs.size if entry.lfs else entry.size,
                sha256=entry.lfs.sha256 if entry.lfs else None,
                git_oid=None if entry.lfs else entry.blob_id,
            )
            for entry in entries
            if isinstance(entry, RepoFile)
        )

    @contextmanager
    def open(self, resolved: Resolved, file: SourceFile, offset: int, length: int) -> Iterator[ByteStream]:
        """Stream `length` bytes from `offset`; a server that ignores ranges gives a stream that starts at 0."""
        headers = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
        if length == 0:
            yield ByteStream(offset, lambda _view: 0)
            return
        with self._own_errors(file.path), self._response(resolved, file, headers) as response:
            total = _total_size(response)
            if total is not None and total != file.size_bytes:
                raise DigestMismatch(
                    f"{file.path} of {resolved.repo_id} has {total} bytes and the Hub states {file.size_bytes}: "
                    "nothing was published; tell the repo's owner, or name another revision"
                )
            yield ByteStream(offset if response.status == 206 else 0, response.readinto)

    @contextmanager
    def _response(self, resolved: Resolved, file: SourceFile, headers: dict[str, str]) -> Iterator[HTTPResponse]:
        """The streaming response with the bytes, redirects followed; the token goes to the Hub's own host only."""
        hub_url = hf_hub_url(resolved.repo_id, file.path, revision=resolved.commit, endpoint=self._endpoint)
        auth = build_hf_headers(token=self._token)
        with self._locations_lock:
            known = self._locations.get(file.path)
        url = known or hub_url
        for _ in range(_MAX_REDIRECTS):
            sent = (auth if _same_host(url, hub_url) else {}) | headers
            with open_url(url, sent, timeout_s=_TIMEOUT_S) as response:
                if response.status in (301, 302, 303, 307, 308) and response.headers["Location"]:
                    url = urljoin(url, response.headers["Location"])
                    with self._locations_lock:
                        self._locations[file.path] = url
                    continue
                if known and url == known and response.status in (401, 403, 404, 410):
                    known, url = None, hub_url  # the signed address has expired: ask for a new one
                    continue
                if response.status not in (200, 206):
                    self._raise_for(response, file, url, hub_url, sent)
                yield response
                return
        raise HubUnavailable(f"{file.path} of {resolved.repo_id}: redirected more than {_MAX_REDIRECTS} times")

    def _raise_for(
        self, response: HTTPResponse, file: SourceFile, url: str, hub_url: str, sent: dict[str, str]
    ) -> None:
        """Raise for a response without bytes. The Hub's library knows the meaning of the Hub's own answers: it asks
        again."""
        if response.status not in _BUSY and _same_host(url, hub_url):
            hf_raise_for_status(get_session().head(hub_url, headers=sent, follow_redirects=False, timeout=_TIMEOUT_S))
        if response.status == 416:
            raise DigestMismatch(f"{file.path} is shorter than the Hub states: nothing was published")
        raise HubUnavailable(
            f"{_host(url)} answers {response.status} for {file.path} of {self._reference.name}: try again later",
            retry_after_s=_retry_after(response),
        )

    def _retrying(self, call: Callable[[], T]) -> T:
        if is_local(self._reference.name):
            raise RepoNotFound(
                f"{self._reference} was made of a folder, and no Hub is asked for it: seed it from there, file:///…"
            )
        began = time.monotonic()
        for attempt in range(1, self._attempts + 1):
            try:
                with self._own_errors("its metadata"):
                    return _within(self._limit_s, call)
            except HubUnavailable as error:
                if attempt == self._attempts or time.monotonic() - began > _METADATA_PATIENCE_S:
                    raise
                self._sleep(backoff_s(attempt, error.retry_after_s))
        raise AssertionError("unreachable")

    @contextmanager
    def _own_errors(self, label: str) -> Iterator[None]:
        try:
            yield
        except ModelStoreError:
            raise
        except hub_errors.HFValidationError as error:
            raise RepoNotFound(f"{self._reference} is not a name that the Hub accepts: check its spelling") from error
        except hub_errors.OfflineModeIsEnabled as error:
            raise HubUnavailable(
                "HF_HUB_OFFLINE is set: unset it to download, or use the models on the volume"
            ) from error
        except hub_errors.HfHubHTTPError as error:
            raise self._explained(error, label) from None  # the original shows addresses, signed ones among them
        except (_HTTPError, HTTPException, OSError, ValueError) as error:  # ValueError: an answer that is not JSON
            raise HubUnavailable(
                f"{_host(self._endpoint)} could not be reached for {label} of {self._reference.name} "
                f"{_obstacle(error, self._endpoint)}, then try again"
            ) from None

    def _explained(self, error: hub_errors.HfHubHTTPError, label: str) -> ModelStoreError:
        name, status = self._reference.name, error.response.status_code
        has_token = self._token or huggingface_hub.get_token()
        hint = "check HF_TOKEN's access to it" if has_token else "set HF_TOKEN"
        match error:
            case hub_errors.GatedRepoError():
                page = f"{self._endpoint}/{name}"
                return AccessDenied(f"{name} is gated: accept its terms at {page} and {hint}")
            case hub_errors.RepositoryNotFoundError():
                return RepoNotFound(
                    f"{name} is not on {_host(self._endpoint)}: check the name; if it is private, {hint}"
                )
            case hub_errors.RevisionNotFoundError():
                return RevisionNotFound(f"{name} has no revision {self._reference.revision!r}: name one that it has")
            case hub_errors.EntryNotFoundError():
                return NotFound(f"{name} lists {label} but does not serve it: try again, or name another revision")
        if status in (401, 403):
            return AccessDenied(f"{_host(self._endpoint)} refuses access to {name} ({status}): {hint}")
        if status in _BUSY:
            return HubUnavailable(
                f"{_host(self._endpoint)} answers {status} for {label} of {name}: it is busy, try again later",
                retry_after_s=_retry_after(error.response),
            )
        return HubUnavailable(f"{_host(self._endpoint)} answers {status} for {label} of {name}: try again later")


def confirmed(source: Source, resolved: Resolved, settings: Settings) -> Resolved | None:
    """The commit that a source offers, once the Hub's listing confirms its files; None if the listing differs.

    A cache names its files by their digests, and by the commit that they are said to be of: every user of the
    volume can make one. If the Hub cannot be asked, or shows this token nothing, its names have to do, and the record
    says so.
    """
    stated: dict[str, SourceFile] = {}
    reason = "MODELSTORE_OFFLINE is set" if settings.offline else ""
    if not reason:
        hub = HubSource(
            Reference("hub", resolved.repo_id, resolved.commit), settings, attempts=1, limit_s=_CONFIRMED_WITHIN_S
        )
        try:
            repo_id, files = hub.described()
            stated = {file.path: file for file in files}
            resolved = replace(resolved, repo_id=repo_id)
        except RevisionNotFound:
            logger.warning("%s: the Hub knows no commit %s: the cache is not used", resolved.repo_id, resolved.commit)
            return None
        except (HubUnavailable, AccessDenied, RepoNotFound) as error:
            reason = str(error)
    if reason:
        logger.warning(
            "the HF cache of %s is taken by its names, not compared with the Hub: %s", resolved.repo_id, reason
        )
        return replace(resolved, record=replace(resolved.record, compared_with="cache"))
    for file in source.list_files(resolved):
        other = stated.get(file.path)
        if other is None or (other.size_bytes, other.sha256, other.git_oid) != (
            file.size_bytes,
            file.sha256 if other.sha256 else None,
            None if other.sha256 else file.git_oid,
        ):
            logger.warning(
                "%s in the HF cache of %s differs from the Hub: the cache is not used",
                file.path,
                resolved.repo_id,
            )
            return None
    if missing := source.lacks(resolved, stated):
        logger.warning("%s lacks %s: it is not used", source.label, missing)
        return None
    return replace(resolved, record=replace(resolved.record, compared_with="hub"))


def _within(limit_s: float, call: Callable[[], T]) -> T:
    """The result of `call`, or TimeoutError: listing a repo's files takes no timeout, and a Hub that accepts the
    connection and stays silent would hold the worker, and all its waiters, for ever."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # handed to the caller
            outcome.set_exception(error)

    threading.Thread(target=run, name="hub-metadata", daemon=True).start()
    return outcome.result(limit_s)


def _retry_after(response: Any) -> float | None:
    text = response.headers.get("Retry-After", "")
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _total_size(response: HTTPResponse) -> int | None:
    text = (
        response.headers.get("Content-Range", "").rpartition("/")[2]
        if response.status == 206
        else response.headers.get("Content-Length", "")
    )
    return int(text) if text.isascii() and text.isdigit() else None


def _obstacle(error: BaseException, endpoint: str) -> str:
    """Why an address could not be reached, and what to do about it."""
    chain: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in chain:
        chain.append(each)
        each = each.__cause__ or each.__context__ or getattr(each, "reason", None)
        each = each if isinstance(each, BaseException) else None
    if any("CERTIFICATE_VERIFY_FAILED" in str(each) for each in chain):
        return (
            "(its certificate is of an authority that this host does not know): set SSL_CERT_FILE to that authority's "
            "file"
        )
    if proxy := proxy_of(endpoint):
        return f"({type(error).__name__}, through the proxy {proxy}): check the proxy, HTTPS_PROXY and ALL_PROXY"
    return f"({type(error).__name__}): check the network and HF_ENDPOINT"


def _same_host(url: str, other: str) -> bool:
    a, b = urlsplit(url), urlsplit(other)
    return (a.scheme, a.hostname, a.port) == (b.scheme, b.hostname, b.port)


def _host(endpoint: str) -> str:
    return urlsplit(endpoint).netloc
