"""From a claim to a published snapshot: download, convert beside it, publish.

    source ──ranges──▶ staging/source ──verified──▶ convert or move ──▶ staging/snapshot ──one rename──▶ models/

Each finished file leaves a record under `done/`, so that another process, on another host, goes on with the files that
are missing and trusts the others only after comparing their blocks. Nothing here reads the network but through a
source, and nothing reaches `models/` but by `durable.publish_folder`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from modelstore.dtypes import DTYPES, Dtype
from modelstore.errors import (
    ClaimLost,
    CodeRefused,
    DigestMismatch,
    IntegrityError,
    ModelStoreError,
    NoSpace,
    Refused,
)
from modelstore.fill.convert import (
    StoragePolicy,
    config_in_dtype,
    convert_file,
    converted_tensors,
    read_header,
    storage_policy,
)
from modelstore.fill.download import Download
from modelstore.fill.footprint import named_dtype, stored_ratio
from modelstore.fill.indexes import check_index, index_of_converted, index_with_total_size, parse_json
from modelstore.fill.observer import Observer
from modelstore.fill.peak import Peak
from modelstore.fill.progress import Progress
from modelstore.fill.selection import MAX_SMALL_BYTES, Selection, code_in, is_pickle, select_files, stored_path
from modelstore.fill.source import Resolved, Source, SourceFile
from modelstore.fill.staging import FinishedFiles
from modelstore.settings import Settings
from modelstore.timeline import Span, Timeline
from modelstore.volume import durable
from modelstore.volume.checksums import Digests, RunningDigests, digests_of_file, has_blocks
from modelstore.volume.claim import Claim, generations
from modelstore.volume.config_sizes import Sizes
from modelstore.volume.header import Header
from modelstore.volume.layout import MANIFEST, Layout, SnapshotKey, StagingLayout
from modelstore.volume.manifest import FileRecord, Manifest, Origin
from modelstore.volume.snapshots import Snapshot
from modelstore.volume.space import Space

logger = logging.getLogger(__name__)

_CHECK_EVERY_S = 0.05
_CONVERSIONS = max(1, min(4, (os.cpu_count() or 2) // 2))
_WAITING_CONVERSIONS = 2


@dataclass(frozen=True, slots=True)
class Filled:
    """What a fill did; sizes in bytes. `reused` lay in staging already, `network` came over the wire."""

    manifest: Manifest
    reused: int
    network: int


class Fill:
    """Fills one snapshot under one claim. Use once."""

    def __init__(
        self,
        layout: Layout,
        key: SnapshotKey,
        dtype: Dtype,
        source: Source,
        resolved: Resolved,
        claim: Claim,
        *,
        settings: Settings,
        timeline: Timeline,
        observer: Observer,
        damaged: Snapshot | None = None,
        code: bool = False,
        link: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`damaged`: the snapshot that is to be replaced, moved aside; what of it is intact is used again. `code`: the
        repo's Python files may be stored. `link`: take weights that the source has on this volume by a second name,
        where nothing in them is to be converted."""
        durable.check_no_links(layout.root, layout.snapshot(key))
        durable.check_no_links(layout.root, layout.staging(key) / str(claim.generation))
        self._layout = layout
        self._settings = settings
        self._repo: frozenset[str] = frozenset()
        self._has_code = False
        self._space = Space(layout, settings, sleep=sleep)
        self._needed = 0
        self._key = key
        self._dtype: Dtype = dtype
        self._source = source
        self._resolved = resolved
        self._claim = claim
        self._timeline = timeline
        self._observer = observer
        self._staging = StagingLayout(layout.staging(key) / str(claim.generation))
        durable.check_no_links_below(layout.staging(key))
        self._inherited = self._inherit()
        self._progress = Progress()
        self._download = Download(
            source,
            resolved,
            self._staging,
            inherited=self._inherited,
            guard=self._guard,
            progress=self._progress,
            memory=self._memory_if_unchanged,
            sleep=sleep,
        )
        self._checked = 0.0
        self._stopping = False
        self._damaged = damaged
        self._code = code
        self._link = link
        self._finished = FinishedFiles(self._staging, self._inherited, damaged)
        self._peak = Peak({})
        self._headers: dict[str, Header] = {}
        self._policies: dict[str, StoragePolicy] = {}
        self._configs: dict[str, Mapping[str, Any]] = {}
        self._convert_began: float | None = None
        self._lock = threading.Lock()

    def make_room(self, error: NoSpace) -> bool:
        """After a full volume, where evicting is allowed: find what this fill still needs; whether anything went."""
        if not self._settings.evict or self._settings.quota_bytes is not None:  # the quota was seen to before
            return False
        return self._space.make_room(self._key, max(self._needed - self._present_bytes() - error.free_bytes, 1))

    def run(self) -> Filled:
        """Download, convert and publish; returns the manifest that is published.

        Raises what the source and the volume raise. After ClaimLost, HubUnavailable, or NoSpace for a model that would
        fit, the staging stays for a resume; after an IntegrityError, Refused, or NoSpace for one that never can, it is
        removed.
        """
        try:
            durable.make_folder(self._staging.folder)
            with self._timeline.span("download") as span:
                selection = self._select()
                self._fetch_small(selection)
                self._reserve(selection)
                self._fetch_weights(selection)
                span.size_bytes = self._progress.network or self._progress.total
            self._finish_indexes(selection)
            self._check_sizes(selection)
            with self._timeline.span("publish"):
                manifest = self._publish()
        except (IntegrityError, Refused):
            self._remove_staging()
            raise
        except NoSpace as error:
            if not self._space.could_fit(self._needed, error):
                self._remove_staging()
            raise
        except OSError:
            self._claim.check()  # a successor moves our staging away under us: then that is what happened
            raise
        return Filled(manifest, self._progress.reused, self._progress.network)

    def _remove_staging(self) -> None:
        for staging in (self._staging, *self._inherited):
            durable.remove_tree(staging.folder)

    def _inherit(self) -> list[StagingLayout]:
        """Earlier generations' staging: moved to be ours where nobody can still write there, else to be copied from."""
        staging = self._layout.staging(self._key)
        folders = [staging / str(each) for each in generations(staging) if each < self._claim.generation]
        if folders and self._claim.after_the_dead:
            durable.rename(folders[0], self._staging.folder)
            return []
        return [StagingLayout(folder) for folder in folders]

    def _select(self) -> Selection:
        files = self._source.list_files(self._resolved)
        self._repo = frozenset(file.path for file in files)
        return select_files(
            files,
            self._read_small,
            repo_id=self._key.repo_id,
            pickles=self._settings.allow_pickle,
            code=self._code,
            variant=DTYPES[self._dtype].file_variant,
        )

    def _check_code(self, selection: Selection) -> None:
        """Refuse a repo whose configs name code, unless that was asked for; what was asked for is in the manifest."""
        for file in selection.small:
            path = self._staging.snapshot_file(stored_path(file.path))
            found = code_in(file.path, _read(path), self._repo) if file.path.endswith(".json") else ""
            if found and not self._code:
                raise CodeRefused(
                    f"{self._key.repo_id} brings code of its own ({found}): read it, then name the commit in full "
                    f"({self._key.repo_id}@{self._key.commit}) with --trust-remote-code, or use another repo"
                )
            self._has_code = self._has_code or bool(found)

    def _read_small(self, file: SourceFile) -> bytes:
        data: list[bytes] = []
        self._download.fetch([file], lambda _file, path, _digests: data.append(_read(path)))
        return data[0]

    def _fetch_small(self, selection: Selection) -> None:
        # Choosing the files has fetched the indexes already; they are counted once, here, and not as found in staging.
        fetched = self._progress.done - self._progress.reused
        self._progress.done, self._progress.reused = 0, -fetched
        self._progress.total = selection.size_bytes
        self._download.fetch(self._left(selection.small), self._keep_small)
        self._check_code(selection)
        for folder in {_folder_of(file.path) for file in selection.weights}:
            config = self._config(folder, selection)
            Sizes().check(config, f"{_config_path(folder)} of {self._key.repo_id}")
            self._policies[folder] = policy = storage_policy(self._dtype, config)
            if policy.unchanged_because and self._dtype != "keep":
                logger.warning("%s is stored unchanged: %s", self._key, policy.unchanged_because)

    def _config(self, folder: str, selection: Selection) -> Mapping[str, Any]:
        """A folder's `config.json` as the source has it; the stored one names the storage dtype."""
        path = _config_path(folder)
        if path not in self._configs:
            file = next((file for file in selection.small if file.path == path), None)
            if file is None:
                return self._configs.setdefault(path, {})
            rewritten = self._finished.records[path].origin is not None
            data = self._read_small(file) if rewritten else _read(self._staging.snapshot_file(path))
            config = parse_json(data, path)
            self._configs[path] = config if isinstance(config, dict) else {}
        return self._configs[path]

    def _reserve(self, selection: Selection) -> None:
        """Find out what the snapshot and its staging take at their peak, and make sure that the volume has it."""
        self._peak = Peak({file.path: self._sizes(file, selection) for file in selection.weights})
        self._needed = sum(file.size_bytes for file in selection.small) + self._peak.limit
        if all(named_dtype(self._config(_folder_of(file.path), selection)) for file in selection.weights):
            stored = sum(self._sizes(file, selection)[0] for file in selection.weights)
            self._observer.planned(self._key, weights_bytes=stored)
        if self._damaged is not None and self._settings.quota_bytes is not None:
            self._drop_what_is_wrong(self._damaged)  # a quota has no room for bytes that are of no use
        self._space.reserve(
            self._key,
            self._claim,
            self._needed,
            present_bytes=self._present_bytes() + sum(f.size_bytes for f in selection.weights if self._linkable(f)[0]),
            damaged=self._damaged.path if self._damaged is not None else None,
        )

    def _sizes(self, file: SourceFile, selection: Selection) -> tuple[int, int]:
        """What a weights file takes once it is stored, and what it takes beside that while it is in work."""
        ratio = self._stored_ratio(_folder_of(file.path), selection)
        beside = file.size_bytes if ratio else 0
        if is_pickle(file.path):  # it lies there once more, as safetensors, before it is converted
            beside, ratio = 2 * file.size_bytes, ratio or 1.0
        return int(file.size_bytes * (ratio or 1)), beside

    def _memory_if_unchanged(self, file: SourceFile) -> memoryview | None:
        """Memory for weights that are stored as they come; what is converted asks for some when that begins."""
        if not self._peak.needs_nothing_beside(file.path):
            return None
        return self._observer.memory(self._key, stored_path(file.path), file.size_bytes)

    def _present_bytes(self) -> int:
        return sum(durable.tree_blocks(staging.folder) for staging in (self._staging, *self._inherited))

    def _drop_what_is_wrong(self, damaged: Snapshot) -> None:
        """Remove the files of a quarantined snapshot that are not what its manifest says."""
        for record in damaged.manifest.files:
            if not has_blocks(damaged.path / record.path, record):
                durable.remove_file(damaged.path / record.path)

    def _stored_ratio(self, folder: str, selection: Selection) -> float:
        """Stored bytes for each byte of the original's weights, by the dtype that the config names; 0 where they are
        stored as they come."""
        unchanged = bool(self._policies[folder].unchanged_because)
        return stored_ratio(self._config(folder, selection), self._dtype, unchanged=unchanged)

    def _fetch_weights(self, selection: Selection) -> None:
        left = self._left(selection.weights)
        for file in {*selection.weights} - {*left}:
            self._peak.begin(file.path)
            self._peak.end(file.path)
        workers = _CONVERSIONS
        room = threading.BoundedSemaphore(workers + _WAITING_CONVERSIONS)
        jobs: list[Future[None]] = []
        with ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool:

            def check() -> None:
                for job in jobs:
                    if job.done():
                        job.result()  # a conversion that failed stops the download

            def may_begin(file: SourceFile) -> bool:
                self._guard()
                check()
                return self._peak.begin(file.path)

            def on_file(file: SourceFile, path: Path, digests: Digests) -> None:
                room.acquire()
                check()
                job = pool.submit(self._store_weights, file, path, digests)
                job.add_done_callback(lambda _job: room.release())
                jobs.append(job)

            try:
                left = [file for file in left if not self._linked(file)]
                self._download.fetch(left, on_file, may_begin=may_begin)
            except BaseException:
                self._stopping = True  # conversions end at their next chunk, or Ctrl-C would wait for them
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        for job in jobs:
            job.result()
        self._observer.filling(self._key, self._progress)
        if self._convert_began is not None:
            self._timeline.add(Span("convert", self._convert_began, self._timeline.now()))

    def _linkable(self, file: SourceFile) -> tuple[Path | None, Header | None]:
        """Where a weights file lies on this volume, and its header, if it can be taken as it is."""
        path = self._source.path_of(self._resolved, file) if self._link else None
        if path is None or file.sha256 is None or stored_path(file.path) != file.path:
            return None, None
        header = read_header(path, where=f"{file.path} of {self._key.repo_id}")
        as_it_is = converted_tensors(header, self._policies[_folder_of(file.path)]) is header.tensors
        return (path, header) if as_it_is and path.stat().st_dev == self._layout.root.stat().st_dev else (None, None)

    def _linked(self, file: SourceFile) -> bool:
        """Take a weights file by a second name, after its bytes were compared; False where it has to be copied.

        It has a name of its own until then, which nothing opens to write: what it shares with its owner stays as it is.
        """
        path, header = self._linkable(file)
        if path is None or header is None:
            return False
        target = self._staging.snapshot_file(file.path)
        linked = target.with_name(f"{target.name}.linked")
        durable.make_folder(target.parent)
        try:
            durable.link(path, linked)
        except (ModelStoreError, OSError) as error:
            logger.info("%s is copied: it cannot be linked (%s)", file.path, error)
            return False
        digests = digests_of_file(linked, guard=self._guard)
        if digests.sha256 != file.sha256:
            durable.remove_file(linked)
            raise DigestMismatch(f"{path} is not what its name says it is: remove it, and seed {self._key.repo_id}")
        durable.remove_file(target)
        durable.rename(linked, target)
        record = FileRecord(file.path, file.size_bytes, digests.sha256, digests.blocks)
        self._headers[file.path] = header
        self._finished.add(file, record)
        self._observer.finished(self._key, self._staging.snapshot, record)
        self._progress.add(done=file.size_bytes)
        self._peak.begin(file.path)
        self._peak.end(file.path)
        return True

    def _left(self, files: tuple[SourceFile, ...]) -> list[SourceFile]:
        """The files that no earlier process has finished."""
        left = []
        for file in files:
            record = self._finished.find(file, stored_unchanged=self._unchanged_because())
            if record is None:
                left.append(file)
                continue
            if record.path.endswith(".safetensors"):
                self._headers[record.path] = read_header(self._staging.snapshot_file(record.path), where=file.path)
                self._observer.finished(self._key, self._staging.snapshot, record)
            self._progress.add(done=file.size_bytes, reused=file.size_bytes)
        return left

    def _unchanged_because(self) -> str:
        return "; ".join(sorted({policy.unchanged_because for policy in self._policies.values()} - {""}))

    def _keep_small(self, file: SourceFile, path: Path, digests: Digests) -> None:
        """A small file as it came, but for a config, which names the storage dtype, and the index of pickles."""
        stored = stored_path(file.path)
        target = self._staging.snapshot_file(stored)
        durable.make_folder(target.parent)
        before = after = b""
        if stored != file.path:
            before = _read(path)
            after = index_of_converted(parse_json(before, file.path))
        elif PurePosixPath(file.path).name == "config.json":
            before = after = _read(path)
            config = parse_json(before, file.path)
            if isinstance(config, dict):
                self._configs[file.path] = config
                if not storage_policy(self._dtype, config).unchanged_because:
                    after = config_in_dtype(before, self._dtype)
        if after == before or parse_json(after, stored) == parse_json(before, file.path):
            durable.sync_path(path)
            durable.rename(path, target)
            self._finished.add(file, FileRecord(stored, file.size_bytes, digests.sha256, digests.blocks))
            return
        durable.write_atomic(target, after)
        self._finished.add(file, _rewritten(stored, after, Origin(file.size_bytes, digests.sha256)))

    def _store_weights(self, file: SourceFile, path: Path, digests: Digests) -> None:
        """A verified weights file in its stored form: converted, or moved where there is nothing to convert."""
        self._guard()
        stored = stored_path(file.path)
        origin = None
        if is_pickle(file.path):
            path, origin = self._unpickled(file, path), Origin(file.size_bytes, digests.sha256)
        header = read_header(path, where=f"{file.path} of {self._key.repo_id}")
        policy = self._policies[_folder_of(file.path)]
        target = self._staging.snapshot_file(stored)
        durable.make_folder(target.parent)
        if converted_tensors(header, policy) is header.tensors and origin is None:
            durable.sync_path(path)
            durable.rename(path, target)
            record = FileRecord(stored, file.size_bytes, digests.sha256, digests.blocks)
        else:
            with self._lock:
                if self._convert_began is None:
                    self._convert_began = self._timeline.now()
            memory = partial(self._observer.memory, self._key, stored)
            size, own = convert_file(path, target, header, policy, guard=self._guard, memory=memory)
            origin = origin or Origin(file.size_bytes, digests.sha256)
            record = FileRecord(stored, size, own.sha256, own.blocks, origin)
        self._headers[stored] = header
        self._finished.add(file, record)
        self._observer.finished(self._key, self._staging.snapshot, record)
        if path != self._staging.source_file(file.path):
            durable.remove_file(path)
        self._peak.end(file.path)

    def _unpickled(self, file: SourceFile, path: Path) -> Path:
        """The tensors of a verified pickle as safetensors beside it."""
        from modelstore.fill.pickles import convert

        logger.warning("%s of %s is a pickle: converting it, as allowed", file.path, self._key.repo_id)
        target = path.with_name(f"{path.name}.unpickled")
        convert(path, target, name=f"{file.path} of {self._key.repo_id}", guard=self._guard)
        return target

    def _finish_indexes(self, selection: Selection) -> None:
        """Check each index against the shards' headers, and correct its total size where shards were converted."""
        for path, weight_map in selection.indexes.items():
            folder, stored = _folder_of(path), stored_path(path)
            shards = {name: header for name, header in self._headers.items() if _folder_of(name) == folder}
            check_index(path, weight_map, shards)
            if not any(self._finished.records[name].origin for name in shards):
                continue
            target = self._staging.snapshot_file(stored)
            data = _read(target)
            corrected = index_with_total_size(data, partial(self._stored_size, shards), where=stored)
            if corrected != data:
                durable.write_atomic(target, corrected)
                self._finished.records[stored] = _rewritten(stored, corrected, self._finished.records[stored].original)

    def _check_sizes(self, selection: Selection) -> None:
        """Refuse a config whose sizes are not those of the weights beside it: it would fill the memory of a start."""
        for folder in self._policies:
            tensors = [
                t for name, header in self._headers.items() if _folder_of(name) == folder for t in header.tensors
            ]
            longest = max((side for tensor in tensors for side in tensor.shape), default=1)
            name = f"{_config_path(folder)} of {self._key.repo_id}"
            Sizes(len(tensors), longest).check(self._config(folder, selection), name)

    def _stored_size(self, shards: Iterable[str]) -> int:
        """Bytes of all tensors of these stored files."""
        return sum(read_header(self._staging.snapshot_file(name), where=name).tensors[-1].end for name in shards)

    def _publish(self) -> Manifest:
        manifest = Manifest(
            key=self._key,
            created_at=int(time.time()),
            source=self._resolved.record,
            files=tuple(self._finished.records[path] for path in sorted(self._finished.records)),
            stored_unchanged=self._unchanged_because(),
            remote_code=self._has_code,
        )
        folder = self._staging.snapshot
        _keep_only(folder, {MANIFEST, *self._finished.records})
        durable.write_atomic(folder / MANIFEST, manifest.encode())
        for parent, _folders, _names in os.walk(folder, topdown=False):
            durable.sync_path(Path(parent))
        self._claim.check()
        if not durable.publish_folder(folder, self._layout.snapshot(self._key)):
            logger.info("%s was published by another worker first", self._key)
        try:
            durable.remove_tree(self._layout.staging(self._key))
        except OSError as error:  # a holder that was fenced may still write there; `gc` removes it later
            logger.info("staging of %s is not empty yet: %s", self._key, error)
        return manifest

    def _guard(self) -> None:
        """Raise ClaimLost where the claim is gone; asks the volume at most every 50 ms. Reports progress on the way."""
        if self._stopping:
            raise ClaimLost("this worker stops")
        now = time.monotonic()
        if now - self._checked < _CHECK_EVERY_S:
            return
        self._checked = now
        self._claim.check()
        progress = self._progress
        self._claim.report("downloading", done=progress.done, total=progress.total, eta_s=progress.eta_s)
        self._observer.filling(self._key, progress)


def _config_path(folder: str) -> str:
    """The path of a folder's config in a repo; the folder is empty for the repo's root."""
    return f"{folder}/config.json" if folder else "config.json"


def _read(path: Path) -> bytes:
    """The bytes of a small file in staging."""
    return durable.read_file(path, MAX_SMALL_BYTES)


def _rewritten(path: str, data: bytes, origin: Origin) -> FileRecord:
    """The record of a small file that is stored as `data`."""
    digests = RunningDigests()
    digests.update(data)
    own = digests.finish()
    return FileRecord(path, len(data), own.sha256, own.blocks, origin)


def _keep_only(folder: Path, names: set[str]) -> None:
    """Remove what an earlier attempt left and the manifest will not name."""
    for parent, _folders, files in os.walk(folder):
        for name in files:
            path = Path(parent, name)
            if str(path.relative_to(folder)) not in names:
                durable.remove_file(path)


def _folder_of(path: str) -> str:
    return path.rpartition("/")[0]
