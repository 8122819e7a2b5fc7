"""Whether a model fits: the free memory of this host and of its GPUs, asked without torch, and the one comparison.

The GPUs are asked through the driver's own library (NVML), because a start compares before it imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from modelstore.errors import DoesNotFit
from modelstore.units import size

T = TypeVar("T")

_UNLIMITED = 1 << 60
_DRIVER = "/dev/nvidiactl"
_LIBRARY = "libnvidia-ml.so.1"


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Free memory. `place`: a phrase such as "cuda:0 has"; `larger`: the remedy if it is too small."""

    free_bytes: int
    place: str
    larger: str = "a larger GPU"

    def less(self, spare_bytes: int) -> FreeMemory:
        """The same, without memory that is for others."""
        return replace(self, free_bytes=max(0, self.free_bytes - spare_bytes))

    def check_fits(self, label: object, needed_bytes: int) -> None:
        """Raise DoesNotFit if less is free than `label` needs."""
        if needed_bytes > self.free_bytes:
            raise DoesNotFit(
                f"{label} takes {size(needed_bytes)} and {self.place} {size(self.free_bytes)} free: "
                f"use {self.larger}, or a smaller or quantized model"
            )


def of_gpus(free: Sequence[int]) -> FreeMemory:
    """The free memory of several GPUs together, from that of each."""
    place = "the GPU has" if len(free) == 1 else f"{len(free)} GPUs have"
    return FreeMemory(sum(free), place, "larger GPUs")


def free_host_memory() -> FreeMemory | None:
    """The free memory of this host: see `free_host_bytes`."""
    free = free_host_bytes()
    return None if free is None else FreeMemory(free, "this machine has", "a larger machine")


def free_gpu_bytes(visible: str | None = None) -> list[int] | None:
    """Free bytes of each GPU that this process may use; None if there is none, or the driver does not say.

    `visible`: CUDA_VISIBLE_DEVICES, if it is set; numbers only.
    """
    import ctypes

    def free_bytes(nvml: Any, handle: Any) -> int | None:
        memory = (ctypes.c_ulonglong * 3)()  # total, free, used
        return None if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) else int(memory[1])

    free = _asked_of_gpus(visible, free_bytes)
    return None if not free or None in free else [amount for amount in free if amount is not None]


def has_driver() -> bool:
    """Whether this host has NVIDIA's driver."""
    return os.path.exists(_DRIVER)


def gpus(visible: str | None = None) -> list[str]:
    """Name, compute capability and driver of each GPU that this process may use; empty if there is none, or the driver
    does not say. `visible`: see `free_gpu_bytes`."""
    import ctypes

    def described(nvml: Any, handle: Any) -> str:
        name, driver = (ctypes.create_string_buffer(96) for _ in range(2))
        major, minor = ctypes.c_int(), ctypes.c_int()
        nvml.nvmlDeviceGetName(handle, name, len(name))
        nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
        nvml.nvmlSystemGetDriverVersion(driver, len(driver))
        return f"{name.value.decode()}, {major.value}.{minor.value}, driver {driver.value.decode()}"

    return _asked_of_gpus(visible, described) or []


def _asked_of_gpus(visible: str | None, ask: Callable[[Any, Any], T]) -> list[T] | None:
    """What `ask` returns for each GPU, from the driver's library and the GPU's handle in it; None if there is none."""
    if not has_driver():
        return None
    if visible is not None and not all(part.strip().isdigit() for part in visible.split(",")):
        return None
    import ctypes

    try:
        nvml: Any = ctypes.CDLL(_LIBRARY)
        if nvml.nvmlInit_v2() != 0:
            return None
    except (OSError, AttributeError):
        return None
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return None
        numbers = range(count.value) if visible is None else [int(part) for part in visible.split(",")]
        answers = []
        for number in numbers:
            handle = ctypes.c_void_p()
            if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(number), ctypes.byref(handle)) != 0:
                return None
            answers.append(ask(nvml, handle))
        return answers
    finally:
        nvml.nvmlShutdown()


def free_host_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that a process may still take before something is killed: of the machine's memory, and of the container's
    limit; the page cache counts as free. None if the system does not say."""
    groups = [_folders(cgroup, proc, ""), _folders(cgroup / "memory", proc, "memory")]
    amounts = (
        _of_machine(proc / "meminfo"),
        *map(_of_cgroup_2, groups[0]),
        *map(_of_cgroup_1, groups[1]),
    )
    known = [amount for amount in amounts if amount is not None]
    return max(0, min(known)) if known else None


def _of_machine(meminfo: Path) -> int | None:
    for line in _read(meminfo).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _folders(root: Path, proc: Path, controller: str) -> list[Path]:
    """The group of this process and those around it, whose limits hold for it, too; `root` of a container that sees no
    others."""
    for line in _read(proc / "self" / "cgroup").splitlines():
        _number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controller in controllers.split(",") and ".." not in path:
            group = root / path.lstrip("/")
            return [each for each in (group, *group.parents) if each.is_relative_to(root)]
    return [root]


def _of_cgroup_2(folder: Path) -> int | None:
    return _limit_less_use(folder / "memory.max", folder / "memory.current", folder / "memory.stat", "")


def _of_cgroup_1(folder: Path) -> int | None:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    limit, usage, stat = (folder / name for name in names)
    return _limit_less_use(limit, usage, stat, "total_")


def _limit_less_use(limit: Path, usage: Path, stat: Path, prefix: str) -> int | None:
    """A container's limit less its use, except for cached files."""
    limit_text, usage_text = _read(limit).strip(), _read(usage).strip()
    if not (limit_text.isdigit() and usage_text.isdigit()) or int(limit_text) >= _UNLIMITED:
        return None
    cache = (f"{prefix}inactive_file", f"{prefix}active_file")
    lines = [line.split() for line in _read(stat).splitlines()]
    return (
        int(limit_text) - int(usage_text) + sum(int(line[1]) for line in lines if len(line) == 2 and line[0] in cache)
    )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
