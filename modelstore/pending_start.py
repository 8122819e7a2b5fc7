"""A start whose bytes are in flight, until its model is built; once more from good bytes, if the first were damaged."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from modelstore.errors import DigestMismatch, ModelStoreError, ServerFailed
from modelstore.fill.observer import Observer
from modelstore.load.reader import Reading, start_reading
from modelstore.settings import Settings
from modelstore.timeline import Timeline
from modelstore.volume.capabilities import may_change
from modelstore.volume.config_sizes import check_configs
from modelstore.volume.pins import UsageMark
from modelstore.volume.snapshots import Snapshot

if TYPE_CHECKING:
    from modelstore.load.transfer import Transfer

logger = logging.getLogger(__name__)

T = TypeVar("T")


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
        end_reading(self.reading, self.transfer)
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

        store, model = ModelStore.of(self.settings), self.settings.model
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
        self.transfer = None if device is None else begin_copies(device, self.reading)


def begin_copies(gpu: str, reading: Reading) -> Transfer:
    """Copy the blocks of a reading to a GPU as they arrive."""
    from modelstore.load.device import open_devices
    from modelstore.load.transfer import Transfer

    return Transfer(reading, lambda: open_devices([gpu]), lambda _name: gpu)


def end_reading(reading: Reading | None, transfer: Transfer | None) -> None:
    """Stop a read and its copies, and give their memory back."""
    if reading is not None:
        reading.close()
    if transfer is not None:
        transfer.end()
