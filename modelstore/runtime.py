"""The folder of this user for what processes of one host share while they run. Not on the volume."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
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
