"""The account that a worker runs as: the store's owner instead of root, if the store has one.

A container starts as root, and RunPod mounts a network volume as root's: a worker of another account cannot write
there. If the store's folder belongs to another account (`chown -R 1000:1000 /runpod-volume/modelstore`), the worker
becomes that account before it imports anything heavy, and cannot be root again. All that fills this store should then
run as the same account, since others cannot change the files that root makes there.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

_PR_SET_DUMPABLE = 4
_LOOKED_AT = 64  # of the folders in each folder of the store

logger = logging.getLogger(__name__)


def become_owner_of(root: Path) -> bool:
    """Give up root for the owner of the store's folder; whether this process did.

    Stays root, with a warning, if that account could not read this environment or write the store.
    """
    if os.geteuid() != 0:
        return False
    try:
        state = root.stat()
    except OSError:
        return False
    if state.st_uid == 0:
        return False
    if not _could_work(state.st_uid, state.st_gid, root):
        logger.warning("%s belongs to user %d, who cannot run this worker: it stays root", root, state.st_uid)
        return False
    _become(state.st_uid, state.st_gid)
    home = tempfile.mkdtemp(prefix="modelstore-home-")  # caches of torch and transformers go there
    os.environ |= {"HOME": home, "USER": "modelstore", "LOGNAME": "modelstore"}
    logger.info("runs as user %d, who owns the store", state.st_uid)
    return True


def _could_work(user: int, group: int, root: Path) -> bool:
    """Whether a process of that account can read this Python's libraries and write the store, tried by one."""
    child = os.fork()  # nothing heavy is imported yet, and no thread runs
    if child == 0:
        code = 1
        try:
            _become(user, group)
            for path in (os.__file__, __file__, sys.prefix):
                os.stat(path)
            with open(os.__file__, "rb"), tempfile.TemporaryFile(dir=root):
                code = 0 if all(os.access(folder, os.W_OK | os.X_OK) for folder in _some_folders(root)) else 1
        finally:
            os._exit(code)
    _pid, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


def _some_folders(root: Path) -> Iterator[str]:
    """The folders of a store, and some of those in each: files that root made there show soon."""
    for folder in os.scandir(root):
        if folder.is_dir(follow_symlinks=False):
            yield folder.path
            inside = (each for each in os.scandir(folder) if each.is_dir(follow_symlinks=False))
            yield from (each.path for each in islice(inside, _LOOKED_AT))


def _become(user: int, group: int) -> None:
    os.setgroups([])
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)
    # The kernel shuts /proc/PID of a process that changed its user; a server beside it opens the weights there.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1)
