"""The store: look up snapshots, fill those that are missing, and list all of them.

`volume/snapshots.py` looks up, and reads only the volume; `single_fill.py` makes a snapshot that is not there. This
file decides which snapshot answers a reference, and records it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from modelstore.dtypes import DEFAULT_DTYPE, Dtype, Overflow, accepted_dtypes, parse_dtype
from modelstore.errors import (
    DigestMismatch,
    IntegrityError,
    ModelStoreError,
    RepoNotFound,
    WeightOverflow,
)
from modelstore.fill.observer import SILENT, Observer
from modelstore.fill.request import FillRequest
from modelstore.fill.source import Resolved, Source
from modelstore.fill.sources import resolve
from modelstore.reference import Reference, is_commit, parse_reference, repo_id_of
from modelstore.settings import Settings
from modelstore.single_fill import SingleFill, is_same
from modelstore.timeline import Timeline
from modelstore.volume import aliases, capabilities, refs, tree
from modelstore.volume.claim import current_record
from modelstore.volume.content import has_decoder
from modelstore.volume.layout import Layout, SnapshotKey
from modelstore.volume.pins import mark_used, wait_while_evicting
from modelstore.volume.preferred_form import prefers_compressed, recorded_rate
from modelstore.volume.snapshots import Catalog, Snapshot
from modelstore.volume.verify import known_problem

logger = logging.getLogger(__name__)


class ModelStore:
    """One store on one volume. Cheap to make: nothing is read or written before it is needed."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        settings: Settings | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.settings = replace(settings or Settings.from_env(root=Path(root)), root=Path(root).absolute())
        self.layout = Layout(self.settings.root)
        self._sleep = sleep

    @cached_property
    def catalog(self) -> Catalog:
        """The published snapshots, and which form of one is preferred."""
        return Catalog.of(self.settings)

    @cached_property
    def _single_fill(self) -> SingleFill:
        return SingleFill(self.layout, self.settings, self.catalog, sleep=self._sleep)

    @classmethod
    def of(cls, settings: Settings) -> ModelStore:
        """The store that the settings describe."""
        return cls(settings.root, settings=settings)

    @classmethod
    def from_env(cls) -> ModelStore:
        """The store that the environment describes (MODELSTORE_ROOT and the other settings)."""
        return cls.of(Settings.from_env())

    def lookup(
        self, reference: str | Reference, *, revision: str | None = None, dtype: str | None = None
    ) -> Snapshot | None:
        """The published snapshot that the volume's records lead to, or None; touches no network and writes nothing.

        Without a `dtype` here or in the settings: in the variant that was seeded, or the only one on the volume.
        Raises InvalidReference, InvalidSetting, FormatTooNew, and SnapshotNotFound for an alias that does not exist.
        """
        return self.catalog.find(_parsed(reference, revision), self._requested_dtype(dtype))

    def set_alias(
        self,
        name: str,
        reference: str | Reference,
        *,
        dtype: str | None = None,
        percent: int = 100,
        observer: Observer = SILENT,
    ) -> Snapshot:
        """Let the alias `name` (without its @) point to a snapshot, which is downloaded first if need be, and verified.
        `percent`: the share of the workers that get it; the others keep the snapshot that they have.

        Raises InvalidReference for a name that is none, and what `ensure` raises.
        """
        aliases.checked(name)
        self.check_may_change()
        present = self.lookup(reference, dtype=dtype)
        damaged = present if present is not None and known_problem(self.layout, present.key) else None
        snapshot = self.ensure(reference, dtype=dtype, damaged=damaged, observer=observer)
        aliases.point(self.layout, name, snapshot.key, self.settings.worker_id, percent=percent)
        return snapshot

    def preview(
        self,
        reference: str | Reference,
        *,
        revision: str | None = None,
        dtype: str | None = None,
        overflow: Overflow = "stop",
    ) -> dict[str, Any]:
        """The outcome of `ensure(…, refresh=True)`, without doing it: `status` is "present", "resumable", "missing" or
        "damaged"; sizes in bytes. Raises what `ensure` raises for a source that cannot be read.
        """
        named = parsed = _parsed(reference, revision)
        variant = self._requested_dtype(dtype) or DEFAULT_DTYPE
        self.settings.check_allowed(parsed)
        if parsed.kind == "alias":
            key = aliases.target(self.layout, parsed.name)
            parsed, variant = Reference("hub", key.repo_id, key.commit), parse_dtype("alias", key.dtype)
        source, resolved = self._resolve(parsed, refresh=True)
        key = SnapshotKey(resolved.repo_id, resolved.commit, variant)
        snapshot = self._published(key, accepted_dtypes(variant, overflow))
        code = source.may_bring_code(resolved, self.settings, named=named)
        request = FillRequest(
            source=source,
            resolved=resolved,
            dtype=variant,
            compressed=prefers_compressed(self.layout, self.settings.compress),
            code=code,
        )
        return self._preview(request, snapshot)

    def _preview(self, request: FillRequest, snapshot: Snapshot | None) -> dict[str, Any]:
        """The record of a fill that is not begun; `snapshot`: what is published in its place."""
        from modelstore.fill.plan import preview

        source, key = request.source, snapshot.key if snapshot is not None else request.key
        record: dict[str, Any] = key.as_json()
        is_damaged = snapshot is not None and bool(known_problem(self.layout, key))
        if snapshot is not None and not is_damaged:
            files = len(snapshot.manifest.files)
            return record | {"status": "present", "files": files, "bytes": snapshot.size_bytes, "downloaded_bytes": 0}
        footprint = preview(request, self.settings).footprint
        staged = tree.tree_blocks(self.layout.staging(key))
        _generation, claimed = current_record(self.layout.claims(key))
        fetched = claimed.done if staged and claimed is not None else 0
        return record | {
            "status": "damaged" if is_damaged else "resumable" if staged else "missing",
            "files": footprint.files,
            "bytes": footprint.stored_bytes,
            "downloaded_bytes": max(footprint.source_bytes - fetched, 0) if source.over_network else 0,
            "staged_bytes": staged,
            "peak_bytes": footprint.peak_bytes,
        }

    def preview_adopted(self, source: Source, resolved: Resolved, *, dtype: str | None = None) -> dict[str, Any]:
        """The outcome of `adopt`, without doing it: the record of `preview`."""
        request = FillRequest(source=source, resolved=resolved, dtype=self._requested_dtype(dtype) or DEFAULT_DTYPE)
        return self._preview(request, self.catalog.published_twin(request.key))

    def adopt(
        self, source: Source, resolved: Resolved, *, dtype: str | None = None, observer: Observer = SILENT
    ) -> Snapshot:
        """Publish the files that a source has on this host already; weights that need no conversion are linked, not
        copied, if they lie on the same volume. Raises what `ensure` raises."""
        refs.check_format(self.layout)
        if Reference("hub", resolved.repo_id, resolved.commit) not in self.settings.allowed_models:
            self.settings.check_allowed(Reference("hub", resolved.repo_id, resolved.revision))
        confirmed = source.confirmed(resolved)
        if confirmed is None:
            raise DigestMismatch(
                f"the HF cache of {resolved.repo_id} differs from the Hub at {resolved.commit}: remove the "
                "cache, and seed the model from the Hub"
            )
        resolved = confirmed
        code = source.may_bring_code(resolved, self.settings, named=None)
        variant = self._requested_dtype(dtype) or DEFAULT_DTYPE
        request = FillRequest(source=source, resolved=resolved, dtype=variant, code=code, link=True, observer=observer)
        snapshot = self.catalog.published_twin(request.key) or self._single_fill.obtain(request)
        refs.record_commit(
            self.layout,
            resolved.repo_id,
            resolved.revision,
            resolved.commit,
            replacing=source.replaces_recorded_commit,  # a cache may be older than the fleet
            check=self.check_may_change,
        )
        mark_used(self.layout, snapshot.key)
        return snapshot

    def check_may_change(self) -> None:
        """Raise ReadOnlyVolume if this store must not change its volume: see `volume/capabilities.py`."""
        capabilities.check_may_change(self.layout, self.settings)

    def snapshots(self) -> Iterator[Snapshot]:
        """Every published snapshot, by repo and commit; damaged ones are left out, with a warning."""
        return self.catalog.snapshots()

    def ensure(
        self,
        reference: str | Reference,
        *,
        revision: str | None = None,
        dtype: str | None = None,
        refresh: bool = False,
        overflow: Overflow = "stop",
        damaged: Snapshot | None = None,
        wait_s: float | None = None,
        observer: Observer = SILENT,
        timeline: Timeline | None = None,
    ) -> Snapshot:
        """The snapshot, downloaded if need be by exactly one of the processes that ask for it at once.

        `dtype`: without one here or in the settings, the variant that was seeded last, else float16. `refresh`: ask the
        source for the newest commit of the revision, even if the volume has an answer, and let the fleet use the
        result, as `seed` does; float16 then, if no dtype is given. `overflow="bfloat16"`: if a weight does not fit
        float16, store the bfloat16 variant instead. `damaged`: a snapshot whose bytes a load found to be wrong; it is
        compared again, and if need be quarantined and made anew, from the files of it that are intact and the source.
        A snapshot that is there in either form, plain or compressed, is returned: MODELSTORE_COMPRESS says how a new
        one is stored, and which form is returned if both are there.
        `wait_s`: how long to wait for another's claim, MODELSTORE_WAIT_S by default.

        Raises a ModelStoreError: NotFound, AccessDenied, HubUnavailable, IntegrityError, NoSpace, WaitTimeout, Refused.
        """
        named = parsed = _parsed(reference, revision)
        self.settings.check_allowed(parsed)
        if parsed.kind == "alias":
            key = aliases.target(self.layout, parsed.name, worker=self.settings.worker_id)
            parsed, dtype = Reference("hub", key.repo_id, key.commit), key.dtype
        timeline = timeline or Timeline()
        before = self._answer(parsed) if refresh else None
        variant = self._variant(parsed, dtype, refresh=refresh)
        with timeline.span("lookup"):
            present = self._present(parsed, accepted_dtypes(variant, overflow), refresh=refresh)
        mended = present if refresh and present is not None and known_problem(self.layout, present.key) else None
        if present is not None and is_same(present, damaged):
            parsed, variant = replace(parsed, revision=present.commit), parse_dtype("dtype", present.dtype)
        elif (
            present is not None
            and mended is None
            and (not refresh or is_commit(parsed.revision) or self.settings.offline)
        ):
            kept = self._kept(present, parsed)
            if kept is not None:
                self._record_variant(kept.key, before, named, seeds=refresh)
                return kept
        with timeline.span("lookup"):
            try:
                source, resolved = self._resolve(parsed, refresh=refresh)
            except ModelStoreError as error:
                if (other := self._other_form(damaged)) is None:
                    raise
                logger.warning("%s is damaged and cannot be mended: %s serves (%s)", parsed, other.key, error)
                mark_used(self.layout, other.key)
                return other
        if mended is not None and (mended.repo_id, mended.commit) == (resolved.repo_id, resolved.commit):
            damaged, variant = mended, parse_dtype("dtype", mended.dtype)
        request = FillRequest(
            source=source,
            resolved=resolved,
            dtype=variant,
            compressed=self._form_to_store() if damaged is None else damaged.key.compressed,
            code=source.may_bring_code(resolved, self.settings, named=named),
            damaged=damaged,
            wait_s=wait_s,
            observer=observer,
            timeline=timeline,
        )
        try:
            snapshot = self._in_accepted_dtype(request, overflow)
        except IntegrityError as error:
            if not source.is_copy:
                raise
            logger.warning("%s is not used: %s", source.label, error)
            request = self._from_original(request, parsed, named, error)
            snapshot = self._in_accepted_dtype(request, overflow)
        self._record_commit(request.resolved, parsed, seeds=refresh)
        self._record_variant(snapshot.key, before, named, seeds=refresh)
        mark_used(self.layout, snapshot.key)
        if request.code and snapshot.lacks_code:
            logger.warning(
                "%s was stored without its code: to have it, run `modelstore rm %s@%s` and seed it again",
                snapshot.key,
                snapshot.repo_id,
                snapshot.commit[:12],
            )
        return snapshot

    def _kept(self, present: Snapshot, reference: Reference) -> Snapshot | None:
        """A snapshot that is there, marked as used; if an eviction was about to take it, what is there after that."""
        mark_used(self.layout, present.key)
        if wait_while_evicting(self.layout, present.key, sleep=self._sleep):
            return self.lookup(reference, dtype=present.dtype)
        return present

    def _other_form(self, damaged: Snapshot | None) -> Snapshot | None:
        """The other form of a damaged snapshot, if that is published, and this process can read it."""
        if damaged is None or not (damaged.key.compressed or has_decoder()):
            return None
        return self.catalog.published(damaged.key.twin)

    def _answer(self, reference: Reference) -> SnapshotKey | None:
        """The key that answers a reference, no alias, if no variant is asked for, and if it is there."""
        try:
            return self.catalog.find_key(reference, None)
        except IntegrityError:  # a damaged record, which a seed writes anew
            return None

    def _record_commit(self, resolved: Resolved, reference: Reference, *, seeds: bool) -> None:
        """Record what the revision of a reference led to. A start that may not change the volume leaves it: the next
        one asks the Hub again."""
        if seeds or capabilities.may_change(self.layout, self.settings):
            refs.record_commit(
                self.layout,
                resolved.repo_id,
                resolved.revision,
                resolved.commit,
                replacing=seeds,
                check=self.check_may_change,
                asked_as=repo_id_of(reference),
            )

    def _record_variant(self, key: SnapshotKey, before: SnapshotKey | None, named: Reference, *, seeds: bool) -> None:
        """After a seed: let its variant answer if none is asked for. `keep` is often made to be exported: it does not
        take the place of another variant of the commit. `before`: the key that answered until now."""
        is_export = key.dtype == "keep" and before is not None and before.commit == key.commit
        if not seeds or named.kind == "alias" or (is_export and before is not None and before.dtype != "keep"):
            return
        refs.record_dtype(self.layout, key, check=self.check_may_change)
        if before is not None and before.dtype != key.dtype:
            logger.warning(
                "%s is served as %s from now on, before as %s; MODEL_DTYPE asks for another variant",
                key.repo_id,
                key.dtype,
                before.dtype,
            )

    def _from_original(
        self, request: FillRequest, parsed: Reference, named: Reference, error: IntegrityError
    ) -> FillRequest:
        """The request for the same commit from the Hub, after a copy of it proved to be damaged."""
        pinned = replace(parsed, revision=request.resolved.commit)
        try:
            source, resolved = self._resolve(pinned, refresh=False, copies=False)
        except ModelStoreError as unreachable:
            raise DigestMismatch(
                f"{request.source.label} is damaged ({error}), and the Hub cannot be asked ({unreachable}): remove "
                "that cache, or try again when the Hub answers"
            ) from error
        code = source.may_bring_code(resolved, self.settings, named=named)
        return replace(request, source=source, resolved=resolved.for_revision(request.resolved.revision), code=code)

    def _present(self, reference: Reference, dtypes: Sequence[Dtype], *, refresh: bool) -> Snapshot | None:
        """The snapshot that the records lead to; a damaged record leads nowhere if it is to be written anew."""
        try:
            return next(filter(None, (self.lookup(reference, dtype=dtype) for dtype in dtypes)), None)
        except IntegrityError:
            if not refresh:
                raise
            return None

    def _in_accepted_dtype(self, request: FillRequest, overflow: Overflow) -> Snapshot:
        """The snapshot in the dtype of the request, or in its fallback if weights overflow and that is allowed."""
        accepted = accepted_dtypes(request.dtype, overflow)
        snapshot = self._published(request.key, accepted) if request.damaged is None else None
        for dtype in accepted if snapshot is None else ():
            try:
                return self._single_fill.obtain(replace(request, dtype=dtype))
            except WeightOverflow as error:
                if dtype == accepted[-1]:
                    raise
                logger.warning("%s: %s is stored instead, as allowed", error.problem, accepted[-1])
        assert snapshot is not None
        return snapshot

    def _published(self, key: SnapshotKey, dtypes: Sequence[Dtype]) -> Snapshot | None:
        """The first of these variants of a snapshot that is published."""
        return next(filter(None, (self.catalog.published_twin(replace(key, dtype=dtype)) for dtype in dtypes)), None)

    def _form_to_store(self) -> bool:
        """Whether a new snapshot is compressed."""
        if self.settings.compress == "auto" and recorded_rate(self.layout) is None:
            logger.info("MODELSTORE_COMPRESS=auto: stored plain, until `modelstore doctor` has measured the read rate")
        return prefers_compressed(self.layout, self.settings.compress)

    def _resolve(self, reference: Reference, *, refresh: bool, copies: bool = True) -> tuple[Source, Resolved]:
        """The source to fill from, and the commit. `copies`: an HF cache on the volume may be the source."""
        try:
            commit = refs.recorded(self.layout, reference).commit
        except IntegrityError as error:
            if not refresh:
                raise
            logger.warning("%s", error)
            commit = ""
        try:
            return resolve(
                reference, self.settings, recorded_commit=commit, refresh=refresh, copies=copies, sleep=self._sleep
            )
        except RepoNotFound as error:
            if similar := self.catalog.similar(repo_id_of(reference)):
                raise RepoNotFound(f"{error}; did you mean {similar}, which is on the volume?") from error
            raise

    def _requested_dtype(self, dtype: str | None) -> Dtype | None:
        return parse_dtype("dtype", dtype) if dtype else self.settings.dtype

    def _variant(self, reference: Reference, dtype: str | None, *, refresh: bool) -> Dtype:
        """The variant to look for and to make. A seed states it; otherwise the volume tells it."""
        requested = self._requested_dtype(dtype)
        if requested is not None or refresh:
            return requested or DEFAULT_DTYPE
        return parse_dtype("dtype", self.catalog.dtype_of(reference))


def _parsed(reference: str | Reference, revision: str | None) -> Reference:
    return parse_reference(reference, revision=revision) if isinstance(reference, str) else reference
