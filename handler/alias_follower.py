"""A worker that serves an alias follows it: when it is repointed, running jobs are finished, and the next job is
answered by the new model. If models cannot be exchanged in the process, the worker asks to be replaced."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from handler.engines import Engine, ServesAdapters
from modelstore.errors import NotServable, Refused
from modelstore.settings import Settings
from modelstore.timeline import Timeline
from modelstore.volume import aliases, history
from modelstore.volume.layout import Layout, SnapshotKey

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
_RETRY_S = 30.0


class Follower(ABC):
    """Looks up the target of an alias every two seconds, in a thread of its own, and has it served if it has moved."""

    def __init__(self, alias: str, settings: Settings) -> None:
        self._name = alias
        self._layout = Layout(settings.root)
        self._worker = settings.worker_id
        self._failed: tuple[SnapshotKey, float] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follow-alias", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Return when the thread has ended."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            try:
                self.look()
            except BaseException as error:  # a volume in trouble, or a damaged record, is asked again
                logger.warning("@%s cannot be followed just now: %s: %s", self._name, type(error).__name__, error)

    def look(self) -> None:
        """Swap if the alias has moved. Raises if the volume cannot be read."""
        pointed_to = aliases.target(self._layout, self._name, worker=self._worker)
        if pointed_to == self._served():
            return
        if self._failed and self._failed[0] == pointed_to and time.monotonic() - self._failed[1] < _RETRY_S:
            return
        logger.info("@%s points to %s now: swapping", self._name, pointed_to)
        began = time.monotonic()
        try:
            timeline = self._swap()
        except BaseException as error:  # a tokenizer's panic too: the model that serves goes on
            logger.warning("@%s cannot be served: %s: %s", self._name, type(error).__name__, error)
            self._failed = pointed_to, time.monotonic()
            failed = Timeline(
                worker=self._worker,
                model=f"@{self._name}",
                commit=pointed_to.commit,
                dtype=pointed_to.dtype,
                kind="swap",
                began=began,
            )
            failed.mark("ready")
            history.add(self._layout, failed, error=f"{type(error).__name__}: {error}")
            return
        if timeline is not None:
            logger.info("@%s: %s", self._name, timeline.log_line())
            history.add(self._layout, timeline)

    @abstractmethod
    def _served(self) -> SnapshotKey:
        """The snapshot that serves for the alias."""

    @abstractmethod
    def _swap(self) -> Timeline | None:
        """Serve the alias's target; returns the record, None if that takes a new process."""


class AliasFollower(Follower):
    """Follows the alias of MODEL_ID."""

    def __init__(self, engine: Engine, settings: Settings, replace_worker: Callable[[str], None]) -> None:
        """`replace_worker` is called with the reason if only a new process can serve the alias's model."""
        assert settings.model is not None
        super().__init__(settings.model.name, settings)
        self._engine = engine
        self._replace_worker = replace_worker

    def _served(self) -> SnapshotKey:
        status = self._engine.status()
        return SnapshotKey(status["model"], status["commit"], status["dtype"])

    def _swap(self) -> Timeline | None:
        try:
            return self._engine.swap(f"@{self._name}")
        except Refused as error:
            self._replace_worker(str(error))
            return None


class AdapterFollower(Follower):
    """Follows the alias of an adapter in MODEL_ADAPTERS."""

    def __init__(
        self, engine: ServesAdapters, settings: Settings, adapter: str, replace_worker: Callable[[str], None]
    ) -> None:
        """`adapter`: its name in jobs. `replace_worker`: see AliasFollower."""
        super().__init__(settings.adapters[adapter].name, settings)
        self._engine = engine
        self._replace_worker = replace_worker
        self._adapter = adapter

    def _served(self) -> SnapshotKey:
        return self._engine.adapter(self._adapter)

    def _swap(self) -> Timeline | None:
        try:
            return self._engine.swap_adapter(self._adapter)
        except NotServable:
            raise
        except Refused as error:
            self._replace_worker(str(error))
            return None
