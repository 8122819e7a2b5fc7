"""A pickled checkpoint as safetensors, in an isolated process.

A pickle is a program. torch's restricted unpickler (`weights_only=True`) runs none of it but for making tensors; should
that ever fail, this process has no token and no environment, may not open sockets, start programs or load libraries
once its imports are done, has no network at all if the kernel gives it a namespace of its own, and ends when it takes
more memory, more of the processor or more time than a checkpoint of that size can need, or when its parent ends. (A
pickle of a kilobyte can hold a key whose hash takes years.)

The store calls `convert`; only the process imports torch.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from modelstore import isolation
from modelstore.errors import NoSpace, NotFound, PickleRefused, ProcessFailed

_SPARE_BYTES = 6 << 30  # mapped by torch itself and the interpreter
_NO_TORCH = 3
_POLL_S = 0.2
_ERROR_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a conversion, in seconds; both grow with the pickle."""

    processor_s: int
    time_s: int

    @classmethod
    def of(cls, size_bytes: int) -> Limits:
        """Many times the need of a pickle of this size on a slow machine and a slow volume."""
        return cls(processor_s=90 + size_bytes // 20_000_000, time_s=300 + size_bytes // 5_000_000)


def convert(
    source: Path,
    target: Path,
    *,
    name: str,
    guard: Callable[[], None] = lambda: None,
    limits: Limits | None = None,
) -> None:
    """Write the tensors of the pickle `source` to `target`; `name` is the file's in messages.

    `guard` is called now and then; if it raises, the conversion ends with that. Raises PickleRefused for a pickle that
    holds anything but tensors by name or takes more than its `limits`, NotFound if torch is not installed, NoSpace.
    """
    limits = limits or Limits.of(source.stat().st_size)
    arguments = (str(source), str(target), str(limits.processor_s), str(os.getpid()))
    with TemporaryFile() as errors:
        process = subprocess.Popen(
            isolation.command("modelstore.fill.pickles", *arguments),
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1"},
            cwd=target.parent,
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
        )
        try:
            late = not _ended(process, time.monotonic() + limits.time_s, guard)
        finally:
            process.kill()
            process.wait()
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - _ERROR_BYTES))
        text = errors.read().decode(errors="replace")
    if late or process.returncode == -signal.SIGXCPU:
        raise PickleRefused(f"{name} was not converted: it takes longer than a checkpoint of its size can need")
    if process.returncode == _NO_TORCH:
        raise NotFound(f"{name} is a pickle, and torch is needed to read it: pip install 'runpod-modelstore[worker]'")
    if "(os error 28)" in text or "(os error 122)" in text:
        raise NoSpace(f"no space to convert {name}: free some, raise the quota, or remove a model")
    if process.returncode < 0:
        raise ProcessFailed(
            f"the process that converts {name} was ended by signal {-process.returncode}: give it memory"
        )
    if process.returncode:
        reason = (text.strip().splitlines() or [f"it ended with {process.returncode}"])[-1]
        raise PickleRefused(f"{name} was not converted: {reason[:300]}; use a revision with safetensors")


def _ended(process: subprocess.Popen[bytes], deadline: float, guard: Callable[[], None]) -> bool:
    """Wait for the end of a process; False if it runs still at the `deadline`."""
    while time.monotonic() < deadline:
        guard()
        try:
            process.wait(_POLL_S)
            return True
        except subprocess.TimeoutExpired:
            continue
    return False


def main(source: str, target: str, processor_s: str, parent: str) -> int:
    isolation.end_with_parent(int(parent))
    limit = 3 * os.path.getsize(source) + _SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (int(processor_s), int(processor_s) + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    isolation.leave_the_network()
    try:
        import torch
        from safetensors.torch import save_file
    except ModuleNotFoundError:
        return _NO_TORCH
    isolation.forbid_all_but_computing()
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except MemoryError:
        return _failed("it takes more memory than a checkpoint of its size can need")
    except Exception as error:
        reason = " ".join(str(error).split()).partition(". ")[0]  # torch goes on with advice that runs the code
        return _failed(f"it is more than tensors ({reason[:200]})")
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        return _failed("it is no table of tensors by name")
    # A copy of each: tensors that share their memory are two names of one thing in a pickle, and two things here.
    save_file({key: value.detach().clone().contiguous() for key, value in state.items()}, target, {"format": "pt"})
    return 0


def _failed(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 1
