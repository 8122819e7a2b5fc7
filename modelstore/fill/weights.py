"""The weights of a fill: downloaded, converted beside the download, and stored, file by file.

    source ──ranges──▶ staging/source ──as they arrive──▶ convert ──once verified──▶ staging/snapshot

A file is converted, or compressed, while its own bytes arrive. They are verified last: if they were wrong, the file is
converted once more, and an error of a conversion counts only if they were right. A conversion that fails stops the
download. Files that lie on this volume already are linked, if the request allows
that. If a shard's header shows that the checkpoint is quantized, those that were converted before are fetched again.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from modelstore.errors import DigestMismatch, IntegrityError, ModelStoreError, Refused, WeightOverflow
from modelstore.fill.convert import (
    Ready,
    convert_file,
    converted_bytes,
    converted_tensors,
    copy_file,
    read_header,
)
from modelstore.fill.download import CONNECTIONS, Download
from modelstore.fill.footprint import DiskBudget
from modelstore.fill.plan import CheckpointPlan
from modelstore.fill.progress import Progress
from modelstore.fill.repo_files import folder_of, is_pickle, stored_path
from modelstore.fill.request import FillRequest
from modelstore.fill.source import SourceFile
from modelstore.fill.staged_file import StagedFile
from modelstore.fill.staging import Staging
from modelstore.fill.storage_policy import StoragePolicy
from modelstore.fill.stored_file import StoredFile, stored_name
from modelstore.timeline import Span
from modelstore.volume import durable
from modelstore.volume.checksums import Digests, digests_of_file
from modelstore.volume.header import Header
from modelstore.volume.manifest import FileRecord, Origin

logger = logging.getLogger(__name__)

# One conversion waits for its bytes while another one runs.
_CONVERSIONS = max(2, min(4, (os.cpu_count() or 2) // 2))


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The weights of a snapshot that were stored. `plan`: as it became when their headers were known; `headers`: those
    of the sources, by the path in the snapshot."""

    plan: CheckpointPlan
    headers: Mapping[str, Header]


