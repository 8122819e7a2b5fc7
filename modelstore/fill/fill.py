"""From a claim to a published snapshot: select, download, convert, publish.

    source ──ranges──▶ staging/source ──verified──▶ convert or move ──▶ staging/snapshot ──one rename──▶ models/

Each finished file leaves a record under `done/`, so that another process, on another host, goes on with the files that
are missing and trusts the others only after comparing their blocks. Only a source reads the network, and only
`durable.publish_folder` puts something under `models/`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from modelstore.errors import ClaimLost, CodeRefused, IntegrityError, NoSpace, Refused
from modelstore.fill.convert import config_in_dtype, converted_tensors
from modelstore.fill.download import Download
from modelstore.fill.footprint import DiskBudget
from modelstore.fill.indexes import index_of_converted, index_with_places, index_with_total_size, misplaced_tensors
from modelstore.fill.plan import CheckpointPlan, config_path, plan_checkpoint, select
from modelstore.fill.progress import Progress
from modelstore.fill.repo_code import code_of
from modelstore.fill.repo_files import MAX_SMALL_BYTES, folder_of, parse_json, stored_path
from modelstore.fill.request import FillRequest
from modelstore.fill.selection import Selection
from modelstore.fill.source import SourceFile
from modelstore.fill.staged_file import StagedFile
from modelstore.fill.staging import Staging
from modelstore.fill.storage_policy import StoragePolicy
from modelstore.fill.weights import WeightsPipeline
from modelstore.settings import Settings
from modelstore.volume import durable, tree
from modelstore.volume.checksums import RunningDigests, has_blocks
from modelstore.volume.claim import Claim
from modelstore.volume.config_sizes import Sizes
from modelstore.volume.header import Header
from modelstore.volume.layout import MANIFEST, Layout
from modelstore.volume.manifest import FileRecord, Manifest, Origin
from modelstore.volume.snapshots import Catalog, Snapshot
from modelstore.volume.space import Space

logger = logging.getLogger(__name__)

_CHECK_EVERY_S = 0.05


@dataclass(frozen=True, slots=True)
class Filled:
    """The result of a fill; sizes in bytes. `reused` lay in staging already, `network` came over the wire."""

    reused: int
    network: int


class Fill:
    """Fills one snapshot under one claim. Use once."""

    def __init__(
        self,
        layout: Layout,
        request: FillRequest,
        claim: Claim,
        settings: Settings,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`request.damaged`, if any, is the snapshot that is to be replaced, moved aside, or to be completed, in its
        place."""
        tree.check_no_links(layout.root, layout.snapshot(request.key))
        self._layout = layout
        self._request = request
        self._settings = settings
        self._claim = claim
        self._staging = Staging(layout, request.key, claim, request.damaged)
        self._space = Space(layout, settings, sleep=sleep)
        self._progress = Progress(over_network=request.source.over_network)
        self._guard = _Guard(claim, request, self._progress)
        self._budget = DiskBudget({})
        self._needed_bytes = 0
        self._download = Download(
            request.source,
            request.resolved,
            self._staging.paths,
            inherited=self._staging.inherited,
            guard=self._guard,
            progress=self._progress,
            memory=self._memory_if_unchanged,
            sleep=sleep,
        )

    def make_room(self, error: NoSpace) -> bool:
        """After a full volume, if evicting is allowed: find the space that is missing; whether any was freed."""
        if not self._settings.evict or self._settings.quota_bytes is not None:  # a quota was compared before
            return False
        missing_bytes = self._needed_bytes - self._staging.present_bytes - error.free_bytes
        return self._space.make_room(self._request.key, max(missing_bytes, 1))

    def run(self) -> Filled:
        """Download, convert and publish.

        Raises the errors of the source and the volume. After ClaimLost, HubUnavailable, or NoSpace for a model that
        would fit, the staging stays for a resume; after an IntegrityError, Refused, or NoSpace for one that never can,
        it is removed.
        """
        timeline = self._request.timeline
        try:
            durable.make_folder(self._staging.paths.folder)
            with timeline.span("download") as span:
                files, selection = select(self._request, self._read_source, self._settings)
                self._fetch_small(selection)
                has_code = self._check_code(files, selection)
                plan = self._plan(selection)
                config = plan.configs.get("", {})
                self._request.observer.described(self._request.key, config, selection.paths)
                pipeline = self._weights_pipeline(plan)
                self._reserve(plan, pipeline)
                weights = pipeline.run(stop=self._guard.stop)
                span.size_bytes = self._progress.network or self._progress.total
            if weights.plan.stored_unchanged != plan.stored_unchanged:
                self._report_unchanged(weights.plan)
            self._finish_configs(weights.plan)
            self._finish_indexes(weights.plan, weights.headers)
            self._check_config_sizes(weights.plan, weights.headers)
            with timeline.span("publish"):
                self._publish(weights.plan, has_code=has_code)
        except (IntegrityError, Refused):
            self._staging.remove()
            raise
        except NoSpace as error:
            if not self._space.could_fit(self._needed_bytes, error):
                self._staging.remove()
            raise
        except OSError:
            self._claim.check()  # a successor moves our staging away under us: then the claim is lost
            raise
        return Filled(self._progress.reused, self._progress.network)

    def _read_source(self, file: SourceFile) -> bytes:
        """A small file as the source has it."""
        (staged,) = self._download.fetch([file])
        return _read(staged.path)

    def _fetch_small(self, selection: Selection) -> None:
        """Fetch and store all files but the weights."""
        self._progress.restart(selection.size_bytes)
        staged = self._download.fetch(self._staging.unfinished(selection.small, self._progress))
        tree.map_concurrently(self._store_small, staged)

    def _store_small(self, staged: StagedFile) -> None:
        """A small file as it came, but for the index of files that are stored under other names."""
        file, path, digests = staged.file, staged.path, staged.digests
        assert digests is not None
        stored = stored_path(file.path)
        target = self._staging.paths.snapshot_file(stored)
        durable.make_folder(target.parent)
        if stored == file.path:
            durable.sync_path(path)
            durable.rename(path, target)
            self._staging.add(file, FileRecord(stored, file.size_bytes, digests.sha256, digests.blocks))
            return
        data = index_of_converted(parse_json(_read(path), file.path))
        durable.write_atomic(target, data)
        self._staging.add(file, _rewritten(stored, data, Origin(file.size_bytes, digests.sha256)))

    def _check_code(self, files: Iterable[SourceFile], selection: Selection) -> bool:
        """Whether a config names code of the repo. Raises CodeRefused if that may not be stored."""
        staged = {file.path: self._staging.paths.snapshot_file(stored_path(file.path)) for file in selection.small}
        repo = frozenset(file.path for file in files)
        phrase = code_of(staged, lambda path: _read(staged[path]), repo, allowed=self._request.code)
        key = self._request.key
        if phrase and not self._request.code:
            raise CodeRefused(
                f"{key.repo_id} brings code of its own ({phrase}): read it, then name the commit in full "
                f"({key.repo_id}@{key.commit}) with --trust-remote-code, or use another repo"
            )
        return bool(phrase)

    def _plan(self, selection: Selection) -> CheckpointPlan:
        """The plan, made from the configs as the source has them: an earlier process may have changed a stored one."""

        def read(file: SourceFile) -> bytes:
            rewritten = self._staging.records[file.path].origin is not None
            return self._read_source(file) if rewritten else _read(self._staging.paths.snapshot_file(file.path))

        plan, key = plan_checkpoint(self._request, selection, read), self._request.key
        for folder, config in plan.configs.items():
            Sizes().check(config, f"{config_path(folder)} of {key.repo_id}")
        self._report_unchanged(plan)
        return plan

    def _report_unchanged(self, plan: CheckpointPlan) -> None:
        if plan.stored_unchanged and self._request.dtype != "keep":
            logger.warning("%s is stored unchanged: %s", self._request.key, plan.stored_unchanged)

    def _weights_pipeline(self, plan: CheckpointPlan) -> WeightsPipeline:
        self._budget = DiskBudget(plan.footprint.weights)
        return WeightsPipeline(
            self._request,
            plan,
            self._staging,
            self._download,
            budget=self._budget,
            guard=self._guard,
            progress=self._progress,
        )

    def _reserve(self, plan: CheckpointPlan, weights: WeightsPipeline) -> None:
        """Make sure that the volume has room for the peak of the snapshot and its staging."""
        key, damaged = self._request.key, self._request.damaged
        self._needed_bytes = plan.footprint.peak_bytes
        if plan.sizes_are_known:
            self._request.observer.planned(key, weights_bytes=plan.footprint.weights_bytes)
        if damaged is not None and self._settings.quota_bytes is not None and not self._is_in_place:
            _remove_damaged_files(damaged)  # a quota has no room for bytes that are of no use
        self._space.reserve(
            key,
            self._claim,
            self._needed_bytes,
            present_bytes=self._staging.present_bytes + weights.linkable_bytes,
            damaged=damaged.path if damaged is not None and not self._is_in_place else None,
            shared_bytes=_whole_bytes(damaged) if damaged is not None and self._is_in_place else 0,
        )

    def _memory_if_unchanged(self, file: SourceFile) -> memoryview | None:
        """Memory for weights that are stored as they come; a conversion asks for some when it begins."""
        if not self._budget.needs_nothing_beside(file.path):
            return None
        return self._request.observer.memory(self._request.key, stored_path(file.path), file.size_bytes)

    def _finish_configs(self, plan: CheckpointPlan) -> None:
        """Let each config beside converted weights name the storage dtype."""
        for folder, policy in plan.policies.items():
            path = config_path(folder)
            if policy.unchanged_because or not plan.configs[folder]:
                continue
            target, record = self._staging.paths.snapshot_file(path), self._staging.records[path]
            before = _read(target)
            after = config_in_dtype(before, policy.dtype)
            if parse_json(after, path) != parse_json(before, path):
                durable.write_atomic(target, after)
                self._staging.records[path] = _rewritten(path, after, record.original)

    def _finish_indexes(self, plan: CheckpointPlan, headers: Mapping[str, Header]) -> None:
        """Check each index against the shards' headers; correct its total size if shards were converted, and the shards
        of tensors that it misplaces."""
        records = self._staging.records
        for path, weight_map in plan.selection.indexes.items():
            folder, stored = folder_of(path), stored_path(path)
            shards = {name: header for name, header in headers.items() if folder_of(name) == folder}
            misplaced = misplaced_tensors(path, weight_map, shards, plan.configs[folder])
            if not misplaced and not any(records[name].origin for name in shards):
                continue
            target = self._staging.paths.snapshot_file(stored)
            data = _read(target)
            corrected = index_with_places(data, misplaced, where=stored)
            total_size = partial(_tensor_bytes, shards, plan.policies[folder])
            corrected = index_with_total_size(corrected, total_size, where=stored)
            if corrected != data:
                durable.write_atomic(target, corrected)
                records[stored] = _rewritten(stored, corrected, records[stored].original)

    def _check_config_sizes(self, plan: CheckpointPlan, headers: Mapping[str, Header]) -> None:
        """Refuse a config whose sizes are not those of the weights beside it: it would fill the memory of a start."""
        for folder, config in plan.configs.items():
            tensors = [t for name, header in headers.items() if folder_of(name) == folder for t in header.tensors]
            longest = max((side for tensor in tensors for side in tensor.shape), default=1)
            Sizes(len(tensors), longest).check(config, f"{config_path(folder)} of {self._request.key.repo_id}")

    def _publish(self, plan: CheckpointPlan, *, has_code: bool) -> None:
        key, records = self._request.key, self._staging.records
        manifest = Manifest(
            key=key,
            created_at=int(time.time()),
            source=self._request.resolved.record,
            files=tuple(records[path] for path in sorted(records)),
            stored_unchanged=plan.stored_unchanged,
            remote_code=has_code,
        )
        folder = self._staging.paths.snapshot
        if not self._staging.publish(manifest, manifest.encode(), self._layout.snapshot(key)):
            if self._is_in_place or Catalog(self._layout).published(key) is None:
                self._complete(folder, manifest)
            else:
                logger.info("%s was published by another worker first", key)
        try:
            durable.remove_tree(self._layout.staging(key))
        except OSError as error:  # a holder that was fenced may still write there; `gc` removes it later
            logger.info("staging of %s is not empty yet: %s", key, error)

    @property
    def _is_in_place(self) -> bool:
        damaged = self._request.damaged
        return damaged is not None and damaged.path == self._layout.snapshot(self._request.key)

    def _complete(self, folder: Path, manifest: Manifest) -> None:
        """Put the files that are missing or unreadable into the folder in the snapshot's place. Its manifest stays if
        it names the same files; another one goes first, so that no file is ever served by the wrong one."""
        key = self._request.key
        place = self._layout.snapshot(key)
        present = Catalog(self._layout).manifest(key)
        if present is not None and present.files == manifest.files:
            durable.write_atomic(folder / MANIFEST, durable.read_file(place / MANIFEST, durable.MANIFEST_BYTES))
        elif tree.exists(place / MANIFEST):
            durable.remove_file(place / MANIFEST)
        durable.complete_folder(folder, place, last=MANIFEST)
        logger.warning("%s was not whole: its missing files were put in place", key)


