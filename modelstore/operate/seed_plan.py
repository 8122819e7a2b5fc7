"""A list of models against a volume: the plan of a seed, printed before it is run.

>>> plan = SeedPlan(store, read_list(Path("models.toml")), prune=True)
>>> print(plan.preview().as_json())
>>> result = plan.run(observer=LogObserver())

`run` fetches the models, several at once, gives them their aliases and pins, and removes the models that a pruning list
does not name. `upload` sends the seeded ones to other volumes. One model that fails does not stop the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from modelstore.errors import ModelStoreError
from modelstore.fill.observer import SILENT, ForwardingObserver, Observer
from modelstore.fill.progress import Progress
from modelstore.operate import inventory
from modelstore.operate.seed_list import ListedModel
from modelstore.settings import CompressMode
from modelstore.store import ModelStore
from modelstore.volume import aliases, pins, refs
from modelstore.volume.claim import Holder
from modelstore.volume.evict import Candidate, evict, survey
from modelstore.volume.layout import SnapshotKey

if TYPE_CHECKING:
    from modelstore.fill.upload import RemoteVolume

logger = logging.getLogger(__name__)

_STOPS_WITHIN_S = 2.0

OnError = Callable[[ModelStoreError], None]


@dataclass(frozen=True, slots=True)
class SeedPreview:
    """The outcome of a run that is not made. `models`: a record for each, see `ModelStore.preview`, or with its error;
    sizes in bytes; `exit_code` of the first error, 0 if none."""

    models: tuple[Mapping[str, Any], ...]
    removed: tuple[Candidate, ...]
    aliases_moved: tuple[str, ...]
    taken_before: int
    taken_after: int
    quota: int | None
    exit_code: int = 0
    peak_bytes: int = 0  # of the model that takes most while it is made
    evicts: bool = False  # MODELSTORE_EVICT is set

    @property
    def download_bytes(self) -> int:
        """The bytes over the network; two references may mean one snapshot, which counts once."""
        return sum(record["downloaded_bytes"] for record in _by_key(self.models).values())

    def as_json(self) -> dict[str, Any]:
        return {
            "models": list(self.models),
            "removed": [candidate.key.as_json() for candidate in self.removed],
            "aliases_moved": list(self.aliases_moved),
            "download_bytes": self.download_bytes,
            "taken_before": self.taken_before,
            "taken_after": self.taken_after,
            "quota": self.quota,
        }


@dataclass(frozen=True, slots=True)
class SeedResult:
    """The result of a run: a record for each model, upload and removal, and the exit code of the first error, 0 if
    none."""

    records: tuple[Mapping[str, Any], ...]
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class SeedPlan:
    """Models that a volume shall hold. `prune`: and no others, but for those that are in use, pinned or an alias's."""

    store: ModelStore
    models: Sequence[ListedModel]
    prune: bool = False

    def preview(self) -> SeedPreview:
        """The outcome of `run`, without making it. Asks the sources, changes nothing; raises if a single model cannot
        be had."""
        store = self.store
        records = tuple(self._previewed_or_failed(model) for model in self.models)
        exit_code = next((record["exit_code"] for record in records if "error" in record), 0)
        space = inventory.space(store.layout, store.settings)
        by_key = _by_key(records)
        missing = [record for record in by_key.values() if record["status"] != "present"]
        added = sum(max(record["bytes"] - record["staged_bytes"], 0) for record in missing)
        removed = self._prunable(by_key.keys()) if self.prune and not exit_code else ()
        return SeedPreview(
            models=records,
            removed=removed,
            aliases_moved=self._moved_aliases(self.models, records),
            taken_before=space["taken"],
            taken_after=space["taken"] + added - sum(candidate.size_bytes for candidate in removed),
            quota=space["quota"],
            exit_code=exit_code,
            peak_bytes=max((record["peak_bytes"] for record in missing), default=0),
            evicts=store.settings.evict,
        )

    def moved_aliases(self) -> tuple[str, ...]:
        """The aliases that `run` points to another snapshot than now; asks the sources only about models that give an
        alias which exists."""
        layout = self.store.layout
        models = [model for model in self.models if any(aliases.history(layout, name) for name in model.aliases)]
        return self._moved_aliases(models, [self._previewed_or_failed(model) for model in models])

    def run(
        self,
        *,
        observer: Observer = SILENT,
        parallel: int = 2,
        wait_s: float | None = None,
        on_error: OnError = lambda _error: None,
        on_hang: Callable[[], object] = lambda: None,
        may_remove: Collection[SnapshotKey] | None = None,
    ) -> SeedResult:
        """Fetch the models, `parallel` of them at once. `may_remove`: the snapshots that a person agreed to remove; all
        that the list does not name without it.

        `on_error` gets the error of a model at once, if there are others; a single model's error is raised. Ctrl-C ends
        them all; `on_hang` is called if one of them hangs in the network and does not end.
        """
        stoppable = _StoppableObserver(observer)

        def seed(model: ListedModel) -> Mapping[str, Any] | ModelStoreError:
            try:
                return self._seed(model, stoppable, wait_s)
            except ModelStoreError as error:
                if len(self.models) > 1:
                    on_error(error)
                return error

        records: list[Mapping[str, Any]] = []
        exit_code = 0
        results = _run_all(seed, self.models, parallel, stoppable, on_hang)
        for model, result in zip(self.models, results, strict=True):
            if not isinstance(result, ModelStoreError):
                records.append(result)
                continue
            if len(self.models) == 1:
                raise result
            exit_code = exit_code or result.exit_code
            records.append(_failure(model, result))
        self._record_variants([record for record in records if "error" not in record])
        if self.prune and not exit_code:
            records += self._pruned({_key_of(record) for record in records}, may_remove)
        elif self.prune:
            logger.warning("nothing was removed, because not all of the list is there")
        return SeedResult(tuple(records), exit_code)

    def upload(
        self,
        result: SeedResult,
        volumes: Sequence[RemoteVolume],
        *,
        observer: Callable[[], AbstractContextManager[Observer]],
        verify: bool = False,
        on_error: OnError = lambda _error: None,
    ) -> SeedResult:
        """Upload the models that `run` has seeded to each volume, with an observer for each upload; `verify`: read it
        back."""
        exit_code = result.exit_code
        records = [record for record in result.records if "error" in record]
        for model, seeded in zip(self.models, result.records, strict=True):
            if "error" in seeded:
                continue
            snapshot = self.store.catalog.published(_key_of(seeded))
            assert snapshot is not None
            for volume in volumes:
                try:
                    with observer() as shown:
                        sent = 0 if volume.has(snapshot) else volume.upload(snapshot, observer=shown)
                        if verify:
                            volume.verify(snapshot)
                        volume.record_commit(self.store.layout, snapshot, model.reference)
                    records.append(volume.record(snapshot, sent=sent, status="uploaded" if sent else "present"))
                except ModelStoreError as error:
                    on_error(error)
                    exit_code = exit_code or error.exit_code
                    failed = volume.record(snapshot, sent=0, status="failed")
                    records.append(failed | {"error": str(error), "exit_code": error.exit_code})
        return SeedResult(tuple(records), exit_code)

    def _previewed(self, model: ListedModel) -> dict[str, Any]:
        return self._store_of(model).preview(model.reference, dtype=model.dtype, overflow=model.overflow)

    def _store_of(self, model: ListedModel) -> ModelStore:
        """The store, as it stores and prefers the form of weights that a model asks for."""
        settings = self.store.settings
        if model.compress is None:
            return self.store
        mode: CompressMode = "always" if model.compress else "never"
        return ModelStore.of(replace(settings, compress=mode))

    def _previewed_or_failed(self, model: ListedModel) -> dict[str, Any]:
        """The same; the record of the error if there are other models."""
        try:
            return self._previewed(model)
        except ModelStoreError as error:
            if len(self.models) == 1:
                raise
            return _failure(model, error)

    def _seed(self, model: ListedModel, observer: Observer, wait_s: float | None) -> dict[str, Any]:
        """Publish a model, and give it the aliases and the pin of the list."""
        store = self._store_of(model)
        if model.aliases or model.pin:
            store.check_may_change()
        snapshot = store.ensure(
            model.reference,
            dtype=model.dtype,
            refresh=True,
            overflow=model.overflow,
            wait_s=wait_s,
            observer=observer,
        )
        for name in model.aliases:
            aliases.point(store.layout, name, snapshot.key, store.settings.worker_id)
        if model.pin and not pins.is_pinned(store.layout, snapshot.key):
            pins.pin(store.layout, snapshot.key, "the list")
        return snapshot.as_json()

    def _moved_aliases(self, models: Sequence[ListedModel], previews: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
        """The aliases of these models that point to another snapshot now, or that a canary tries another for."""
        moved = []
        for model, record in zip(models, previews, strict=True):
            for name in model.aliases if "error" not in record else ():
                entries = aliases.history(self.store.layout, name)
                if entries and entries[-1].key.plain != _key_of(record).plain:
                    moved.append(name)
        return tuple(moved)

    def _prunable(self, kept: Sequence[SnapshotKey] | Any) -> tuple[Candidate, ...]:
        """The snapshots that a pruning run would remove: an alias that the list moves keeps nothing. Both forms of a
        listed snapshot, plain and compressed, stay."""
        forms = {key.plain for key in kept}
        named_aliases = {name for model in self.models for name in model.aliases}
        candidates = survey(self.store.layout)
        after = (replace(each, aliases=tuple(set(each.aliases) - named_aliases)) for each in candidates)
        return tuple(each for each in after if each.key.plain not in forms and not each.retained_by)

    def _record_variants(self, records: Sequence[Mapping[str, Any]]) -> None:
        """If the list names several variants of one commit, let the last one answer that was not made for an export."""
        variants: dict[tuple[str, str], list[SnapshotKey]] = {}
        for key in map(_key_of, records):
            variants.setdefault((key.repo_id, key.commit), []).append(key)
        for keys in variants.values():
            served = [key for key in keys if key.dtype != "keep"]
            if len(set(keys)) > 1 and served:
                refs.record_dtype(self.store.layout, served[-1], check=self.store.check_may_change)

    def _pruned(self, kept: set[SnapshotKey], may_remove: Collection[SnapshotKey] | None) -> list[dict[str, Any]]:
        """Remove every other snapshot, of those that may go, that is not in use, pinned or an alias's."""
        records = []
        forms = {key.plain for key in kept}
        for candidate in survey(self.store.layout):
            key = candidate.key
            if key.plain in forms:
                continue
            if may_remove is not None and key not in may_remove and not candidate.retained_by:
                logger.warning("%s stays: it was not in the plan that you were asked about", key)
                records.append({**key.as_json(), "bytes": candidate.size_bytes, "status": "kept"})
                continue
            removed = not candidate.retained_by and evict(self.store.layout, key)
            if not removed:
                logger.warning("%s stays: %s", key, candidate.retained_by or "it has come into use")
            record = {**key.as_json(), "bytes": candidate.size_bytes}
            records.append(record | {"status": "removed" if removed else "kept"})
        return records


class _StoppableObserver(ForwardingObserver):
    """Ends every download once `stop` was called."""

    _stopped = False

    def stop(self) -> None:
        self._stopped = True

    def filling(self, key: SnapshotKey, progress: Progress) -> None:
        self._check()
        super().filling(key, progress)

    def waiting(self, key: SnapshotKey, holder: Holder, *, left_s: float) -> None:
        self._check()
        super().waiting(key, holder, left_s=left_s)

    def _check(self) -> None:
        if self._stopped:
            raise KeyboardInterrupt


def _run_all(
    seed: Callable[[ListedModel], Mapping[str, Any] | ModelStoreError],
    models: Sequence[ListedModel],
    parallel: int,
    observer: _StoppableObserver,
    on_hang: Callable[[], object],
) -> list[Mapping[str, Any] | ModelStoreError]:
    if len(models) == 1 or parallel == 1:
        return [seed(model) for model in models]
    pool = ThreadPoolExecutor(parallel)
    jobs = [pool.submit(seed, model) for model in models]
    try:
        wait(jobs)
    except KeyboardInterrupt:
        observer.stop()
        pool.shutdown(wait=False, cancel_futures=True)
        if wait(jobs, timeout=_STOPS_WITHIN_S).not_done:
            on_hang()
        raise
    return [job.result() for job in jobs]


def _failure(model: ListedModel, error: ModelStoreError) -> dict[str, Any]:
    """The record of a model that failed."""
    return {"reference": str(model.reference), "error": str(error), "exit_code": error.exit_code}


def _by_key(records: Sequence[Mapping[str, Any]]) -> dict[SnapshotKey, Mapping[str, Any]]:
    """The records without those of errors; one for each snapshot."""
    return {_key_of(record): record for record in records if "error" not in record}


def _key_of(record: Mapping[str, Any]) -> SnapshotKey:
    return SnapshotKey(record["repo_id"], record["commit"], record["dtype"], record.get("compressed", False))
