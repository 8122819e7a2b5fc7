"""NVIDIA GPUs by the driver's own library (libcuda), called with ctypes: no torch, so that weights are on a GPU before
torch is imported.

    devices = open_devices(["cuda:0"])
    memory = devices.allocate("cuda:0", size_bytes)
    event = devices.copy([Part(memory, 0, view)])       asks for a copy
    devices.wait(event)
    torch.as_tensor(memory, device="cuda:0")            the memory itself, without a copy

Each GPU is used through its primary context, which torch joins later. `GpuMemory` is freed when the last reference to
it goes, that of a tensor included, in any thread; the context is given back with the last memory and the last `Gpus`.
Copies run on a stream of their own, out of host memory that is pinned piece by piece when its first block is copied:
pinning a gigabyte at once would take a tenth of a second in which nothing moves. The interpreter's lock is released for
every call but those that make a context current: beside 12 threads that read, or an import, to get it back takes far
longer than such a call.

Not guaranteed: torch does not count this memory as its own (`torch.cuda.memory_allocated`), and does not use it again.
Guaranteed by `open_devices`: before it takes this way, the driver has done each kind of call once; if one is refused,
torch copies instead, with a line in the log.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import sys
import weakref
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from modelstore.environment import prepare_for_cuda
from modelstore.errors import DeviceFailed, DoesNotFit
from modelstore.load.transfer import Device, HostMemory, Part, address_of
from modelstore.units import size

logger = logging.getLogger(__name__)

LIBRARY = "libcuda.so.1"

_OUT_OF_MEMORY = 2
_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE: for the contexts of all GPUs
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the default stream
_EVENT = 1 | 2  # CU_EVENT_BLOCKING_SYNC: a waiting thread sleeps; CU_EVENT_DISABLE_TIMING

_Handle = ctypes.c_void_p
_Out = ctypes.POINTER
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGet": (_Out(ctypes.c_int), ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (_Out(_Handle), ctypes.c_int),
    "cuDevicePrimaryCtxRelease_v2": (ctypes.c_int,),
    "cuCtxPushCurrent_v2": (_Handle,),
    "cuCtxPopCurrent_v2": (_Out(_Handle),),
    "cuCtxSynchronize": (),
    "cuMemAlloc_v2": (_Out(ctypes.c_uint64), ctypes.c_size_t),
    "cuMemFree_v2": (ctypes.c_uint64,),
    "cuMemHostRegister_v2": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint),
    "cuMemHostUnregister": (ctypes.c_void_p,),
    "cuMemcpyHtoDAsync_v2": (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, _Handle),
    "cuStreamCreate": (_Out(_Handle), ctypes.c_uint),
    "cuStreamSynchronize": (_Handle,),
    "cuStreamDestroy_v2": (_Handle,),
    "cuEventCreate": (_Out(_Handle), ctypes.c_uint),
    "cuEventRecord": (_Handle, _Handle),
    "cuEventQuery": (_Handle,),
    "cuEventSynchronize": (_Handle,),
    "cuEventDestroy_v2": (_Handle,),
}
_QUICK = ("cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2")  # of the thread alone: they wait for no lock of the driver
_NOT_READY = 600


def open_devices(devices: Collection[str]) -> Device:
    """The devices of these names, as torch has them: GPUs by their driver, or if that refuses, by torch."""
    beside_host = sorted(set(devices) - {"cpu"})
    if not beside_host:
        return HostMemory()
    if all(device.startswith("cuda:") for device in beside_host):
        try:
            return Gpus([int(device.removeprefix("cuda:")) for device in beside_host])
        except DeviceFailed as error:
            reason = str(error)  # the error itself would keep the GPU, if a handler keeps the record
            logger.info("%s: torch copies the weights to the GPU instead, after it is imported", reason)
    from modelstore.load.torch_device import TorchDevices

    return TorchDevices(beside_host)


class GpuMemory:
    """Memory of a GPU, `device`, freed with the last reference to this object.

    `__cuda_array_interface__` (version 3, docs of Numba) describes it as bytes.
    """

    def __init__(self, gpu: _Gpu, size_bytes: int) -> None:
        self.device = gpu.device
        self.size_bytes = size_bytes
        self.address = gpu.allocate(max(1, size_bytes))
        # Not at the exit of the process: torch may use it to the end, and the driver is going down by itself.
        weakref.finalize(self, gpu.free, self.address).atexit = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.size_bytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        }


@dataclass(slots=True)
class _Stream:
    handle: ctypes.c_void_p
    events: list[ctypes.c_void_p] = field(default_factory=list)
    free: deque[ctypes.c_void_p] = field(default_factory=deque)  # of the events, those to be used again


@dataclass(frozen=True, slots=True)
class _Event:
    gpu: _Gpu
    handle: ctypes.c_void_p


class Gpus:
    """GPUs by their driver, each with a stream for copies: see `transfer.Device`. "cpu" is host memory."""

    def __init__(self, numbers: Sequence[int], library: str | None = None) -> None:
        """`numbers`: as CUDA_VISIBLE_DEVICES counts them. Raises DeviceFailed."""
        driver = _Driver(library or LIBRARY)
        self._host = HostMemory()
        self._gpus = {gpu.device: gpu for gpu in (_Gpu(driver, number) for number in numbers)}
        self._streams: dict[str, _Stream] = {}
        self._pinned: set[int] = set()
        self._may_pin = True
        self._may_be_copying = False
        try:
            for gpu in self._gpus.values():
                self._streams[gpu.device] = _Stream(gpu.new_stream())
                self._try(gpu)
        except BaseException:
            self.close()
            raise

    def allocate(self, device: str, size_bytes: int) -> GpuMemory | memoryview:
        gpu = self._gpus.get(device)
        return GpuMemory(gpu, size_bytes) if gpu is not None else self._host.allocate(device, size_bytes)

    def pin(self, memory: memoryview) -> None:
        """See Device. If it cannot be pinned, copies out of it are only slower; that is logged once."""
        if not self._may_pin:
            return
        try:
            next(iter(self._gpus.values())).register(memory)
        except DeviceFailed as error:
            self._may_pin = False
            logger.warning("host memory cannot be pinned, so the model goes to the GPU more slowly: %s", error)
        else:
            self._pinned.add(address_of(memory))

    def unpin(self, memory: memoryview) -> None:
        if (address := address_of(memory)) in self._pinned:
            self._pinned.discard(address)
            if self._may_be_copying:
                self._finish_copies()
            next(iter(self._gpus.values())).unregister(address)

    def copy(self, parts: Sequence[Part]) -> list[_Event]:
        self._may_be_copying = True
        of_gpus: dict[str, list[Part]] = {}
        for part in parts:
            if isinstance(part.memory, memoryview):
                self._host.copy([part])
            else:
                of_gpus.setdefault(part.memory.device, []).append(part)
        return [self._enqueue_copies(device, parts) for device, parts in of_gpus.items()]

    def is_done(self, event: list[_Event]) -> bool:
        if not all(each.gpu.is_done(each.handle) for each in event):
            return False
        self._give_back(event)
        return True

    def wait(self, event: list[_Event]) -> None:
        for each in event:
            each.gpu.wait(each.handle)
        self._give_back(event)

    def close(self) -> None:
        self._finish_copies()
        for device, stream in self._streams.items():
            self._gpus[device].end_stream(stream.handle, stream.events)
        self._streams.clear()

    def _finish_copies(self) -> None:
        """Return when no copy is under way, not even one whose event could not be recorded."""
        for device, stream in self._streams.items():
            self._gpus[device].finish(stream.handle)
        self._may_be_copying = False

    def _enqueue_copies(self, device: str, parts: Sequence[Part]) -> _Event:
        gpu, stream = self._gpus[device], self._streams[device]
        if not stream.free:
            stream.events.append(gpu.new_event())
            stream.free.append(stream.events[-1])
        handle = stream.free.pop()
        gpu.copy(parts, stream.handle, handle)
        return _Event(gpu, handle)

    def _give_back(self, event: list[_Event]) -> None:
        for each in event:
            self._streams[each.gpu.device].free.append(each.handle)

    def _try(self, gpu: _Gpu) -> None:
        """Do one copy of a page. Raises DeviceFailed."""
        page = memoryview(mmap.mmap(-1, mmap.PAGESIZE))
        gpu.register(page)
        try:
            self.wait(self.copy([Part(GpuMemory(gpu, len(page)), 0, page)]))
        finally:
            self._finish_copies()
            gpu.unregister(address_of(page))


class _Driver:
    """The library, ready to be called."""

    def __init__(self, library: str) -> None:
        prepare_for_cuda()
        try:
            self._library: Any = ctypes.CDLL(library)
            quick: Any = ctypes.PyDLL(library)  # keeps the interpreter's lock
            self._calls = {name: getattr(quick if name in _QUICK else self._library, name) for name in _SIGNATURES}
            for name, call in self._calls.items():
                call.argtypes = _SIGNATURES[name]
        except (OSError, AttributeError) as error:
            raise DeviceFailed(f"the GPU's driver is missing or too old ({error})") from error
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Raises DeviceFailed."""
        code = self._calls[name](*arguments)
        if code:
            raise self._refusal(name, code)

    def is_ready(self, name: str, *arguments: Any) -> bool:
        """The answer of a call that asks whether something is done. Raises DeviceFailed."""
        code = self._calls[name](*arguments)
        if code not in (0, _NOT_READY):
            raise self._refusal(name, code)
        return not code

    def _refusal(self, name: str, code: int) -> DeviceFailed:
        return DeviceFailed(f"the GPU's driver refuses {name}: {self._text(code)}", code)

    def _text(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(code, ctypes.byref(text))
        return f"{(text.value or b'an unknown error').decode()} ({code})"


class _Gpu:
    """One GPU through its primary context, which is given back with the last reference to this object."""

    def __init__(self, driver: _Driver, number: int) -> None:
        self._driver = driver
        self.device = f"cuda:{number}"
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        driver.call("cuDeviceGet", ctypes.byref(device), number)
        driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        weakref.finalize(self, driver.call, "cuDevicePrimaryCtxRelease_v2", device).atexit = False

    @contextmanager
    def _current(self) -> Iterator[_Driver]:
        """The context is this thread's, inside the block."""
        self._driver.call("cuCtxPushCurrent_v2", self._context)
        try:
            yield self._driver
        finally:
            self._driver.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def allocate(self, size_bytes: int) -> int:
        try:
            return self._allocated(size_bytes)
        except DeviceFailed as error:
            if error.code != _OUT_OF_MEMORY:
                raise
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # memory that it keeps for itself, and would give up for a tensor of its own
        try:
            return self._allocated(size_bytes)
        except DeviceFailed as error:
            raise DoesNotFit(
                f"{self.device} has no {size(size_bytes)} free: use a larger GPU, or a smaller or quantized model"
            ) from error

    def _allocated(self, size_bytes: int) -> int:
        address = ctypes.c_uint64()
        with self._current() as driver:
            driver.call("cuMemAlloc_v2", ctypes.byref(address), size_bytes)
        return address.value

    def free(self, address: int) -> None:
        """Free memory once no kernel uses it any more. Called by the collector of objects: an error is only logged."""
        try:
            with self._current() as driver:
                driver.call("cuCtxSynchronize")
                driver.call("cuMemFree_v2", address)
        except DeviceFailed as error:
            logger.warning("memory of %s is not freed: %s", self.device, error)

    def register(self, memory: memoryview) -> None:
        with self._current() as driver:
            driver.call("cuMemHostRegister_v2", address_of(memory), len(memory), _PORTABLE)

    def unregister(self, address: int) -> None:
        with self._current() as driver:
            driver.call("cuMemHostUnregister", address)

    def copy(self, parts: Sequence[Part], stream: ctypes.c_void_p, event: ctypes.c_void_p) -> None:
        """Ask for copies to this GPU, and for `event` at their end."""
        with self._current() as driver:
            for part in parts:
                target = part.memory.address + part.begin
                driver.call("cuMemcpyHtoDAsync_v2", target, address_of(part.view), len(part.view), stream)
            driver.call("cuEventRecord", event, stream)

    def new_stream(self) -> ctypes.c_void_p:
        stream = ctypes.c_void_p()
        with self._current() as driver:
            driver.call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        return stream

    def finish(self, stream: ctypes.c_void_p) -> None:
        with self._current() as driver:
            driver.call("cuStreamSynchronize", stream)

    def end_stream(self, stream: ctypes.c_void_p, events: Collection[ctypes.c_void_p]) -> None:
        with self._current() as driver:
            driver.call("cuStreamDestroy_v2", stream)
            for event in events:
                driver.call("cuEventDestroy_v2", event)

    def new_event(self) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        with self._current() as driver:
            driver.call("cuEventCreate", ctypes.byref(event), _EVENT)
        return event

    def is_done(self, event: ctypes.c_void_p) -> bool:
        with self._current() as driver:
            return driver.is_ready("cuEventQuery", event)

    def wait(self, event: ctypes.c_void_p) -> None:
        with self._current() as driver:
            driver.call("cuEventSynchronize", event)