class _Guard:
    """Raises ClaimLost once the claim is gone, or the work has to stop; reports the progress on the way."""

    def __init__(self, claim: Claim, request: FillRequest, progress: Progress) -> None:
        self._claim = claim
        self._request = request
        self._progress = progress
        self._checked_at = 0.0
        self._stopping = False

    def stop(self) -> None:
        """Let every later call raise."""
        self._stopping = True

    def __call__(self) -> None:
        """Called before each step of the work; asks the volume at most every 50 ms."""
        if self._stopping:
            raise ClaimLost("this worker stops the work")
        now = time.monotonic()
        if now - self._checked_at < _CHECK_EVERY_S:
            return
        self._checked_at = now
        self._claim.check()
        progress = self._progress
        self._claim.report("downloading", done=progress.done, total=progress.total, eta_s=progress.eta_s)
        self._request.observer.filling(self._request.key, progress)


def _whole_bytes(snapshot: Snapshot) -> int:
    """Bytes of the files that lie in a snapshot's folder with their whole size."""
    sizes = ((tree.size_of(snapshot.path / file.path), file.size_bytes) for file in snapshot.manifest.files)
    return sum(size for actual, size in sizes if actual == size)


def _remove_damaged_files(snapshot: Snapshot) -> None:
    """Remove the files of a quarantined snapshot that do not match its manifest."""
    for record in snapshot.manifest.files:
        if not has_blocks(snapshot.path / record.path, record):
            durable.remove_file(snapshot.path / record.path)


def _tensor_bytes(shards: Mapping[str, Header], policy: StoragePolicy) -> int:
    """Bytes of all tensors of these files, once they are stored."""
    return sum(max((t.end for t in converted_tensors(header, policy)), default=0) for header in shards.values())


def _read(path: Path) -> bytes:
    """The bytes of a small file in staging."""
    return durable.read_file(path, MAX_SMALL_BYTES)


def _rewritten(path: str, data: bytes, origin: Origin) -> FileRecord:
    """The record of a small file that is stored as `data`."""
    digests = RunningDigests()
    digests.update(data)
    stored = digests.finish()
    return FileRecord(path, len(data), stored.sha256, stored.blocks, origin)
