"""A whole start in one page: find the snapshot or make it, have its bytes in flight, load them.

    pending = begin(settings)      the standard library, the store and the reader; no torch
    import torch, transformers     while the bytes are read
    pending.load(build)            build(pending) makes the model; if the bytes are not those published, the snapshot
                                   is quarantined and made again, and the start goes on with the new one

A start that has to fill the snapshot takes the bytes as they come: see `prefetch.py`.
"""

from __future__ import annotations

import gc
import logging
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from modelstore.errors import (
    DigestMismatch,
    DoesNotFit,
    InvalidSetting,
    ModelStoreError,
    ServerFailed,
    SnapshotNotFound,
)
from modelstore.fill.observer import LogObserver, Observer
from modelstore.load import memory
from modelstore.load.reader import RING_BYTES, Reading, start_reading
from modelstore.servable import CheckConfig, check_nothing
from modelstore.settings import Settings
from modelstore.timeline import Outcome, Timeline
from modelstore.volume.capabilities import may_change
from modelstore.volume.config_sizes import check_configs
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


@dataclass(slots=True)
class PendingStart:
    """A start whose bytes are in flight. `snapshot` and `reading` are exchanged if the first were damaged.

    `transfer`: the copies to the GPU, which have begun unless several GPUs have to share the weights; None without one.
    """

    settings: Settings
    snapshot: Snapshot
    reading: Reading
    in_use: UsageMark
    timeline: Timeline
    observer: Observer
    ring_bytes: int
    transfer: Transfer | None = None

    @property
    def trusted(self) -> bool:
        """Whether the snapshot brings code of its own that may run."""
        key, model = self.snapshot.key, self.settings.model
        names = {key.repo_id} if model is None or model.kind != "hub" else {key.repo_id, model.name}
        may_run = any(self.settings.may_run_code_of(name, key.commit) for name in names)
        return self.snapshot.manifest.remote_code and may_run

    def load(self, build: Callable[[PendingStart], T]) -> T:
        """The model that `build` makes of this start; called again, once, if the first bytes were not those published.

        Raises DigestMismatch if the damage cannot be mended, and whatever `build` raises.
        """
        files = (file.path for file in self.snapshot.manifest.contents)
        try:
            check_configs(self.snapshot.path, files, str(self.snapshot.key))
            self._check_gpus()
            return self._built(build)
        except (KeyboardInterrupt, SystemExit):
            self._end_copies()
            raise
        except BaseException as error:  # a damaged tokenizer can raise anything in its parser
            if isinstance(error, ServerFailed):  # it was told of wrong bytes, if there were any
                self._end_copies()
                raise
            mismatch = error if isinstance(error, DigestMismatch) else self.reading.damage()
            if mismatch is None:
                self._end_copies()
                raise
            damage = str(mismatch)
            del mismatch  # its traceback holds the buffers
        logger.warning("%s; comparing it again", damage)
        device = self.transfer.device_of("") if self.transfer is not None else None
        has_weights = any(self.reading.holds(file.path) for file in self.snapshot.weights)
        self._stop_reading()
        try:
            self._begin_again(device, has_weights=has_weights)
        except ModelStoreError as error:
            raise DigestMismatch(f"{damage}; it could not be made again: {error}") from error
        return self._built(build)

    def _built(self, build: Callable[[PendingStart], T]) -> T:
        model = build(self)
        self.transfer = None  # it knows the memory, which is freed with the model
        return model

    def _stop_reading(self) -> None:
        """End the read and the copies, so that their memory is free before the next ones take as much."""
        self._end_copies()
        del self.reading
        gc.collect()

    def _end_copies(self) -> None:
        _end(self.reading, self.transfer)
        self.transfer = None

    def _check_gpus(self) -> None:
        """Read for the CPU instead, if the weights are on their way to a GPU that torch cannot use."""
        if self.transfer is None:
            return
        from modelstore.load.torch_device import can_use_gpus

        if not can_use_gpus():
            logger.warning("there is a GPU, and the installed torch cannot use it: the model is loaded on the CPU")
            self._stop_reading()
            self.ring_bytes = 0
            self.reading = start_reading(self.snapshot, beside=True)

    def _begin_again(self, device: str | None, *, has_weights: bool) -> None:
        from modelstore.store import ModelStore

        store, model = ModelStore(self.settings.root, settings=self.settings), self.settings.model
        assert model is not None
        if may_change(store.layout, self.settings):
            fresh = store.ensure(
                model, dtype=self.snapshot.dtype, damaged=self.snapshot, observer=self.observer, timeline=self.timeline
            )
            self.timeline.reason += "; it was damaged and made again"
        else:
            from modelstore.private_copy import private_copy

            fresh = private_copy(self.settings, self.snapshot, observer=self.observer, timeline=self.timeline)
            self.timeline.reason += "; it is damaged on a volume that is not changed: this worker has a copy of its own"
        self.in_use.end()
        self.in_use = UsageMark(store.layout, fresh.key, self.settings.worker_id)
        self.timeline.commit, self.timeline.dtype = fresh.commit, fresh.dtype
        self.snapshot = fresh
        self.reading = start_reading(fresh, beside=True, ring_bytes=self.ring_bytes, weights=has_weights)
        self.transfer = None if device is None else _transfer_to(device, self.reading)


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
        with self.timeline.span("lookup"):
            catalog = Catalog.of(settings)
            snapshot = catalog.find(settings.model, settings.dtype, worker=settings.worker_id)
        if snapshot is None and self.target != "shared":
            snapshot = self._fill_and_prefetch()
        elif snapshot is None:
            from modelstore.store import ModelStore

            store = ModelStore(settings.root, settings=settings)
            snapshot = store.ensure(settings.model, timeline=self.timeline, observer=self.observer)
        if self.target == "shared":
            snapshot = _readable_by_server(snapshot, catalog, self.check_fits)
        return snapshot

    def _fill_and_prefetch(self) -> Snapshot:
        """The snapshot, made here or waited for; what is written here is read on the way, and copied to the GPU if
        there is one alone."""
        from modelstore.prefetch import StagingPrefetch
        from modelstore.store import ModelStore  # its imports (numpy, HTTP) are for a miss alone

        assert self.settings.model is not None
        store = ModelStore(self.settings.root, settings=self.settings)
        reading = self.reading = Reading(beside=True, ring_bytes=self.ring_bytes)
        if self.gpus is not None and len(self.gpus) == 1:
            self.transfer = _transfer_to(self.gpu, reading)
        keep_bytes = _KEPT_BYTES if self.ring_bytes else float("inf")
        prefetch = StagingPrefetch(
            store.layout,
            self.observer,
            reading,
            keep_bytes=keep_bytes,
            check=self.check_fits,
            check_config=self.check_config,
        )
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
                self.transfer = _transfer_to(self.gpu, self.reading)
        return self.reading

    def _end_reading(self) -> None:
        """Stop the read and its copies, and give their memory back."""
        _end(self.reading, self.transfer)
        self.reading = self.transfer = None


