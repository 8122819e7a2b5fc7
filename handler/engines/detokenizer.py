"""The text of tokens as they come. Pure: the decoder is a function argument.

The output of `push`, together with `finish`, equals the decoding of all tokens at once. That takes some care:

- a token gives the text that it adds to its neighbours before it, because a word's space depends on them;
- so does the first one, which follows the prompt: some decoders strip the space at the beginning of a text;
- a token that is left out (a special token, an id without a token) is never a neighbour;
- a character may take several tokens, of which the first decode to U+FFFD;
- tokens for single bytes are decoded as one run: one wrong byte makes all of the run U+FFFD, so it waits for its end.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from itertools import filterfalse

_INCOMPLETE = "\ufffd"  # the decoding of the first bytes of a character; however many they are, it is one
_CHARACTER_TOKENS = 4  # a character of UTF-8 has at most four bytes, and a token at least one
_PROMPT_TOKENS = 8  # that the first token is decoded with
_WINDOW_TOKENS = 16  # decoded again for each token; a longer window is cut
_RUN_TOKENS = 64  # of single bytes; a stop string in a longer run is found at its end


class Detokenizer:
    """Hands out text that will not change any more: nothing of a character that is not whole, and nothing that may be
    the beginning of a stop string. `stopped` is set once one of those has come; the text ends before it."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stops: Sequence[str] = (),
        *,
        at_the_end: bool = False,
        skipped: Container[int] = (),
        single_bytes: Container[int] = (),
        prompt: Sequence[int] = (),
        goes_on: Callable[[int], bool] = lambda _first: True,
        stops_after: int = 0,
    ) -> None:
        """`at_the_end`: nothing is handed out before the end, which spares decoding every token twice. `skipped`: ids
        that `decode` leaves out. `single_bytes`: tokens that `decode` takes for bytes, a run of them at a time.
        `prompt`: the tokens that the first one follows, if it `goes_on` with their text. `stops_after`: so many tokens
        come before a stop string can end the text."""
        self._decode = decode
        self._stops = [stop for stop in stops if stop]
        self._stops_after = stops_after
        self._stops_count = not stops_after
        self._at_the_end = at_the_end and not self._stops
        self._skipped = skipped
        self._single_bytes = single_bytes
        # The window that is decoded for each token; all tokens if `at_the_end`
        self._tokens = list(filterfalse(skipped.__contains__, prompt[-_PROMPT_TOKENS:]))
        if self._tokens and decode(self._tokens).endswith(_INCOMPLETE):
            self._tokens.clear()  # what comes changes the text of what is there
        self._context = len(self._tokens)  # so many of them have given their text
        self._goes_on: Callable[[int], bool] | None = goes_on
        self._sent = 0  # so many characters of the text of the others were handed out
        self._longest = _WINDOW_TOKENS
        self._pending = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that one more token makes certain."""
        self._stops_count = not self._stops_after
        self._stops_after = max(0, self._stops_after - 1)
        if self.stopped or token in self._skipped:
            return ""
        if self._goes_on is not None:
            is_run = token in self._single_bytes and self._tokens[-1:] and self._tokens[-1] in self._single_bytes
            if is_run or not self._goes_on(token):
                self._move_window(self._context, self._context, sent=0)
            self._goes_on = None
        self._tokens.append(token)
        if self._at_the_end:
            return ""
        if token in self._single_bytes:
            if not self._stops or len(self._tokens) - self._context > _RUN_TOKENS:
                return ""
            return self._before_stop(self._new_text()[self._sent :]) or ""
        text = self._new_text()
        if not text:
            return ""
        if text.endswith(_INCOMPLETE):
            new = text[self._sent : -1]
            self._sent = max(self._sent, len(text) - 1)
            if len(self._tokens) > self._longest:
                self._cut_window()
            return self._certain(new)
        new = text[self._sent :]
        self._move_window(self._context, len(self._tokens), sent=0)
        return self._certain(new)

    def finish(self) -> str:
        """The text that was held back, when no token will come any more."""
        if self.stopped:
            return ""
        text = self._certain(self._new_text()[self._sent :])
        tail, self._pending = self._pending, ""
        return text + tail

    def _new_text(self) -> str:
        before = self._decode(self._tokens[: self._context])
        return self._decode(self._tokens)[len(before) :]

    def _move_window(self, begin: int, end_of_context: int, *, sent: int) -> None:
        del self._tokens[:begin]
        self._context = end_of_context - begin
        self._sent = sent
        self._longest = _WINDOW_TOKENS

    def _cut_window(self) -> None:
        """Move the start of a window whose text never becomes whole to a place that changes no text."""
        count, all_text = len(self._tokens), self._decode(self._tokens)
        old = len(self._decode(self._tokens[: self._context]))
        for end in range(count - _CHARACTER_TOKENS, max(self._context, count - 2 * _CHARACTER_TOKENS), -1):
            before = self._decode(self._tokens[:end])
            if not all_text.startswith(before) or len(before) - old > self._sent:
                continue  # a character lies across this place
            for begin in range(end - 1, max(0, end - 1 - _CHARACTER_TOKENS), -1):
                context = self._decode(self._tokens[begin:end])
                if context and self._decode(self._tokens[begin:])[len(context) :] == all_text[len(before) :]:
                    self._move_window(begin, end, sent=self._sent - (len(before) - old))
                    return
        self._longest = 2 * count

    def _certain(self, text: str) -> str:
        """The part of the pending text and `text` that can be handed out now."""
        if (before := self._before_stop(text)) is not None:
            return before
        self._pending += text
        uncertain = max((self._overlap(stop) for stop in self._stops), default=0)
        keep = len(self._pending) - uncertain
        certain, self._pending = self._pending[:keep], self._pending[keep:]
        return certain

    def _before_stop(self, text: str) -> str | None:
        """The pending text and `text` up to the first stop string in them, and the end; None if there is none."""
        searched = self._pending + text
        if not self._stops_count:
            return None
        places = [place for stop in self._stops if (place := searched.find(stop)) >= 0]
        if not places:
            return None
        self.stopped = True
        self._pending = ""
        return searched[: min(places)]

    def _overlap(self, stop: str) -> int:
        """How much of the end may be the beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._pending))
        return next((size for size in range(longest, 0, -1) if self._pending.endswith(stop[:size])), 0)
