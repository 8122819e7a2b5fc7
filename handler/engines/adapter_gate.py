"""The adapters of a running engine: their exchange, and the answers that are made with them meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from modelstore.adapters import Adapter
from modelstore.errors import WaitTimeout
from modelstore.settings import Settings
from modelstore.timeline import Timeline

_POLL_S = 0.02
_DRAIN_S = 600.0  # until answers have ended, for an exchange
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class AdapterGate:
    """Counts the answers with each adapter, and holds new ones back while it is exchanged: for a server that has one
    adapter by a name."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._answering: Counter[str] = Counter()
        self._closed: set[str] = set()

    @asynccontextmanager
    async def answering(self, name: str) -> AsyncIterator[None]:
        """An answer with this adapter, for the time of the block; it begins when no exchange is under way."""
        while not self._enter(name):
            await asyncio.sleep(_POLL_S)
        try:
            yield
        finally:
            with self._changed:
                self._answering[name] -= 1
                self._changed.notify_all()

    @contextmanager
    def exchanging(self, name: str) -> Iterator[None]:
        """No answer with this adapter runs inside the block."""
        with self._changed:
            self._closed.add(name)
            is_idle = self._changed.wait_for(lambda: not self._answering[name], timeout=_DRAIN_S)
        try:
            if not is_idle:
                raise WaitTimeout(f"answers with the adapter {name} have not ended for {_DRAIN_S:g} s: it stays")
            yield
        finally:
            with self._changed:
                self._closed.discard(name)

    def _enter(self, name: str) -> bool:
        with self._changed:
            if name in self._closed:
                return False
            self._answering[name] += 1
            return True


def exchange_begun(settings: Settings, name: str) -> Timeline:
    """The record of an adapter's exchange, which begins now."""
    model = str(settings.adapters[name])
    return Timeline(worker=settings.worker_id, model=model, kind="swap", began=time.monotonic())


def exchange_ended(timeline: Timeline, adapter: Adapter) -> Timeline:
    """The same record, once the adapter serves."""
    timeline.commit, timeline.dtype = adapter.snapshot.commit, adapter.snapshot.dtype
    timeline.outcome, timeline.reason = "hit", "the snapshot was on the volume"
    timeline.mark("ready")
    return timeline


def most_rank(adapters: Collection[Adapter]) -> int:
    """The limit that vLLM gets for the ranks of adapters: the next that it takes; 0 without adapters."""
    largest = max((adapter.rank for adapter in adapters), default=0)
    return next(rank for rank in (0, *_RANKS) if rank >= largest)


def shown(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """The adapters in an engine's status."""
    return {"adapters": {name: str(each.snapshot.key) for name, each in adapters.items()}} if adapters else {}
