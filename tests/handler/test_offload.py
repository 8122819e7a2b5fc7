"""Calls beside the event loop: one that does not end holds up its own job alone, and is counted."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from handler.engines.offload import ABANDONED_LIMIT, Offload


def test_a_call_gives_its_result_or_raises() -> None:
    class Panic(BaseException):
        pass

    def panics() -> None:
        raise Panic

    async def run() -> None:
        offload = Offload()
        assert await offload.run(lambda: 7, limit_s=5) == 7
        with pytest.raises(Panic):
            await offload.run(panics, limit_s=5)
        with pytest.raises(RuntimeError):
            await offload.run(lambda: next(iter(())), limit_s=5)
        assert offload.stuck == ""

    asyncio.run(run())


def test_calls_that_do_not_end_are_left_counted_and_hold_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handler.engines.offload.STUCK_S", 0.0)
    release = threading.Event()

    async def run() -> Offload:
        offload = Offload()
        for number in range(40):  # more than the default executor has threads
            with pytest.raises(TimeoutError):
                await offload.run(lambda: release.wait(60), limit_s=0.01)
            assert bool(offload.stuck) == (number + 1 >= ABANDONED_LIMIT)
        assert await offload.run(lambda: "answered", limit_s=5) == "answered"
        return offload

    began = time.monotonic()
    offload = asyncio.run(run())
    assert time.monotonic() - began < 10, "the end of the loop does not wait for them"
    release.set()
    until = time.monotonic() + 60
    while offload.stuck and time.monotonic() < until:
        time.sleep(0.01)
    assert offload.stuck == "", "what has ended does not count any more"


def test_calls_that_were_cancelled_count_once_they_have_gone_on_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four clients that go away at once turn no others away."""
    release = threading.Event()

    async def run() -> None:
        offload = Offload()
        tasks = [asyncio.create_task(offload.run(lambda: release.wait(60), limit_s=60)) for _ in range(4)]
        await asyncio.sleep(0.05)
        assert offload.stuck == "", "they are waited for"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert offload.stuck == "", "they may end soon"
        monkeypatch.setattr("handler.engines.offload.STUCK_S", 0.0)
        assert "do not end" in offload.stuck
        release.set()

    asyncio.run(run())
