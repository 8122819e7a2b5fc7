"""A whole start in one page: find the snapshot or make it, have its bytes in flight, load them.

    pending = begin(settings)      the standard library, the store and the reader; no torch
    import torch, transformers     while the bytes are read
    pending.load(build)            build(pending) makes the model; if the bytes are not those published, the snapshot
                                   is quarantined and made again, and the start goes on with the new one

A start that has to fill the snapshot takes the bytes as they come: see `prefetch.py`.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from modelstore.errors import (
    DoesNotFit,
    InvalidSetting,
    SnapshotNotFound,
)
from modelstore.fill.observer import ForwardingObserver, LogObserver, Observer
from modelstore.load import memory
from modelstore.load.reader import RING_BYTES, Reading, start_reading
from modelstore.pending_start import PendingStart, begin_copies, end_reading
from modelstore.servable import CheckConfig, check_nothing
from modelstore.settings import Settings
from modelstore.timeline import Outcome, Timeline
from modelstore.volume.layout import Layout, SnapshotKey
from modelstore.volume.pins import UsageMark, wait_while_evicting
from modelstore.volume.snapshots import Catalog, Snapshot, Status

if TYPE_CHECKING:
    from modelstore.load.transfer import Transfer

logger = logging.getLogger(__name__)

T = TypeVar("T")
Target = Literal["device", "host", "shared"]
CheckFits = Callable[[object, int], None]

_LOOKS = 5
_KEPT_BYTES = RING_BYTES // 2  # of the bytes written here, beside the ring: a start takes 2 GB of host memory
_SWITCH_S = 0.0005  # imports hold the interpreter's lock; a download asks for it a few times for each 256 KiB
_OUTCOMES: Mapping[Status, tuple[Outcome, str]] = {
    "present": ("hit", "the snapshot was on the volume"),
    "waited": ("waited", "another worker was making the snapshot"),
    "resumed": ("resumed", "an earlier worker had left the download unfinished"),
    "downloaded": ("downloaded", "the snapshot was not on the volume"),
}


@contextmanager
def _beside(work: Callable[[], object]) -> Iterator[None]:
    """Run the block with `work` in a thread beside it, to its end. An error of it is dropped, because the caller does
    the same work again."""

    def run() -> None:
        with suppress(Exception):
            work()

    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    thread = threading.Thread(target=run, name="beside", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        sys.setswitchinterval(before)


def begin(
    settings: Settings,
    *,
    observer: Observer | None = None,
    timeline: Timeline | None = None,
    target: Target = "device",
    gpu: str = "cuda:0",
    spare_bytes: int = 0,
    while_filling: Callable[[], object] = lambda: None,
    check_config: CheckConfig = check_nothing,
) -> PendingStart:
    """Make sure that the model is on the volume, and start to read its weights.

    `timeline`: that of the process by default. `target`: the place that the bytes are read for: a device, the CPU if
    there is no GPU; host memory; or memory that a server beside this process opens, which gets only the small files if
    the host has no room for the weights. `gpu`: the device that the weights are copied to as they arrive; if there are
    several and it has no room for them, nothing is copied yet. `spare_bytes`: memory that has to stay free besides.
    `while_filling`: a callback for the work that comes next, such as imports; it runs in a thread during a download or
    a wait, not on a hit, nor for a server. `check_config`: a check before a download, of `servable.py`.

    Raises InvalidSetting if no model is set, DoesNotFit if the GPUs or the host have no room for it, and the errors of
    `ModelStore.ensure`.
    """
    if settings.model is None:
        raise _no_model()
    timeline = timeline or Timeline(
        worker=settings.worker_id, model=str(settings.model or ""), dtype=settings.dtype or ""
    )
    settings.check_allowed(settings.model)
    timeline.volume_mode = settings.volume_mode or ""
    observer = observer or LogObserver()
    gpus = memory.free_gpu_bytes(settings.visible_gpus) if target == "device" else None
    # Asked once: the read itself takes memory.
    free = memory.free_host_memory() if gpus is None else memory.of_gpus(gpus)
    start = _Start(
        settings,
        observer,
        timeline,
        target,
        gpu,
        gpus,
        spare_bytes,
        check_fits=free.less(spare_bytes).check_fits if free is not None else _no_check,
        while_filling=while_filling,
        check_config=check_config,
    )
    try:
        snapshot, reading, mark = start.run()
    except BaseException:
        start.give_up()
        raise
    note_outcome(timeline, snapshot)
    return PendingStart(settings, snapshot, reading, mark, timeline, observer, start.ring_bytes, start.transfer)


@dataclass(slots=True)
class _Start:
    """A start until its bytes are in flight: the arguments of `begin`, and what is held so far.

    `gpus`: the free bytes of each GPU; None if the bytes are for host memory.
    """

    settings: Settings
    observer: Observer
    timeline: Timeline
    target: Target
    gpu: str
    gpus: Sequence[int] | None
    spare_bytes: int
    check_fits: CheckFits
    while_filling: Callable[[], object]
    check_config: CheckConfig
    mark: UsageMark | None = None
    reading: Reading | None = None
    transfer: Transfer | None = None

    @property
    def ring_bytes(self) -> int:
        """The host memory through which the bytes go to a GPU; 0 without one."""
        return 0 if self.gpus is None else RING_BYTES

    def run(self) -> tuple[Snapshot, Reading, UsageMark]:
        """The snapshot, its reading, and the mark that it is in use. Raises SnapshotNotFound if it is evicted each time
        that it was found."""
        for attempt in range(_LOOKS):
            snapshot = self._find_or_fill()
            mark = self._mark_used(snapshot)
            if mark is None:
                self._end_reading()
                continue
            try:
                return snapshot, self._read(snapshot), mark
            except SnapshotNotFound:  # evicted between the look and the open
                if attempt + 1 == _LOOKS:
                    raise
        raise SnapshotNotFound(f"{self.settings.model} is evicted again and again: pin it, or raise MODELSTORE_QUOTA")

    def give_up(self) -> None:
        """Let go of all that is held."""
        try:
            self._end_reading()
        finally:
            if self.mark is not None:
                self.mark.end()

    def _find_or_fill(self) -> Snapshot:
        settings = self.settings
        assert settings.model is not None
        catalog = Catalog.of(settings)
        snapshot = _lookup(settings, catalog, self.timeline)
        if snapshot is None and self.target != "shared":
            snapshot = self._fill_and_prefetch()
        elif snapshot is None:
            from modelstore.store import ModelStore

            snapshot = ModelStore.of(settings).ensure(settings.model, timeline=self.timeline, observer=self.observer)
        if self.target == "shared":
            snapshot = _readable_by_server(snapshot, catalog, self.check_fits)
        return snapshot

    def _fill_and_prefetch(self) -> Snapshot:
        """The snapshot, made here or waited for; what is written here is read on the way, and copied to the GPU if
        there is one alone."""
        from modelstore.prefetch import StagingPrefetch
        from modelstore.store import ModelStore  # its imports (numpy, HTTP) are for a miss alone

        assert self.settings.model is not None
        store = ModelStore.of(self.settings)
        reading = self.reading = Reading(beside=True, ring_bytes=self.ring_bytes)
        if self.gpus is not None and len(self.gpus) == 1:
            self.transfer = begin_copies(self.gpu, reading)
        keep_bytes = _KEPT_BYTES if self.ring_bytes else float("inf")
        observer = _CheckedFill(self.observer, self.check_config, self.check_fits)
        prefetch = StagingPrefetch(store.layout, observer, reading, keep_bytes=keep_bytes)
        try:
            with _beside(self.while_filling):
                snapshot = store.ensure(self.settings.model, timeline=self.timeline, observer=prefetch)
                self.check_fits(snapshot.key, snapshot.weights_bytes)
                is_of_use = prefetch.finish(snapshot)
        except BaseException:
            prefetch.give_up()
            raise
        if not is_of_use:
            self._end_reading()
        return snapshot

    def _mark_used(self, snapshot: Snapshot) -> UsageMark | None:
        """The mark that the snapshot is in use; None if an eviction has taken it."""
        if self.mark is not None and self.mark.key == snapshot.key:
            return self.mark
        if self.mark is not None:
            self.mark.end()
        layout = Layout(self.settings.root)
        self.mark = UsageMark(layout, snapshot.key, self.settings.worker_id)
        # An eviction sees each mark that is older than its notice: only a new mark has to look.
        return None if wait_while_evicting(layout, snapshot.key) else self.mark

    def _read(self, snapshot: Snapshot) -> Reading:
        """The reading of the snapshot, which begins now unless it has begun while it was filled."""
        if self.reading is None:
            weights = _worth_reading(snapshot, self.check_fits, self.target)
            self.reading = start_reading(snapshot, beside=True, ring_bytes=self.ring_bytes, weights=weights)
            needed_bytes = snapshot.weights_bytes + self.spare_bytes
            if self.gpus is not None and self.gpus[_number(self.gpu, self.gpus)] >= needed_bytes:
                self.transfer = begin_copies(self.gpu, self.reading)
        return self.reading

    def _end_reading(self) -> None:
        """Stop the read and its copies, and give their memory back."""
        end_reading(self.reading, self.transfer)
        self.reading = self.transfer = None


class _CheckedFill(ForwardingObserver):
    """Stops a fill of a model that is not served, by its config, or that does not fit."""

    def __init__(self, observer: Observer, check_config: CheckConfig, check_fits: CheckFits) -> None:
        super().__init__(observer)
        self._check_config = check_config
        self._check_fits = check_fits

    def described(self, key: SnapshotKey, config: Mapping[str, Any], files: Collection[str]) -> None:
        self._check_config(config, files, key.repo_id)
        super().described(key, config, files)

    def planned(self, key: SnapshotKey, *, weights_bytes: int) -> None:
        self._check_fits(key, weights_bytes)
        super().planned(key, weights_bytes=weights_bytes)


def find_or_make(settings: Settings, timeline: Timeline, check_config: CheckConfig) -> Snapshot:
    """The snapshot of the model, which is made if it is not on the volume; nothing of it is read yet. Arguments and
    errors are those of `begin`."""
    if settings.model is None:
        raise _no_model()
    settings.check_allowed(settings.model)
    if (snapshot := _lookup(settings, Catalog.of(settings), timeline)) is not None:
        return snapshot
    from modelstore.store import ModelStore

    observer = _CheckedFill(LogObserver(), check_config, _no_check)
    return ModelStore.of(settings).ensure(settings.model, timeline=timeline, observer=observer)


def _lookup(settings: Settings, catalog: Catalog, timeline: Timeline) -> Snapshot | None:
    """The model's snapshot, if it is on the volume; a span of the start."""
    assert settings.model is not None
    with timeline.span("lookup"):
        return catalog.find(settings.model, settings.dtype, worker=settings.worker_id)


