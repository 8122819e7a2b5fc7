"""The first answer of a worker, added to the record of its start: what a person waited for begins with a request."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelstore.volume import history

_AT_EXIT_S = 2.0


class FirstAnswer:
    """Notes the first job that gets an answer, once. Times are those of `time.monotonic`."""

    def __init__(self, record: Path | None, began: float) -> None:
        """`record`: of the start, in the volume's history; None if there is none. `began`: the start of the process."""
        self._record = record
        self._began = began

    def note(self, job: Mapping[str, Any], taken_at: float, first_piece_at: float | None) -> None:
        """A job that was taken has had its first piece. RunPod names its time in the queue as `delayTime`, in ms, where
        it does."""
        if first_piece_at is None or self._record is None:
            return
        path, self._record = self._record, None
        first = {"taken": round(taken_at - self._began, 4), "first_token": round(first_piece_at - self._began, 4)}
        delay = job.get("delayTime")
        if isinstance(delay, int | float) and not isinstance(delay, bool) and 0 <= delay < 1e10:
            first["queued_s"] = round(delay / 1000, 3)
        thread = threading.Thread(target=history.add_first_job, args=(path, first), name="history", daemon=True)
        thread.start()
        atexit.register(thread.join, _AT_EXIT_S)  # a volume that hangs holds up no end
