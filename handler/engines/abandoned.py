"""Work in threads that goes on though no job waits for it any more: a thread cannot be killed, so it is watched."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Any


class Abandoned:
    """The work that was left, and since when."""

    def __init__(self) -> None:
        self._since: dict[object, float] = {}
        self._lock = threading.Lock()

    def add(self, work: object) -> None:
        """Nobody waits for `work` from now on."""
        with self._lock:
            self._since[work] = time.monotonic()

    def discard(self, work: object) -> None:
        """`work` has ended."""
        with self._lock:
            self._since.pop(work, None)

    def leave(self, work: Future[Any]) -> None:
        """Cancel work of an executor; if it has begun, it is watched until it ends."""
        if not work.cancel():
            self.add(work)
            work.add_done_callback(self.discard)  # at once, if it has ended

    def count(self, *, older_than_s: float) -> int:
        """How many go on for longer than that since they were left."""
        before = time.monotonic() - older_than_s
        with self._lock:
            return sum(since < before for since in self._since.values())

    @property
    def longest_s(self) -> float:
        """The seconds since the first of them was left; 0 without any."""
        with self._lock:
            return time.monotonic() - min(self._since.values()) if self._since else 0.0