class _CheckedFill(LogObserver):
    """Logs a fill that the config of the model may stop."""

    def __init__(self, check_config: CheckConfig) -> None:
        super().__init__()
        self._check_config = check_config

    def described(self, key: SnapshotKey, config: Mapping[str, Any], files: Collection[str]) -> None:
        self._check_config(config, files, key.repo_id)


def find_or_make(settings: Settings, timeline: Timeline, check_config: CheckConfig) -> Snapshot:
    """The snapshot of the model, which is made if it is not on the volume; nothing of it is read yet. Arguments and
    errors are those of `begin`."""
    if settings.model is None:
        raise _no_model()
    settings.check_allowed(settings.model)
    with timeline.span("lookup"):
        catalog = Catalog.of(settings)
        snapshot = catalog.find(settings.model, settings.dtype, worker=settings.worker_id)
    if snapshot is not None:
        return snapshot
    from modelstore.store import ModelStore

    store = ModelStore(settings.root, settings=settings)
    return store.ensure(settings.model, timeline=timeline, observer=_CheckedFill(check_config))


def note_outcome(timeline: Timeline, snapshot: Snapshot) -> None:
    """Record how a start came to its snapshot."""
    timeline.commit, timeline.dtype = snapshot.commit, snapshot.dtype
    timeline.outcome, timeline.reason = _OUTCOMES[snapshot.status]
    if snapshot.status == "downloaded" and not snapshot.downloaded_bytes:
        timeline.outcome, timeline.reason = "copied", f"the snapshot was made from {snapshot.manifest.source.label}"


def _no_model() -> InvalidSetting:
    return InvalidSetting("MODEL_ID is not set: name the model to serve, as in MODEL_ID=org/name")


def _transfer_to(gpu: str, reading: Reading) -> Transfer:
    """Copy the blocks of a reading to a GPU as they arrive."""
    from modelstore.load.device import open_devices
    from modelstore.load.transfer import Transfer

    return Transfer(reading, lambda: open_devices([gpu]), lambda _name: gpu)


def _end(reading: Reading | None, transfer: Transfer | None) -> None:
    """Stop a read and its copies, and give their memory back."""
    if reading is not None:
        reading.close()
    if transfer is not None:
        transfer.end()


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
