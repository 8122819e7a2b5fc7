"""What a fill takes on the volume at most, what it stores included."""

from __future__ import annotations

import threading
from collections.abc import Mapping


class Peak:
    """Keeps what a fill takes on the volume at `limit`: all that will be stored, and once the largest original.

    `sizes`: by file, in bytes, what is stored of it and what it takes beside that while it is in work.
    """

    def __init__(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        self.limit = sum(stored for stored, _ in sizes.values()) + max(
            (beside for _, beside in sizes.values()), default=0
        )
        self._sizes = sizes
        self._taken = 0
        self._in_work: set[str] = set()
        self._lock = threading.Lock()

    def needs_nothing_beside(self, path: str) -> bool:
        """Whether a weights file is to be stored as it comes; False for other files."""
        return path in self._sizes and self._sizes[path][1] == 0

    def begin(self, path: str) -> bool:
        """Count a file as in work; False where it has to wait for another one's end."""
        taken = sum(self._sizes[path])
        with self._lock:
            if self._in_work and self._taken + taken > self.limit:
                return False
            self._in_work.add(path)
            self._taken += taken
            return True

    def end(self, path: str) -> None:
        """The file is stored, and nothing else of it is left."""
        with self._lock:
            self._in_work.discard(path)
            self._taken -= self._sizes[path][1]
