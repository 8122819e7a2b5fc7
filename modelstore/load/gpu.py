"""What is free on the GPUs, asked of the driver's own library (NVML): a worker knows before it imports torch."""

from __future__ import annotations

import os
from typing import Any

_DRIVER = "/dev/nvidiactl"
_LIBRARY = "libnvidia-ml.so.1"


def free_bytes(visible: str | None = None) -> list[int] | None:
    """Free bytes of each GPU that this process may use; None where there is none, or it cannot be told.

    `visible`: CUDA_VISIBLE_DEVICES, if it is set; numbers only.
    """
    if not os.path.exists(_DRIVER):
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
        free = []
        for number in numbers:
            handle, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()  # total, free, used
            if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(number), ctypes.byref(handle)) != 0:
                return None
            if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
                return None
            free.append(int(memory[1]))
        return free or None
    finally:
        nvml.nvmlShutdown()
