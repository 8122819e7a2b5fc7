"""Blocking calls in threads of their own, so that a call which never ends holds up nothing but its own job.

A thread cannot be killed. The caller leaves it when its time is over or its job is cancelled, and it is counted until
it ends. `asyncio.to_thread` would not do: its threads are few, and the interpreter waits for them when it ends.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from handler.engines.abandoned import Abandoned

ABANDONED_LIMIT = 4
STUCK_S = 60.0  # a slow tokenizer needs half a minute for the longest text

R = TypeVar("R")


class Offload:
    """Runs calls beside the event loop."""

    def __init__(self) -> None:
        self._abandoned = Abandoned()
        self._lock = threading.Lock()

    @property
    def stuck(self) -> str:
        """Why this process should be replaced: too many calls go on that were abandoned long ago. Empty if all is
        well."""
        count = self._abandoned.count(older_than_s=STUCK_S)
        return f"{count} calls of a tokenizer do not end" if count >= ABANDONED_LIMIT else ""

    async def run(self, call: Callable[[], R], *, limit_s: float) -> R:
        """The result of `call`, or its error. Raises TimeoutError after `limit_s`; the call then goes on."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[R] = loop.create_future()
        ended = threading.Event()

        def post(result: R | None, error: BaseException | None) -> None:
            if outcome.done():
                return
            if error is not None:
                outcome.set_exception(error)
            else:
                outcome.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result: R | None = None
            error: BaseException | None = None
            try:
                result = call()
            except StopIteration as stop:  # a future does not take it
                error = RuntimeError(f"StopIteration: {stop}")
            except BaseException as raised:  # handed to the caller
                error = raised
            with self._lock:
                ended.set()
                self._abandoned.discard(ended)
            with suppress(RuntimeError):  # the loop has ended, and with it the caller
                loop.call_soon_threadsafe(post, result, error)

        threading.Thread(target=run, name="offload", daemon=True).start()
        try:
            async with asyncio.timeout(limit_s):
                return await outcome
        finally:
            with self._lock:
                if not ended.is_set():
                    self._abandoned.add(ended)
