"""The import of the RunPod SDK, without the second in which it does nothing.

The SDK asks `cpuinfo` for the processor's name, for its debugger, while it is imported. That library forks a process
and sleeps for a second to measure the clock. The kernel knows the name, and gives it instead during the import.
"""

from __future__ import annotations

import platform
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType


def import_sdk() -> None:
    """Import `runpod`. Afterwards `cpuinfo` is the library itself for whoever imports it."""
    stand_in = ModuleType("cpuinfo", "The name of the processor as Linux has it.")
    stand_in.get_cpu_info = lambda: {"brand_raw": _processor_name()}  # type: ignore[attr-defined]
    is_needed = not {"cpuinfo", "runpod"} & sys.modules.keys()
    if is_needed:
        sys.modules["cpuinfo"] = stand_in
    try:
        import_module("runpod")
    finally:
        if is_needed:
            del sys.modules["cpuinfo"]


def _processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
