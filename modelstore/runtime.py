"""The folder of this user for what processes of one host share while they run, and folders in it that one process
owns. Not on the volume."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
from contextlib import suppress
from itertools import count
from pathlib import Path

from modelstore.errors import Refused


def runtime_folder() -> Path:
    """`<temporary folder>/modelstore-<user id>`, made if it is missing. Raises Refused if it is not this user's
    alone."""
    folder = Path(tempfile.gettempdir()) / f"modelstore-{os.geteuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid() or state.st_mode & 0o077:
        raise Refused(f"{folder} is not this user's alone: remove it, or let TMPDIR name another folder")
    return folder


class OwnedFolder:
    """An empty folder of this process alone, at the first of a row of fixed paths that no other process has."""

    def __init__(self, path: Path) -> None:
        from filelock import FileLock, Timeout  # a hit that needs no such folder starts without

        path.parent.mkdir(mode=0o700, exist_ok=True)
        for number in count(1):
            self.path = path if number == 1 else path.with_name(f"{path.name}.{number}")
            self._lock = FileLock(f"{self.path}.lock", thread_local=False)
            try:
                self._lock.acquire(blocking=False)
                break
            except Timeout:
                continue
        self.clear()

    def clear(self) -> None:
        """Remove all that the folder holds."""
        with suppress(FileNotFoundError):  # not removed in its place: a process that was left behind may write into it
            before = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}")
            self.path.rename(before)
            if before.is_symlink():
                before.unlink()
            shutil.rmtree(before, ignore_errors=True)
        for aside in self.path.parent.glob(f"{self.path.name}.{'[0-9a-f]' * 8}"):  # of a process that was killed
            shutil.rmtree(aside, ignore_errors=True)
        self.path.mkdir(mode=0o700)

    def close(self) -> None:
        """Remove the folder, and let others have its path."""
        if self._lock.is_locked:
            shutil.rmtree(self.path, ignore_errors=True)
            self._lock.release()
