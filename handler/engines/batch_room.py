"""How many prompts a batch may have, while the memory that each takes is not known before."""

from __future__ import annotations

_MOST_BATCHES = 64


class BatchRoom:
    """`rows`: the most prompts of a batch. It is halved if the memory is too small, and one more again after a batch
    has ended well; if that one does not fit, it is tried less and less often."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.reset()

    def reset(self) -> None:
        """Allow as many as at the beginning."""
        self.rows = self._most
        self._fitted = 0  # the rows before the last widening
        self._batches = 1  # to end before the next widening
        self._ended = 0
        self._before: int | None = None  # the rows before the first of several failures, one after the other

    def shrink(self, rows: int) -> None:
        """The memory was too small for a batch of so many."""
        if self._before is None:
            self._before = self.rows
        if rows == self._fitted + 1 and rows > 1:
            self.rows, self._batches = self._fitted, min(2 * self._batches, _MOST_BATCHES)
        else:
            self.rows, self._fitted, self._batches = max(1, rows // 2), 0, 1
        self._ended = 0

    def blame_one(self) -> None:
        """A prompt does not fit alone: the failures before were its own."""
        if self._before is not None:
            self.rows, self._before = self._before, None

    def note_ended(self, rows: int) -> None:
        """So many rows have ended."""
        if not rows:
            return
        self._before = None
        self._ended += rows
        if self.rows < self._most and self._ended >= self.rows * self._batches:
            self._fitted, self.rows, self._ended = self.rows, self.rows + 1, 0
