"""GPUs that are memory of the host, behind the driver's interface: see fake_cuda.c, which is compiled here."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from modelstore.load.device import GpuMemory

_SOURCE = Path(__file__).with_name("fake_cuda.c")
_COMPILING = threading.Lock()


class State(ctypes.Structure):
    """The counters of fake_cuda.c; sizes in bytes. `contexts`, `pinned`, `streams` and `events` are those in use."""

    violations: int
    first_violation: bytes
    allocated: int
    peak: int
    contexts: int
    pinned: int
    copies: int
    bytes_copied: int
    streams: int
    events: int
    pinned_at_once: int
    _fields_ = (
        ("violations", ctypes.c_int),
        ("first_violation", ctypes.c_char * 200),
        *(
            (name, ctypes.c_uint64)
            for name in ("allocated", "peak", "contexts", "pinned", "copies", "bytes_copied", "streams", "events")
        ),
        ("pinned_at_once", ctypes.c_uint64),
    )


def why_not() -> str:
    """Why there are no such GPUs on this machine; empty if there are."""
    return "" if shutil.which("cc") else "needs a C compiler (cc) for a stand-in of libcuda"


def compiled(folder: Path) -> Path:
    """The library, compiled once below `folder`."""
    library = folder / "libcuda.so.1"
    with _COMPILING:
        if not library.exists():
            command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
            subprocess.run([*command, "-o", library, _SOURCE], check=True)
    return library


class FakeCuda:
    """One loaded copy of the library, with counters of its own."""

    def __init__(self, library: Path) -> None:
        self.library = library
        self.state = State.in_dll(ctypes.CDLL(str(library)), "fake")

    def check(self) -> None:
        """Fail if the driver was used in a way that a GPU would answer with wrong bytes or a crash."""
        assert not self.state.violations, self.state.first_violation.decode()

    def check_released(self) -> None:
        """Fail also if anything of a GPU is still in use."""
        self.check()
        names = ("allocated", "pinned", "streams", "events", "contexts")
        used = {name: value for name in names if (value := getattr(self.state, name))}
        assert not used, used


def use_in(monkeypatch: pytest.MonkeyPatch, fake: FakeCuda) -> None:
    """Have the package call this library, and torch take the memory of its GPUs for the CPU's."""
    real = torch.as_tensor

    def as_tensor(data: Any, **how: Any) -> torch.Tensor:
        if not isinstance(data, GpuMemory):
            return real(data, **how)
        described = data.__cuda_array_interface__
        (length,), (address, read_only) = described["shape"], described["data"]
        assert (described["typestr"], described["strides"], read_only) == ("|u1", None, False)
        assert how == {"device": data.device}
        memory = (ctypes.c_char * length).from_address(address)
        memory.owner = data  # as torch keeps the object that describes the memory
        return torch.frombuffer(memory, dtype=torch.uint8)

    monkeypatch.setattr("modelstore.load.device.LIBRARY", str(fake.library))
    monkeypatch.setattr("modelstore.load.torch_device.can_use_gpus", lambda: True)
    monkeypatch.setattr(torch, "as_tensor", as_tensor)
