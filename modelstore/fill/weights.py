"""The weights of a fill: downloaded, converted beside the download, and stored, file by file.

    source ──ranges──▶ staging/source ──verified──▶ convert or move ──▶ staging/snapshot

A conversion that fails stops the download. Files that lie on this volume already are linked, if the request allows
that. If a shard's header shows that the checkpoint is quantized, those that were converted before are fetched again.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from modelstore.errors import DigestMismatch, ModelStoreError, WeightOverflow
from modelstore.fill.convert import convert_file, converted_tensors, copy_file, read_header
from modelstore.fill.download import Download
from modelstore.fill.footprint import DiskBudget
from modelstore.fill.plan import CheckpointPlan
from modelstore.fill.progress import Progress
from modelstore.fill.repo_files import folder_of, is_pickle, stored_path
from modelstore.fill.request import FillRequest
from modelstore.fill.source import SourceFile
from modelstore.fill.staging import Staging
from modelstore.fill.storage_policy import StoragePolicy
from modelstore.fill.stored_file import StoredFile, stored_name
from modelstore.timeline import Span
from modelstore.volume import durable
from modelstore.volume.checksums import Digests, digests_of_file
from modelstore.volume.header import Header
from modelstore.volume.manifest import FileRecord, Origin

logger = logging.getLogger(__name__)

_CONVERSIONS = max(1, min(4, (os.cpu_count() or 2) // 2))
_WAITING_CONVERSIONS = 2


class WeightsPipeline:
    """Stores all weights of a plan. `headers`: those of the sources, by the path in the snapshot; `plan`: the plan once
    these were known."""

    def __init__(
        self,
        request: FillRequest,
        plan: CheckpointPlan,
        staging: Staging,
        download: Download,
        *,
        budget: DiskBudget,
        guard: Callable[[], None],
        progress: Progress,
    ) -> None:
        """`guard` is called before each step and raises ClaimLost if the work has to stop."""
        self.headers: dict[str, Header] = {}
        self._request = request
        self.plan = plan
        self._staging = staging
        self._download = download
        self._budget = budget
        self._guard = guard
        self._progress = progress
        self._observer = request.observer
        self._convert_began: float | None = None
        self._lock = threading.Lock()

    @property
    def linkable_bytes(self) -> int:
        """The bytes of weights that will be linked: they take no space."""
        return sum(file.size_bytes for file in self.plan.selection.weights if self._linkable(file) is not None)

    def run(self, *, stop: Callable[[], None]) -> None:
        """Fetch and store the files that no earlier process has finished; `stop` is called if it fails, and makes
        `guard` raise, so that conversions end at their next chunk."""
        files = self._unfinished()
        while files or (files := self._wrongly_converted()):
            self._fetch(files, stop)
            files = []
        self._observer.filling(self._request.key, self._progress)
        if self._convert_began is not None:
            timeline = self._request.timeline
            timeline.add(Span("convert", self._convert_began, timeline.now()))

    def _fetch(self, files: Sequence[SourceFile], stop: Callable[[], None]) -> None:
        """Fetch and store these files."""
        room = threading.BoundedSemaphore(_CONVERSIONS + _WAITING_CONVERSIONS)
        jobs: list[Future[None]] = []
        with ThreadPoolExecutor(_CONVERSIONS, thread_name_prefix="convert") as pool:

            def check() -> None:
                for job in jobs:
                    if job.done():
                        job.result()  # a conversion that failed stops the download

            def may_begin(file: SourceFile) -> bool:
                self._guard()
                check()
                return self._budget.begin(file.path)

            def on_file(file: SourceFile, path: Path, digests: Digests) -> None:
                room.acquire()
                check()
                job = pool.submit(self._store, file, path, digests)
                job.add_done_callback(lambda _job: room.release())
                jobs.append(job)

            try:
                files = [file for file in files if not self._link(file)]
                self._download.fetch(files, on_file, may_begin=may_begin)
            except BaseException:
                stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        for job in jobs:
            job.result()

    def _wrongly_converted(self) -> list[SourceFile]:
        """The files that were converted before another one showed that none may be; they are forgotten."""
        files = []
        for file in self.plan.selection.weights:
            record = self._staging.records[stored_path(file.path)]
            is_unchanged = bool(self.plan.policy_of(file.path).unchanged_because)
            if is_unchanged and record.origin is not None and not is_pickle(file.path):
                self._staging.forget(file)
                self._progress.add(done=-file.size_bytes)
                files.append(file)
        return files

    def _unfinished(self) -> list[SourceFile]:
        """The files that no earlier process has finished; the others are counted."""
        unfinished = self._staging.unfinished(self.plan.selection.weights, self._progress, self.plan.stored_unchanged)
        for file in self.plan.selection.weights:
            if file in unfinished:
                continue
            record = self._staging.records[stored_path(file.path)]
            path = self._staging.paths.snapshot_file(record.path)
            self.headers[record.content.path] = read_header(path, where=file.path, content=record.content)
            self._observer.finished(self._request.key, self._staging.paths.snapshot, record)
            self._budget.count_finished(file.path)
        self.plan = self.plan.with_headers(self.headers)
        return unfinished

    def _linkable(self, file: SourceFile) -> tuple[Path, Header] | None:
        """The file on this volume with its header, if it can be taken as it is."""
        may_link = self._request.link and self._name(file) == stored_path(file.path)
        path = self._request.source.path_of(self._request.resolved, file) if may_link else None
        if path is None or file.sha256 is None or stored_path(file.path) != file.path:
            return None
        header = read_header(path, where=self._label(file))
        if converted_tensors(header, self.plan.policy_of(file.path).for_tensors(header.tensors)) is not header.tensors:
            return None
        return (path, header) if path.stat().st_dev == self._staging.device else None

    def _link(self, file: SourceFile) -> bool:
        """Take a weights file by a second name, after its bytes were compared; False if it has to be copied.

        It has a name of its own until then, which is never opened to write: the file that it shares with its owner
        stays as it is.
        """
        linkable = self._linkable(file)
        if linkable is None:
            return False
        path, header = linkable
        target = self._staging.paths.snapshot_file(file.path)
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
            repo_id = self._request.key.repo_id
            raise DigestMismatch(f"{path} does not match its name: remove it, and seed {repo_id}")
        durable.remove_file(target)
        durable.rename(linked, target)
        self._add(file, FileRecord(file.path, file.size_bytes, digests.sha256, digests.blocks), header)
        self._progress.add(done=file.size_bytes)
        self._budget.count_finished(file.path)
        return True

    def _store(self, file: SourceFile, path: Path, digests: Digests) -> None:
        """A verified weights file in its stored form: converted, or moved if there is nothing to convert."""
        self._guard()
        stored = stored_path(file.path)
        origin = None
        if is_pickle(file.path):
            path, origin = self._unpickled(file, path), Origin(file.size_bytes, digests.sha256)
        header = read_header(path, where=self._label(file))
        policy = self.plan.policy_of(file.path).for_tensors(header.tensors)
        is_unchanged = converted_tensors(header, policy) is header.tensors and origin is None
        if is_unchanged and self._name(file) == stored:
            target = self._staging.paths.snapshot_file(stored)
            durable.make_folder(target.parent)
            durable.sync_path(path)
            durable.rename(path, target)
            record = FileRecord(stored, file.size_bytes, digests.sha256, digests.blocks)
        else:
            with self._lock:
                if self._convert_began is None:
                    self._convert_began = self._request.timeline.now()
            origin = origin or (None if is_unchanged else Origin(file.size_bytes, digests.sha256))
            record = self._convert(file, path, header, policy, origin, digests)
        self._add(file, record, header)
        if path != self._staging.paths.source_file(file.path):
            durable.remove_file(path)
        self._budget.end(file.path)

    def _convert(
        self,
        file: SourceFile,
        path: Path,
        header: Header,
        policy: StoragePolicy,
        origin: Origin | None,
        digests: Digests,
    ) -> FileRecord:
        """Convert one file; tensors that overflow and that no class loads are stored as they come, in a second try.
        Without an `origin` it is only compressed, and `digests` are those of its bytes."""
        if origin is None:
            with self._stored_file(file, digests) as target:
                copy_file(path, target, guard=self._guard, memory=self._memory(file))
                return target.finish(self._name(file), None)
        try:
            return self._converted(file, path, header, policy, origin)
        except WeightOverflow as error:
            exempt = policy.without(error.tensors)
            if exempt is None:
                raise
            logger.warning("%s: %s overflow, and no class loads them", self._label(file), ", ".join(error.tensors[:5]))
        with self._lock:
            self.plan = self.plan.with_unloaded(folder_of(file.path), exempt.unloaded)
        return self._converted(file, path, header, exempt, origin)

    def _converted(
        self, file: SourceFile, path: Path, header: Header, policy: StoragePolicy, origin: Origin
    ) -> FileRecord:
        with self._stored_file(file) as target:
            convert_file(path, target, header, policy, guard=self._guard, memory=self._memory(file))
            return target.finish(self._name(file), origin)

    def _name(self, file: SourceFile) -> str:
        return stored_name(stored_path(file.path), compressed=self._request.compressed)

    def _stored_file(self, file: SourceFile, digests: Digests | None = None) -> StoredFile:
        path = self._staging.paths.snapshot_file(self._name(file))
        return StoredFile(path, digests=digests)

    def _memory(self, file: SourceFile) -> Callable[[int], memoryview | None]:
        return partial(self._observer.memory, self._request.key, stored_path(file.path))

    def _add(self, file: SourceFile, record: FileRecord, header: Header) -> None:
        with self._lock:
            self.headers[record.content.path] = header
            self.plan = self.plan.with_headers({record.content.path: header})
        self._staging.add(file, record)
        self._observer.finished(self._request.key, self._staging.paths.snapshot, record)

    def _unpickled(self, file: SourceFile, path: Path) -> Path:
        """The tensors of a verified pickle as safetensors beside it."""
        from modelstore.fill.pickles import convert

        logger.warning("%s of %s is a pickle: converting it, as allowed", file.path, self._request.key.repo_id)
        target = path.with_name(f"{path.name}.unpickled")
        convert(path, target, name=self._label(file), guard=self._guard)
        return target

    def _label(self, file: SourceFile) -> str:
        return f"{file.path} of {self._request.key.repo_id}"
