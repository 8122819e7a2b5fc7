"""The end of a worker's process: in time, even if something still hangs in it.

The SDK ends its loop after SIGTERM, or after a job that asked for a new worker: jobs that run get their answers, its
long poll for jobs comes to an end, then the engine is closed. Each of these may wait for a thread that never ends, and
so may the interpreter itself. The process then ends without them.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

GRACE_S = 30.0  # without a job, from the signal or the last answer on
_CLOSE_S = 60.0  # longer than vLLM gets to end by itself
_POLL_S = 0.2

logger = logging.getLogger(__name__)


class Termination:
    """Sees to it that the process ends once it has been asked to, and jobs are answered."""

    def __init__(self, is_idle: Callable[[], bool], close: Callable[[], None]) -> None:
        """`is_idle`: whether no job runs. A job's time is limited by MODELSTORE_MAX_JOB_S. `close` ends the engine."""
        self._is_idle = is_idle
        self._closing = threading.Thread(target=close, name="close", daemon=True)
        self._close_lock = threading.Lock()
        self._before: dict[int, Any] = {}
        self._begun = False  # no Event: a signal handler sets it, maybe while this thread holds an Event's lock

    def watch_signals(self) -> None:
        """Take part in SIGTERM and SIGINT from now on, beside the handlers that are there. From the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            current = signal.getsignal(number)
            if current != self._on_signal:
                self._before[number] = current
                signal.signal(number, self._on_signal)

    def begin(self) -> None:
        """End the process `GRACE_S` after the last job, if it has not ended by then."""
        if not self._begun:
            self._begun = True
            threading.Thread(target=self._end_when_idle, name="termination", daemon=True).start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.begin()
        if callable(before := self._before.get(number)):
            before(number, frame)

    def _end_when_idle(self) -> None:
        idle_since = time.monotonic()
        while time.monotonic() - idle_since < GRACE_S:
            time.sleep(_POLL_S)
            if not self._is_idle():
                idle_since = time.monotonic()
        self.close()
        _end(f"something has not ended within {GRACE_S:g} s")

    def close(self) -> None:
        """Close the engine, once; if that does not come to its end in time, the process ends here."""
        with self._close_lock:
            if self._closing.ident is None:
                self._closing.start()
        self._closing.join(_CLOSE_S)
        if self._closing.is_alive():
            _end(f"the engine has not closed within {_CLOSE_S:g} s")


def _end(reason: str) -> NoReturn:
    logger.warning("the process ends at once: %s", reason)
    for child in multiprocessing.active_children():  # the SDK's, which pings: it would tell that this worker lives
        child.kill()
    sys.stderr.flush()
    os._exit(0)
