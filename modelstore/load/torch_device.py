"""Devices as torch has them: which is usable, what is free there, and how the bytes of a block get there."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from modelstore.errors import UsageError
from modelstore.load.memory import FreeMemory
from modelstore.load.reader import RING_BYTES, LoadedBlock
from modelstore.volume.snapshots import Snapshot

Parts = Callable[[LoadedBlock, memoryview], list[tuple[torch.Tensor, torch.Tensor]]]
"""The targets of a block's bytes: pairs of a device's bytes and the host's."""

logger = logging.getLogger(__name__)

_FOR_EVERY_DEVICE = 1  # cudaHostRegisterPortable


def usable_device(device: str | torch.device | None) -> torch.device:
    """`device`, or if none is named CUDA if there is one, else the CPU. Raises UsageError if it is not here."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"{str(device)!r} is not a device: use cuda, cuda:0 or cpu") from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"this machine has no {target}: torch sees {torch.cuda.device_count()} GPUs; use cpu")
    return target


def check_fits(snapshot: Snapshot, devices: Sequence[torch.device]) -> None:
    """Raise DoesNotFit if the weights are larger than the free memory of these GPUs together."""
    if all(device.type == "cuda" for device in devices):
        place = " and ".join(str(device) for device in devices) + (" have" if len(devices) > 1 else " has")
        free = FreeMemory(sum(_free_bytes(device) for device in devices), place)
        free.check_fits(snapshot.key, snapshot.weights_bytes)


def needs_several_gpus(snapshot: Snapshot) -> bool:
    """Whether the weights are larger than the free memory of the first GPU, and there are more."""
    return torch.cuda.device_count() > 1 and snapshot.weights_bytes > _free_bytes(torch.device("cuda", 0))


def check_room(model: torch.nn.Module, device: torch.device, *, besides: torch.nn.Module) -> None:
    """Raise DoesNotFit if a GPU has no room for a model once another one has left it."""
    needed, leaving = (sum(p.numel() * p.itemsize for p in each.parameters()) for each in (model, besides))
    free = FreeMemory(_free_bytes(device) + leaving, f"{device}, without the model before, has")
    free.check_fits("the model", needed)


def ring_bytes_for(device: torch.device) -> int:
    """How much host memory the bytes for a device pass through; 0 if they stay."""
    return 0 if device.type == "cpu" else RING_BYTES


class HostDevice:
    """Takes the bytes of the ring to memory of the CPU."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def pin(self, memory: memoryview) -> None: ...

    def unpin(self, memory: memoryview) -> None: ...

    def wait(self, event: Any) -> None: ...

    def copy(self, arrival: LoadedBlock, view: memoryview) -> None:
        for target, source in self._parts(arrival, view):
            target.copy_(source)


class CudaDevices:
    """Copies on streams of their own, out of memory that is pinned meanwhile."""

    def __init__(self, parts: Parts, devices: set[torch.device]) -> None:
        self._parts = parts
        make: Any = torch.cuda.Stream
        self._streams = {device: make(device) for device in devices}
        self._pinned: set[int] = set()
        self._begun: set[str] = set()

    def pin(self, memory: memoryview) -> None:
        if _cudart("cudaHostRegister", address_of(memory), len(memory), _FOR_EVERY_DEVICE):
            self._pinned.add(address_of(memory))
            return
        logger.warning("host memory cannot be pinned: the model goes to the GPU more slowly")
        # torch would find the driver's last error later, and take it for its own.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=next(iter(self._streams)))

    def unpin(self, memory: memoryview) -> None:
        if address_of(memory) in self._pinned:
            _cudart("cudaHostUnregister", address_of(memory))

    def copy(self, arrival: LoadedBlock, view: memoryview) -> list[torch.cuda.Event]:
        events = []
        parts = self._parts(arrival, view)
        if arrival.path not in self._begun:
            self._begun.add(arrival.path)
            for device, stream in self._streams.items():
                # The former owner of this memory has to be done with it.
                stream.wait_stream(torch.cuda.current_stream(device))
        for target, source in parts:
            stream = self._streams.get(target.device)
            if stream is None:
                target.copy_(source)
                continue
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
                events.append(stream.record_event())
        return events

    def wait(self, event: list[torch.cuda.Event]) -> None:
        for each in event:
            each.synchronize()


def _cudart(function: str, *arguments: int) -> bool:
    """Call the CUDA runtime; returns whether it succeeded."""
    cudart: Any = torch.cuda.cudart
    return int(getattr(cudart(), function)(*arguments)) == 0


def address_of(memory: memoryview) -> int:
    """The address of host memory."""
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()


def _free_bytes(device: torch.device) -> int:
    """The bytes that a model may take: free on the GPU, or held by torch and not in use."""
    free, _total = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
