"""A volume of a known rate: an ext4 image on a loop device of its own, whose reads the kernel throttles.

Needs root and cgroup v1's blkio controller. Only what is started with the prefix is throttled, and only reads.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

_BLKIO = Path("/sys/fs/cgroup/blkio")


@dataclass(frozen=True)
class Throttled:
    """A mounted volume, and what to put before a command so that its reads of it are slow."""

    mount: Path
    groups: dict[int, Path]

    def prefix(self, bytes_per_s: int) -> tuple[str, ...]:
        """The words before a command."""
        return ("sh", "-c", f'echo $$ >{self.groups[bytes_per_s]}/cgroup.procs && exec "$@"', "sh")


def why_not() -> str:
    """Why there can be no throttled volume here; empty where there can."""
    if os.geteuid() != 0:
        return "needs root"
    if not (_BLKIO / "blkio.throttle.read_bps_device").exists():
        return "needs cgroup v1's blkio controller"
    return "" if Path("/dev/loop-control").exists() else "needs loop devices"


@contextmanager
def throttled(size_bytes: int, rates: tuple[int, ...], folder: Path) -> Iterator[Throttled]:
    """A volume of this size, its image in `folder`, for these rates in bytes a second; removed at the end."""
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="throttled-", dir=folder)))
        image, mount = work / "image", work / "mount"
        mount.mkdir()
        with image.open("wb") as file:
            file.truncate(size_bytes)
        _run("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=1", str(image))
        device = _run("losetup", "--find", "--show", "--direct-io=on", str(image))
        stack.callback(_run, "losetup", "--detach", device)
        _run("mount", device, str(mount))
        stack.callback(_run, "umount", str(mount))
        number = os.stat(device).st_rdev
        groups = {}
        for rate in rates:
            group = _BLKIO / f"bench-{os.getpid()}-{rate}"
            group.mkdir()
            stack.callback(_remove, group)
            limit = f"{os.major(number)}:{os.minor(number)} {rate}"
            (group / "blkio.throttle.read_bps_device").write_text(limit)
            groups[rate] = group
        yield Throttled(mount, groups)


def _remove(group: Path) -> None:
    """Remove a group once its last process, such as a worker's reader, has ended."""
    deadline = time.monotonic() + 10
    while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    group.rmdir()


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