def note_outcome(timeline: Timeline, snapshot: Snapshot) -> None:
    """Record how a start came to its snapshot."""
    timeline.commit, timeline.dtype = snapshot.commit, snapshot.dtype
    timeline.outcome, timeline.reason = _OUTCOMES[snapshot.status]
    if snapshot.status == "downloaded" and not snapshot.downloaded_bytes:
        timeline.outcome, timeline.reason = "copied", f"the snapshot was made from {snapshot.manifest.source.label}"


def _no_model() -> InvalidSetting:
    return InvalidSetting("MODEL_ID is not set: name the model to serve, as in MODEL_ID=org/name")


def _number(gpu: str, gpus: Sequence[int]) -> int:
    """The number of a GPU among these; of the first, if it is not one of them."""
    number = gpu.rpartition(":")[2]
    return int(number) if number.isdigit() and int(number) < len(gpus) else 0


def _readable_by_server(snapshot: Snapshot, catalog: Catalog, check_fits: CheckFits) -> Snapshot:
    """The snapshot; its plain form, if that is there, if the host has no room to decode it for a server."""
    if snapshot.has_compressed_files:
        try:
            check_fits(snapshot.key, snapshot.weights_bytes)
        except DoesNotFit:
            return catalog.published(snapshot.key.plain) or snapshot
    return snapshot


def _worth_reading(snapshot: Snapshot, check_fits: CheckFits, target: Target) -> bool:
    """Whether to read the weights, too; raises DoesNotFit if nothing else will do."""
    try:
        check_fits(snapshot.key, snapshot.weights_bytes)
    except DoesNotFit as error:
        if target != "shared":
            raise
        if snapshot.has_compressed_files:
            raise DoesNotFit(
                f"{error}; vLLM would read plain files from the volume by itself: run `modelstore expand "
                f"{snapshot.repo_id}@{snapshot.commit[:12]}`"
            ) from error
        logger.warning("the server will read the weights from the volume by itself: %s", error)
        return False
    return True


def _no_check(_label: object, _needed_bytes: int) -> None:
    """The check if the system does not say how much is free."""
