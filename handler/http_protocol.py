"""uvicorn's HTTP/1.1 with limits of time: for the head of a request to arrive, and for an answer to be taken.

Without them a client that sends nothing, or reads nothing, keeps its connection and all that waits in it.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 75.0  # from the connection, or the end of the last answer, to the next request
TAKEN_S = 60.0  # for the bytes that are waiting; an answer goes in pieces, so that this is about progress


class LimitedProtocol(H11Protocol):
    """Cuts the connection off when a limit has passed."""

    _head_timer: asyncio.TimerHandle | None = None
    _writing_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete and self._head_timer is not None:
            self._head_timer.cancel()

    def on_response_complete(self) -> None:
        self._expect_head()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing_timer = self.loop.call_later(TAKEN_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing_timer is not None:
            self._writing_timer.cancel()

    def _expect_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = self.loop.call_later(HEAD_S, self.transport.abort)

    def _stop_timers(self) -> None:
        for timer in (self._head_timer, self._writing_timer):
            if timer is not None:
                timer.cancel()
