"""The text of tokens as they come. Pure: what it decodes with is a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"  # what bytes that are not yet a character decode to


class Detokenizer:
    """Hands out text that will not change any more: nothing of a character that is not whole, and nothing that may be
    the beginning of a stop string. `stopped` is set once one of those has come; the text ends before it."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = (), *, at_once: bool = False
    ) -> None:
        """`at_once`: nothing is handed out before the end, which spares decoding every token twice."""
        self._decode = decode
        self._stops = [stop for stop in stops if stop]
        self._at_once = at_once and not self._stops
        self._tokens: list[int] = []
        self._begin = 0  # of the tokens that what comes next is decoded with: a word's space depends on its neighbour
        self._read = 0
        self._pending = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that one more token makes certain."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        if self._at_once:
            return ""
        text = self._new_text()
        if text.endswith(_INCOMPLETE):
            return ""
        self._begin, self._read = self._read, len(self._tokens)
        return self._certain(text)

    def finish(self) -> str:
        """What was held back, when no token will come any more."""
        if self.stopped:
            return ""
        text = self._certain(self._new_text())
        rest, self._pending = self._pending, ""
        return text + rest

    def _new_text(self) -> str:
        before = self._decode(self._tokens[self._begin : self._read])
        return self._decode(self._tokens[self._begin :])[len(before) :]

    def _certain(self, text: str) -> str:
        self._pending += text
        found = [place for stop in self._stops if (place := self._pending.find(stop)) >= 0]
        if found:
            self.stopped = True
            said, self._pending = self._pending[: min(found)], ""
            return said
        held = max((self._overlap(stop) for stop in self._stops), default=0)
        keep = len(self._pending) - held
        said, self._pending = self._pending[:keep], self._pending[keep:]
        return said

    def _overlap(self, stop: str) -> int:
        """How much of the end may be the beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._pending))
        return next((size for size in range(longest, 0, -1) if self._pending.endswith(stop[:size])), 0)
