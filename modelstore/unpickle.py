"""A pickled checkpoint as safetensors, in a process of its own: `python -I -m modelstore.unpickle SOURCE TARGET`.

A pickle is a program. torch's restricted unpickler (`weights_only=True`) runs none of it but for making tensors; should
that ever fail, this process has no token and no environment, may not open sockets, start programs or load libraries
once its imports are done, has no network at all where the kernel gives it a namespace of its own, and ends when it
takes more memory than a checkpoint of that size can need.

`convert` is what the store calls; only the process imports torch.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

from modelstore.errors import ModelStoreError, NoSpace, NotFound, PickleRefused

_SPARE_BYTES = 6 << 30  # what torch itself and the interpreter map
_FORBIDDEN = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "ctypes.dlopen",
)
_NO_TORCH = 3


def convert(source: Path, target: Path, *, name: str) -> None:
    """Write the tensors of the pickle `source` to `target`; `name` is the file's in messages.

    Raises PickleRefused where it holds anything but tensors by name, NotFound where torch is not installed, NoSpace.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-m", "modelstore.unpickle", str(source), str(target)],
        env={"PATH": os.defpath, "OMP_NUM_THREADS": "1"},
        cwd=target.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode == _NO_TORCH:
        raise NotFound(f"{name} is a pickle, and torch is needed to read it: pip install 'runpod-modelstore[worker]'")
    if "(os error 28)" in done.stderr or "(os error 122)" in done.stderr:
        raise NoSpace(f"no space to convert {name}: free some, raise the quota, or remove a model")
    if done.returncode < 0:
        raise ModelStoreError(
            f"the process that converts {name} was ended by signal {-done.returncode}: give it memory"
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise PickleRefused(f"{name} was not converted: {reason[:300]}; use a revision with safetensors")


def _main(source: str, target: str) -> int:
    limit = 3 * os.path.getsize(source) + _SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    leave_the_network()
    try:
        import torch
        from safetensors.torch import save_file
    except ModuleNotFoundError:
        return _NO_TORCH
    sys.addaudithook(forbid)
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except MemoryError:
        return _failed("it takes more memory than a checkpoint of its size can need")
    except Exception as error:
        return _failed(f"it is more than tensors ({' '.join(str(error).split())[:200]})")
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        return _failed("it is no table of tensors by name")
    # A copy of each: tensors that share their memory are two names of one thing in a pickle, and two things here.
    save_file({key: value.detach().clone().contiguous() for key, value in state.items()}, target, {"format": "pt"})
    return 0


def leave_the_network() -> None:
    """A network namespace with nothing in it, where this user may have one."""
    import ctypes

    new_user, new_network = 0x10000000, 0x40000000
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_network) != 0:
        libc.unshare(new_user | new_network)


def forbid(event: str, _arguments: object) -> None:
    if event.startswith(_FORBIDDEN):
        raise PermissionError(f"a checkpoint may not do this: {event}")


def _failed(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
