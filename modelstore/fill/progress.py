"""The progress of a fill or an upload, in bytes: counted by many threads, read by those that show it."""

from __future__ import annotations

import threading
import time

_SETTLES_S = 0.5


class Progress:
    """Counts of one fill, in bytes of the source; `reused` was there already, `network` went over the wire, repeats
    included. `over_network`: the source is not on this host."""

    def __init__(self, total: int = 0, *, over_network: bool = True) -> None:
        self.total = total
        self.over_network = over_network
        self.done = 0
        self.reused = 0
        self.network = 0
        self._began = time.monotonic()
        self._files: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def restart(self, total: int) -> None:
        """Count from zero, of so many bytes. What was fetched so far comes again from staging, and is not reused."""
        with self._lock:
            self.total, self.done, self.reused = total, 0, self.reused - self.done

    @property
    def eta_s(self) -> float | None:
        """The seconds that are left at the rate so far; None while there is no rate to speak of."""
        fetched, took_s = self.done - self.reused, time.monotonic() - self._began
        return (self.total - self.done) * took_s / fetched if fetched > 0 and took_s > _SETTLES_S else None

    @property
    def files(self) -> dict[str, tuple[int, int]]:
        """The files on their way now: the bytes that have arrived and the size, by file."""
        with self._lock:
            return dict(self._files)

    def begin(self, path: str, size_bytes: int) -> None:
        """A file is on its way from now on, until all its bytes were added."""
        with self._lock:
            self._files.setdefault(path, (0, size_bytes))

    def add(self, path: str = "", *, done: int = 0, reused: int = 0, network: int = 0) -> None:
        """Count bytes, those of a file that is on its way for that file, too."""
        with self._lock:
            self.done += done
            self.reused += reused
            self.network += network
            if path in self._files:
                arrived, size_bytes = self._files.pop(path)
                if arrived + done < size_bytes:
                    self._files[path] = (arrived + done, size_bytes)
