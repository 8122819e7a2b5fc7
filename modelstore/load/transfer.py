"""Blocks of a reading to the memory of devices, while the next ones are read: the ring's other end. Imports no torch.

A `Transfer` allocates memory for each file of weights when its first block arrives, or when it is asked to, and copies
the blocks in a thread of its own. A slot goes back to the reader only when the copy out of it has ended, which for a
GPU is long after it was asked for. The devices are those of `device.py`, of torch, or host memory.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from traceback import clear_frames
from typing import Any, Protocol

from modelstore.copying import copy_bytes
from modelstore.errors import DeviceFailed, DigestMismatch
from modelstore.load.reader import LoadedBlock, Reading
from modelstore.timeline import Span, Timeline
from modelstore.volume.header import Header, TensorInfo

DeviceOf = Callable[[str], str]
"""The device for a tensor's name, as torch names it: "cpu", "cuda:0"."""

_SLAB_BYTES = 1 << 30
_TENSOR_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes `view`, for an allocation of a device, from its byte `begin` on."""

    memory: Any
    begin: int
    view: memoryview


class Device(Protocol):
    """The memory of one or more devices, and the copies into it. Used from one thread, but for `allocate`.

    `copy` only asks for copies: the views stay as they are until `wait` for its event returns. Errors are in our tree.
    """

    def allocate(self, device: str, size_bytes: int) -> Any:
        """New memory on a device: see `torch_device.tensor_of`. Raises DoesNotFit if there is not enough."""

    def pin(self, memory: memoryview) -> None:
        """Make copies out of this host memory as fast as they can be; called before the first."""

    def copy(self, parts: Sequence[Part]) -> Any:
        """Begin to copy the parts of a block; returns an event for `wait`."""

    def is_done(self, event: Any) -> bool:
        """Whether the copies have ended."""

    def wait(self, event: Any) -> None:
        """Return when the copies have ended."""

    def unpin(self, memory: memoryview) -> None:
        """No copy will come out of this memory any more."""

    def close(self) -> None:
        """No copy will be asked for any more. The memory stays with its users."""


class HostMemory:
    """The device `cpu`: copies are done when they are asked for."""

    def allocate(self, device: str, size_bytes: int) -> memoryview:
        return memoryview(mmap.mmap(-1, max(1, size_bytes), flags=mmap.MAP_PRIVATE))

    def copy(self, parts: Sequence[Part]) -> None:
        for part in parts:
            copy_bytes(part.memory[part.begin :], part.view)

    def is_done(self, event: Any) -> bool:
        return True

    def pin(self, memory: memoryview) -> None: ...

    def unpin(self, memory: memoryview) -> None: ...

    def wait(self, event: Any) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Slab:
    """One allocation on a device: the bytes `begin` to `end` of a file, which are these tensors."""

    begin: int
    end: int
    tensors: Sequence[TensorInfo]
    memory: Any


class Transfer:
    """The weights of a reading on their way to devices.

    `headers` and `slabs` hold the files that were prepared, by their paths: those of which a block has arrived, and all
    once `prepare` was called for them.
    """

    def __init__(self, reading: Reading, open_device: Callable[[], Device], device_of: DeviceOf) -> None:
        """`open_device` is called in the thread of the transfer: it may take its time."""
        self.reading = reading
        self.headers: dict[str, Header] = {}
        self.slabs: dict[str, list[Slab]] = {}
        self.device_of = device_of
        self._open_device = open_device
        self._device: Device | None = None
        self._opened = threading.Event()
        self._preparing = threading.Lock()
        self._raw: dict[str, bytes] = {}
        self._error: BaseException | None = None
        self._began: float | None = None
        self._ended = 0.0
        self._thread = threading.Thread(target=self._run, name="transfer", daemon=True)
        self._thread.start()

    def prepare(self, path: str) -> None:
        """Allocate the memory for a file's tensors, if that has not been done.

        Raises DoesNotFit, DeviceFailed, and BadSafetensors and DigestMismatch as `Reading.header` does.
        """
        self._opened.wait()
        with self._preparing:
            if self._device is None:
                assert self._error is not None
                raise self._error
            if path not in self.headers:
                header, self._raw[path] = self.reading.header(path)
                self.slabs[path] = [self._allocated(run, header) for run in _runs(header, self.device_of)]
                self.headers[path] = header

    def wait(self) -> None:
        """Return when all bytes are in place. Raises as `prepare`, and as `Reading.wait`."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Return when nothing is copied any more, which is at once if the reading was closed. From then on the memory
        is its users' alone."""
        self._thread.join()
        # The reading keeps the error, whose traceback knows the device and this object: the collector may be paused.
        if self._error is not None:
            clear_frames(self._error.__traceback__)
        self._error = self._device = None
        self.slabs.clear()

    def as_span(self, timeline: Timeline) -> Span:
        """The copies as a span of a start, from the first to the end of the last, once they have ended."""
        size_bytes = sum(self.reading.record(path).size_bytes for path in self.slabs)
        began = self._ended if self._began is None else self._began
        return Span("transfer", began - timeline.began, self._ended - timeline.began, size_bytes)

    def _allocated(self, run: list[TensorInfo], header: Header) -> Slab:
        assert self._device is not None
        begin, end = run[0].begin + header.data_start, run[-1].end + header.data_start
        return Slab(begin, end, run, self._device.allocate(self.device_of(run[0].name), end - begin))

    def _run(self) -> None:
        try:
            try:
                self._device = self._open_device()
            finally:
                self._opened.set()
            try:
                self._copy_all(self._device)
            finally:
                self._device.close()
                self._ended = time.monotonic()
        except BaseException as error:  # handed to the waiter, and to those that wait for other files
            self._error = error
            self._opened.set()
            self.reading.failed(error if isinstance(error, Exception) else DeviceFailed(f"the copies ended: {error}"))

    def _copy_all(self, device: Device) -> None:
        pinned = _Pinned(device)
        under_way: deque[tuple[Any, LoadedBlock]] = deque()
        try:
            while True:
                while under_way and device.is_done(under_way[0][0]):
                    self.reading.release(under_way.popleft()[1])
                arrival = self.reading.next_arrival(wait=not under_way)
                if arrival is not None:
                    if arrival.path.endswith(".safetensors"):
                        self._began = self._began or time.monotonic()
                        pinned.pin(self.reading, arrival)
                        under_way.append((device.copy(self._parts(arrival)), arrival))
                elif under_way:  # nothing else to do: the reader may be waiting for the oldest slot
                    event, copied = under_way.popleft()
                    device.wait(event)
                    self.reading.release(copied)
                else:
                    return
        finally:
            for event, _arrival in under_way:
                device.wait(event)
            pinned.end()

    def _parts(self, arrival: LoadedBlock) -> list[Part]:
        """The targets of a block's bytes. Compares the header on its way."""
        self.prepare(arrival.path)
        view = self.reading.view(arrival)
        check_header(arrival.path, self._raw[arrival.path], view, arrival.offset)
        parts = []
        for slab in self.slabs[arrival.path]:
            first, last = max(slab.begin, arrival.offset), min(slab.end, arrival.offset + arrival.length)
            if first < last:
                source = view[first - arrival.offset : last - arrival.offset]
                parts.append(Part(slab.memory, first - slab.begin, source))
        return parts


