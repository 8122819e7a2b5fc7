"""The mount of the volume, and the folder of the store on it. Reads the mount table; changes nothing."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from modelstore.errors import RootUnusable

RUNPOD_VOLUME = Path("/runpod-volume")
POD_VOLUME = Path("/workspace")
NETWORK_FILE_SYSTEMS = frozenset({"fuse", "fuse.mfs", "nfs", "nfs4", "ceph", "lustre", "beegfs", "cifs", "gpfs"})
_OCTAL = re.compile(r"\\([0-7]{3})")  # how the mount table writes spaces and the like

logger = logging.getLogger(__name__)


def default_root(mounts: str, get: Callable[[str], str | None], is_dir: Callable[[Path], bool]) -> Path:
    """The root if none is set: on the serverless volume, else the pod's, else in the user's cache, with a warning.

    The mount table is asked, not the folder: RunPod's cached models make `/runpod-volume` exist without a volume.
    """
    if any(mount.point == RUNPOD_VOLUME for mount in _mounts(mounts)):
        return RUNPOD_VOLUME / "modelstore"
    if is_dir(POD_VOLUME):
        return POD_VOLUME / "modelstore"
    cache = Path(get("XDG_CACHE_HOME") or Path(get("HOME") or "/root") / ".cache") / "modelstore"
    logger.warning("no network volume is mounted: using %s, which no other worker sees; set MODELSTORE_ROOT", cache)
    return cache


class Mount(NamedTuple):
    """A line of the mount table."""

    device: str
    point: Path
    kind: str
    options: tuple[str, ...]


def mount_of(path: Path, mounts: str) -> Mount | None:
    """The mount that `path` lies on; None if there is no table."""
    around = [mount for mount in _mounts(mounts) if path.is_relative_to(mount.point)]
    return max(around, key=lambda mount: len(mount.point.parts), default=None)


def _mounts(mounts: str) -> Iterator[Mount]:
    """The later of two mounts on one folder covers the other, and comes first."""
    for line in reversed(mounts.splitlines()):
        device, point, kind, options, *_rest = [*line.split(), "", "", "", ""]
        device, point = (_OCTAL.sub(lambda match: chr(int(match[1], 8)), text) for text in (device, point))
        yield Mount(device, Path(point), kind, tuple(options.split(",")))


def read_mounts() -> str:
    """This system's mount table."""
    try:
        return Path("/proc/mounts").read_text(errors="surrogateescape")
    except OSError:
        return ""


def check_place(root: Path) -> None:
    """Raise RootUnusable if the folder that a store would lie in is not there. A mounted volume or the user's home
    is enough, because a fill makes the folders between."""
    if root.parent.is_dir() or root.is_relative_to(os.path.expanduser("~")):
        return
    existing = next(folder for folder in root.parents if folder.exists())
    if existing == Path("/") or not existing.is_mount():
        raise RootUnusable(f"there is no folder {root.parent}: mount the volume, or set MODELSTORE_ROOT or --root")
