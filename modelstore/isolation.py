"""Processes of ours that handle foreign input, and may do nothing else.

A module that runs as such a process has a function `main`, and is started by `command`: in Python's isolated mode,
which reads neither the working folder nor the environment's paths, with the import paths of this process. It gives up
its rights once it has imported all that it needs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress

_PR_SET_PDEATHSIG = 1
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000
_NOBODY = 65534
_POLL_S = 1.0
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
_RUN = "import sys; sys.path[:] = {path!r}; from {module} import main; sys.exit(main(*sys.argv[1:]))"


def command(module: str, *arguments: str) -> list[str]:
    """The command that runs `module`'s `main(*arguments)` in an isolated process."""
    path = [os.path.abspath(folder) for folder in sys.path if folder]
    return [sys.executable, "-I", "-c", _RUN.format(path=path, module=module), *arguments]


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when the thread that started it ends; `parent` is that process's id.

    That holds however long this process computes. It needs a starter that waits for the end: see `watch_parent`.
    """
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def watch_parent(parent: int) -> None:
    """End this process soon after the process `parent` has ended, whichever of its threads started this one.

    A thread of this process looks, so that code which holds the interpreter's lock can delay it: set an alarm too.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        os._exit(0)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def leave_the_network() -> None:
    """Go into a network namespace with nothing in it, if this user may have one. Root gets no namespace of users for
    it: it would be another user there, and still root for files.

    Call it while this process has one thread: the kernel gives an ordinary account no namespace later.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_NETWORK) != 0 and os.geteuid() != 0:
        libc.unshare(_NEW_USER | _NEW_NETWORK)


def leave_root() -> None:
    """Become the user `nobody`, if this process is root. Files that only root can read are then out of reach, also for
    imports.

    The root of a container that runs without root may not change its user, and is an ordinary account outside.
    """
    if os.geteuid() == 0:
        with suppress(OSError):
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def forbid_all_but_computing() -> None:
    """From now on opening a socket, starting a program or loading a library raises PermissionError."""
    sys.addaudithook(_forbid)


def _forbid(event: str, _arguments: object) -> None:
    if event.startswith(_FORBIDDEN):
        raise PermissionError(f"this process may not do this: {event}")