class _Pinned:
    """The host memory that is pinned: that of each block, when the first block is copied out of it. Its pages are
    there by then: to pin memory whose pages have to be made takes ten times as long (measured)."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._blocks: dict[tuple[int, int], memoryview] = {}

    def pin(self, reading: Reading, arrival: LoadedBlock) -> None:
        """Pin the memory of a block."""
        memory, offset, block_bytes = reading.memory_behind(arrival)
        if (id(memory), offset) not in self._blocks:
            view = self._blocks[id(memory), offset] = memory[offset : offset + block_bytes]
            self._device.pin(view)

    def end(self) -> None:
        """Unpin all."""
        for view in self._blocks.values():
            self._device.unpin(view)
        self._blocks.clear()


def check_header(path: str, raw: bytes, view: memoryview, offset: int = 0) -> None:
    """Compare a header that was read ahead of its checksum with the bytes that came with one: `view`, at `offset`.
    Raises DigestMismatch."""
    expected = raw[offset : offset + len(view)]
    if expected and view[: len(expected)] != expected:
        raise DigestMismatch(
            f"{path} of the snapshot changed while it was read: remove the snapshot and seed the model again"
        )


def device_by_module(devices: Mapping[str, str]) -> DeviceOf:
    """The devices of tensors by the names of modules, "" for all that have no other name: the device of a tensor is
    that of its nearest module in `devices`, or else the first."""

    def device_of(name: str) -> str:
        while name and name not in devices:
            name = name.rpartition(".")[0]
        return devices.get(name) or next(iter(devices.values()))

    return device_of


def address_of(memory: memoryview) -> int:
    """The address of host memory, which must be writable."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _runs(header: Header, device_of: DeviceOf) -> Iterable[list[TensorInfo]]:
    """The tensors that share an allocation: neighbours on one device, each aligned, of about 1 GiB together."""
    runs: list[list[TensorInfo]] = []
    for tensor in header.tensors:
        if runs:
            first = runs[-1][0]
            aligned = (tensor.begin - first.begin) % _TENSOR_ALIGNMENT == 0
            if aligned and device_of(first.name) == device_of(tensor.name) and tensor.end - first.begin <= _SLAB_BYTES:
                runs[-1].append(tensor)
                continue
        runs.append([tensor])
    return runs
