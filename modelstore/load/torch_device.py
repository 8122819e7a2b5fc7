"""Devices as torch has them: which is usable, what is free there, and how the bytes of a block get
there if the driver itself cannot be asked."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import torch

from modelstore.errors import UsageError
from modelstore.load.memory import FreeMemory
from modelstore.load.reader import RING_BYTES
from modelstore.load.transfer import HostMemory, Part, address_of
from modelstore.volume.snapshots import Snapshot

logger = logging.getLogger(__name__)

_SPARE = 0.1  # of a GPU's memory
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


def device_name(device: torch.device) -> str:
    """A device's name with its number, as `transfer.DeviceOf` gives it."""
    return f"cuda:{torch.cuda.current_device()}" if device.type == "cuda" and device.index is None else str(device)


def can_use_gpus() -> bool:
    """Whether this torch was built for GPUs, and the driver is new enough for it."""
    return torch.cuda.is_available()


def check_fits(snapshot: Snapshot, devices: Sequence[torch.device]) -> None:
    """Raise DoesNotFit if the weights are larger than the free memory of these GPUs together."""
    if all(device.type == "cuda" for device in devices):
        place = " and ".join(str(device) for device in devices) + (" have" if len(devices) > 1 else " has")
        free = FreeMemory(sum(_free_bytes(device) for device in devices), place)
        free.check_fits(snapshot.key, snapshot.weights_bytes)


def needs_several_gpus(snapshot: Snapshot) -> bool:
    """Whether the weights are larger than the free memory of the first GPU, and there are more."""
    return torch.cuda.device_count() > 1 and snapshot.weights_bytes > _free_bytes(torch.device("cuda", 0))


def check_room(
    model: torch.nn.Module, device: torch.device, *, besides: torch.nn.Module | None = None, spare: int = 0
) -> None:
    """Raise DoesNotFit if a GPU has no room for a model and `spare` bytes, once the model `besides` has left it."""
    needed, leaving = (
        sum(p.numel() * p.itemsize for p in each.parameters()) if each is not None else 0 for each in (model, besides)
    )
    without = ", without the model before," if besides is not None else ""
    free = FreeMemory(_free_bytes(device) + leaving - spare, f"{device}{without} has")
    free.check_fits("the model", needed)


def spare_bytes(device: torch.device) -> int:
    """The memory of a GPU that a second model leaves to the answers of the first."""
    return 0 if device.type == "cpu" else int(torch.cuda.mem_get_info(device)[1] * _SPARE)


def ring_bytes_for(device: torch.device) -> int:
    """How much host memory the bytes for a device pass through; 0 if they stay."""
    return 0 if device.type == "cpu" else RING_BYTES


class TorchDevices:
    """GPUs by torch, if their driver cannot be asked directly: see `transfer.Device`. "cpu" is host memory."""

    def __init__(self, devices: Sequence[str]) -> None:
        make: Any = torch.cuda.Stream
        self._host = HostMemory()
        self._streams = {device: make(device) for device in map(torch.device, devices) if device.type == "cuda"}
        self._pinned: set[int] = set()
        self._may_pin = bool(self._streams)

    def allocate(self, device: str, size_bytes: int) -> torch.Tensor | memoryview:
        if device == "cpu":
            return self._host.allocate(device, size_bytes)
        memory = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        if (stream := self._streams.get(memory.device)) is not None:
            stream.wait_stream(torch.cuda.current_stream(memory.device))  # its former owner has to be done with it
        return memory

    def pin(self, memory: memoryview) -> None:
        """See Device. If it cannot be pinned, copies out of it are only slower; that is logged once."""
        if not self._may_pin:
            return
        if _cudart("cudaHostRegister", address_of(memory), len(memory), _FOR_EVERY_DEVICE):
            self._pinned.add(address_of(memory))
            return
        self._may_pin = False
        logger.warning("host memory cannot be pinned: the model goes to the GPU more slowly")
        # torch would find the driver's last error later, and take it for its own.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=next(iter(self._streams)))

    def unpin(self, memory: memoryview) -> None:
        if (address := address_of(memory)) in self._pinned:
            self._pinned.discard(address)
            _cudart("cudaHostUnregister", address)

    def copy(self, parts: Sequence[Part]) -> list[torch.cuda.Event]:
        events = []
        for part in parts:
            if isinstance(part.memory, memoryview):
                self._host.copy([part])
                continue
            source = torch.frombuffer(part.view, dtype=torch.uint8)
            target = part.memory[part.begin : part.begin + len(source)]
            if (stream := self._streams.get(target.device)) is None:
                target.copy_(source)
                continue
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
                events.append(stream.record_event())
        return events

    def is_done(self, event: list[torch.cuda.Event]) -> bool:
        return all(each.query() for each in event)  # type: ignore[no-untyped-call]

    def wait(self, event: list[torch.cuda.Event]) -> None:
        for each in event:
            each.synchronize()

    def close(self) -> None: ...


def tensor_of(memory: Any) -> torch.Tensor:
    """Memory that a `transfer.Device` allocated, as a tensor of bytes that keeps it; nothing is copied."""
    if isinstance(memory, torch.Tensor):
        return memory
    if isinstance(memory, memoryview):
        return torch.frombuffer(memory, dtype=torch.uint8)
    return torch.as_tensor(memory, device=memory.device)


def _cudart(function: str, *arguments: int) -> bool:
    """Call the CUDA runtime; returns whether it succeeded."""
    cudart: Any = torch.cuda.cudart
    return int(getattr(cudart(), function)(*arguments)) == 0


def _free_bytes(device: torch.device) -> int:
    """The bytes that a model may take: free on the GPU, or held by torch and not in use."""
    free, _total = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
