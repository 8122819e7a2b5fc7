"""The mount of the volume, and the folder of the store on it. Reads the mount table; changes nothing."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from modelstore.errors import RootUnusable

RUNPOD_VOLUME = Path("/runpod-volume")
POD_VOLUME = Path("/workspace")
_OCTAL = re.compile(r"\\([0-7]{3})")  # how the mount table writes spaces and the like

logger = logging.getLogger(__name__)


Place = Literal["host", "network", "bucket", "unknown"]

_PLACES: Mapping[Place, Mapping[str, str]] = {
    "host": {
        **{name: name for name in ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "reiserfs")},
        **{name: f"{name}, in memory" for name in ("tmpfs", "ramfs", "rootfs")},
        **{name: f"{name}, the container's own layers" for name in ("overlay", "aufs", "fuse.fuse-overlayfs")},
        **{name: name for name in ("vfat", "exfat", "ntfs", "ntfs3", "ecryptfs", "hfsplus")},
        "squashfs": "squashfs, an image",
        "fuse.disk": "a disk through FUSE",
    },
    "network": {
        "fuse.mfs": "MooseFS",
        "fuse.mfsmount": "MooseFS",
        "fuse.lizardfs": "LizardFS",
        "fuse.juicefs": "JuiceFS",
        "nfs": "NFS",
        "nfs4": "NFS",
        "ceph": "CephFS",
        "fuse.ceph": "CephFS",
        "fuse.ceph-fuse": "CephFS",
        "lustre": "Lustre",
        "beegfs": "BeeGFS",
        "gpfs": "GPFS",
        "wekafs": "WekaFS",
        "fuse.glusterfs": "GlusterFS",
        "cifs": "SMB",
        "smb3": "SMB",
        "ocfs2": "OCFS2",
        "gfs2": "GFS2",
    },
    "bucket": {
        "fuse.s3fs": "a bucket through s3fs",
        "fuse.rclone": "a bucket through rclone",
        "fuse.goofys": "a bucket through goofys",
        "fuse.geesefs": "a bucket through GeeseFS",
        "fuse.mountpoint-s3": "a bucket through Mountpoint for S3",
        "fuse.gcsfuse": "a bucket through gcsfuse",
        "fuse.blobfuse": "a container of blobs through blobfuse",
        "fuse.blobfuse2": "a container of blobs through blobfuse",
        "fuse.ossfs": "a bucket through ossfs",
        "fuse.cosfs": "a bucket through cosfs",
        "fuse.obsfs": "a bucket through obsfs",
        "fuse.tigrisfs": "a bucket through TigrisFS",
    },
    "unknown": {
        "fuse.bindfs": "another folder through bindfs",
        "fuse.folder": "another folder through FUSE",
        "fuse.mergerfs": "several folders through mergerfs",
        "fuse.unionfs": "several folders through unionfs",
        "fuse.unionfs-fuse": "several folders through unionfs",
        "fuse.sshfs": "a folder of another host through sshfs",
        "fuse.encfs": "an encrypted folder through encfs",
        "virtiofs": "a folder of the host through virtiofs",
        "9p": "a folder of the host through 9p",
        "fakeowner": "a folder of the host through Docker Desktop",
        "vboxsf": "a folder of the host through VirtualBox",
    },
}
_KINDS = {kind: (name, place) for place, names in _PLACES.items() for kind, name in names.items()}
# Programs whose mounts are plain `fuse` in the table, and are known by their device.
_FUSE_DEVICES = (
    (re.compile(r"mfs(master)?[#:]"), "fuse.mfs"),
    (re.compile(r"JuiceFS:"), "fuse.juicefs"),
    (re.compile(r"s3fs"), "fuse.s3fs"),
    (re.compile(r"mountpoint-s3"), "fuse.mountpoint-s3"),
    (re.compile(r"gcsfuse"), "fuse.gcsfuse"),
    (re.compile(r"blobfuse2?"), "fuse.blobfuse2"),
    (re.compile(r"geesefs"), "fuse.geesefs"),
    (re.compile(r"/dev/.*"), "fuse.disk"),
    (re.compile(r"/.*"), "fuse.folder"),
)


class Kind(NamedTuple):
    """What a mount is. `place`: where its bytes lie: on this host, on servers whose file system is known to do what it
    says, in a bucket, or that is not known."""

    name: str
    place: Place


def kind_of(mount: Mount | None) -> Kind:
    """The kind of a mount; a system without a mount table, which is no Linux, has files of its own, and so has the
    root of a sandbox."""
    if mount is None:
        return Kind("a file system that this system does not name", "host")
    known = _KINDS.get(mount.kind)
    if mount.kind in ("fuse", "fuseblk"):
        known = next((_KINDS[kind] for device, kind in _FUSE_DEVICES if device.match(mount.device)), None)
    kind = Kind(*known) if known else Kind(f"a file system of an unknown kind ({mount.kind})", "unknown")
    return kind._replace(place="host") if mount.point == Path("/") and kind.place == "unknown" else kind


def default_root(mounts: str, get: Callable[[str], str | None]) -> Path:
    """The root if none is set: on the serverless volume, else the pod's, else in the user's cache, with a warning.

    The mount table is asked, not the folder: RunPod's cached models make `/runpod-volume` exist without a volume, and
    images have a `/workspace` of their own.
    """
    points = {mount.point for mount in _mounts(mounts)}
    for volume in (RUNPOD_VOLUME, POD_VOLUME):
        if volume in points:
            return volume / "modelstore"
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
    """The mount that `path`, which has no links in it, lies on; None if there is no table."""
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
