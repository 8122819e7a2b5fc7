"""Blocks of a reading to a device, while the next ones are read: the ring's other end. Imports no torch.

A slot goes back to the reader only when the copy out of it has ended, which for a GPU is long after it was asked for.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

from modelstore.load.reader import LoadedBlock, Reading


class Device(Protocol):
    """The receiver of the bytes. `copy` only asks for a copy; the view stays as it is until `wait` for its event
    returns."""

    def pin(self, memory: memoryview) -> None:
        """Make copies out of this host memory as fast as they can be; called before the first."""

    def copy(self, arrival: LoadedBlock, view: memoryview) -> Any:
        """Begin to copy a block; returns an event for `wait`."""

    def wait(self, event: Any) -> None:
        """Return when the copy has ended."""

    def unpin(self, memory: memoryview) -> None:
        """No copy will come out of this memory any more."""


def transfer(reading: Reading, device: Device) -> None:
    """Copy all blocks of weights as they arrive; returns when the last copy has ended. Raises as `Reading.wait`."""
    pinned: dict[int, memoryview] = {}
    under_way: deque[tuple[Any, LoadedBlock]] = deque()
    try:
        while True:
            arrival = reading.next_arrival(wait=not under_way)
            if arrival is not None:
                if arrival.path.endswith(".safetensors"):
                    memory = reading.memory_behind(arrival)
                    if id(memory) not in pinned:
                        device.pin(pinned.setdefault(id(memory), memory))
                    under_way.append((device.copy(arrival, reading.view(arrival)), arrival))
            elif under_way:  # nothing else to do: the reader may be waiting for the oldest slot
                event, copied = under_way.popleft()
                device.wait(event)
                reading.release(copied)
            else:
                return
    finally:
        for event, _arrival in under_way:
            device.wait(event)
        for memory in pinned.values():
            device.unpin(memory)