class WeightsPipeline:
    """Stores all weights of a plan."""

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
        self._headers: dict[str, Header] = {}
        self._request = request
        self._plan = plan
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
        return sum(file.size_bytes for file in self._plan.selection.weights if self._linkable(file) is not None)

    def run(self, *, stop: Callable[[], None]) -> StoredWeights:
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
        return StoredWeights(self._plan, self._headers)

    def _fetch(self, files: Sequence[SourceFile], stop: Callable[[], None]) -> None:
        """Fetch and store these files."""
        failures: list[BaseException] = []
        room = threading.BoundedSemaphore(CONNECTIONS + _CONVERSIONS)

        def try_begin(file: SourceFile) -> bool:
            self._guard()  # another file has to end first, and never does if the work was stopped
            if not room.acquire(blocking=False):
                return False
            if self._budget.begin(file.path):
                return True
            room.release()
            return False

        def store(staged: StagedFile) -> None:
            try:
                self._store(staged)
            except BaseException as error:  # raised below, after every thread has stopped
                failures.append(error)
                stop()
            room.release()

        with ThreadPoolExecutor(_CONVERSIONS, thread_name_prefix="convert") as pool:
            try:
                self._download.fetch(
                    [file for file in files if not self._link(file)],
                    try_begin=try_begin,
                    on_begin=lambda staged: pool.submit(store, staged),
                )
            except BaseException as error:
                causes = failures[:1]  # the others follow from it
                stop()
                pool.shutdown(wait=False, cancel_futures=True)
                if causes and isinstance(error, Exception):
                    raise causes[0] from None
                raise
        if failures:
            raise failures[0]

    def _wrongly_converted(self) -> list[SourceFile]:
        """The files that were converted before another one showed that none may be; they are forgotten."""
        files = []
        for file in self._plan.selection.weights:
            record = self._staging.records[stored_path(file.path)]
            is_unchanged = bool(self._plan.policy_of(file.path).unchanged_because)
            if is_unchanged and record.origin is not None and not is_pickle(file.path):
                self._staging.forget(file)
                self._progress.add(done=-file.size_bytes)
                files.append(file)
        return files

    def _unfinished(self) -> list[SourceFile]:
        """The files that no earlier process has finished; the others are counted."""
        unfinished = self._staging.unfinished(self._plan.selection.weights, self._progress, self._plan.stored_unchanged)
        for file in self._plan.selection.weights:
            if file in unfinished:
                continue
            record = self._staging.records[stored_path(file.path)]
            path = self._staging.paths.snapshot_file(record.path)
            self._headers[record.content.path] = read_header(path, where=file.path, content=record.content)
            self._observer.finished(self._request.key, self._staging.paths.snapshot, record)
            self._budget.count_finished(file.path)
        self._plan = self._plan.with_headers(self._headers)
        return unfinished

    def _linkable(self, file: SourceFile) -> tuple[Path, Header] | None:
        """The file on this volume with its header, if it can be taken as it is."""
        may_link = self._request.link and self._name(file) == stored_path(file.path)
        path = self._request.source.path_of(self._request.resolved, file) if may_link else None
        if path is None or file.sha256 is None or stored_path(file.path) != file.path:
            return None
        header = read_header(path, where=self._label(file))
        if converted_tensors(header, self._plan.policy_of(file.path).for_tensors(header.tensors)) is not header.tensors:
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
        self._add(file, FileRecord(file.path, file.size_bytes, digests.sha256, digests.blocks), header, None)
        self._progress.add(done=file.size_bytes)
        self._budget.count_finished(file.path)
        return True

    def _store(self, staged: StagedFile) -> None:
        """Store a weights file while its bytes arrive. If they were wrong, no error counts, and it is stored again."""
        attempt = 0
        while attempt != staged.attempt:
            attempt = staged.attempt
            try:
                self._store_attempt(staged, attempt)
            except (IntegrityError, Refused):
                if staged.verified(attempt, self._guard) is not None:
                    raise

    def _store_attempt(self, staged: StagedFile, attempt: int) -> None:
        """A weights file in its stored form: converted, compressed, or moved if there is neither to be done; nothing is
        kept if the bytes of this attempt were wrong."""
        file, path = staged.file, staged.path
        if is_pickle(file.path):
            if staged.verified(attempt, self._guard) is None:
                return
            path = self._convert_pickle(file, path)
        ready = self._ready(staged, attempt)
        header = read_header(path, where=self._label(file), ready=ready)
        policy = self._plan.policy_of(file.path).for_tensors(header.tensors)
        is_unchanged = converted_tensors(header, policy) is header.tensors and path == staged.path
        record = memory = None
        if not is_unchanged or self._name(file) != stored_path(file.path):
            with self._lock:
                if self._convert_began is None:
                    self._convert_began = self._request.timeline.now()
            if is_unchanged:
                record, memory = self._compress(staged, ready)
            else:
                record, memory = self._convert_or_exempt(staged, attempt, path, header, policy, ready)
        digests = staged.verified(attempt, self._guard)
        if digests is None:
            return
        if record is None:
            record, memory = self._move(staged, digests), staged.take_memory()
        elif is_unchanged:
            assert record.plain is not None
            plain = replace(record.plain, sha256=digests.sha256, blocks=digests.blocks)
            record = replace(record, plain=plain)
        else:
            record = replace(record, origin=Origin(file.size_bytes, digests.sha256))
        self._add(file, record, header, memory)
        if path != staged.path:
            durable.remove_file(path)
        self._budget.end(file.path)

    def _ready(self, staged: StagedFile, attempt: int) -> Ready:
        def ready(offset: int, length: int) -> None:
            staged.wait_for(offset, length, self._guard)
            if staged.attempt != attempt:
                raise DigestMismatch(f"{self._label(staged.file)} came with wrong bytes, and comes once more")

        return ready

    def _move(self, staged: StagedFile, digests: Digests) -> FileRecord:
        stored = stored_path(staged.file.path)
        target = self._staging.paths.snapshot_file(stored)
        durable.make_folder(target.parent)
        durable.sync_path(staged.path)
        durable.rename(staged.path, target)
        return FileRecord(stored, staged.file.size_bytes, digests.sha256, digests.blocks)

    def _compress(self, staged: StagedFile, ready: Ready) -> tuple[FileRecord, memoryview | None]:
        """The record of a file that is not converted, but for the digests of its plain form, and the memory that holds
        that."""
        file = staged.file
        with self._stored_file(file, is_digested=True) as target:
            memory = self._memory(staged, file.size_bytes)
            copy_file(staged.path, file.size_bytes, target, ready=ready, memory=memory)
            return target.finish(self._name(file), None), memory

    def _convert_or_exempt(
        self, staged: StagedFile, attempt: int, path: Path, header: Header, policy: StoragePolicy, ready: Ready
    ) -> tuple[FileRecord, memoryview | None]:
        """The record of a converted file, but for its origin, and the memory that holds it. Tensors that overflow and
        that no class loads are stored as they come, in a second try."""
        try:
            return self._convert(staged, path, header, policy, ready)
        except WeightOverflow as error:
            exempt = policy.without(error.tensors)
            if exempt is None or staged.verified(attempt, self._guard) is None:
                raise
            label, names = self._label(staged.file), ", ".join(error.tensors[:5])
            logger.warning("%s: %s overflow, and no class loads them", label, names)
        with self._lock:
            self._plan = self._plan.with_unloaded(folder_of(staged.file.path), exempt.unloaded)
        return self._convert(staged, path, header, exempt, ready)

    def _convert(
        self, staged: StagedFile, path: Path, header: Header, policy: StoragePolicy, ready: Ready
    ) -> tuple[FileRecord, memoryview | None]:
        file = staged.file
        with self._stored_file(file) as target:
            memory = self._memory(staged, converted_bytes(header, policy))
            convert_file(path, target, header, policy, ready=ready, memory=memory)
            return target.finish(self._name(file), None), memory

    def _name(self, file: SourceFile) -> str:
        return stored_name(stored_path(file.path), compressed=self._request.compressed)

    def _stored_file(self, file: SourceFile, *, is_digested: bool = False) -> StoredFile:
        return StoredFile(self._staging.paths.snapshot_file(self._name(file)), is_digested=is_digested)

    def _memory(self, staged: StagedFile, size_bytes: int) -> memoryview | None:
        """Memory for a file that is stored in another form, instead of that for the bytes as they come."""
        staged.take_memory()
        return self._observer.memory(self._request.key, stored_path(staged.file.path), size_bytes)

    def _add(self, file: SourceFile, record: FileRecord, header: Header, memory: memoryview | None) -> None:
        with self._lock:
            self._headers[record.content.path] = header
            self._plan = self._plan.with_headers({record.content.path: header})
        self._staging.add(file, record)
        self._observer.finished(self._request.key, self._staging.paths.snapshot, record, memory)

    def _convert_pickle(self, file: SourceFile, path: Path) -> Path:
        """The tensors of a verified pickle as safetensors beside it."""
        from modelstore.fill.pickles import convert

        logger.warning("%s of %s is a pickle: converting it, as allowed", file.path, self._request.key.repo_id)
        target = path.with_name(f"{path.name}.unpickled")
        convert(path, target, name=self._label(file), guard=self._guard)
        return target

    def _label(self, file: SourceFile) -> str:
        return f"{file.path} of {self._request.key.repo_id}"
