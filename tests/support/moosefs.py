"""A real MooseFS: one master, one chunkserver, and hosts in network namespaces, each with a mount of its own.

    with MooseFS.running(hosts=3) as moosefs:
        moosefs.hosts[0].mount                 a path; a use of it is a use by that host
        moosefs.hosts[0].pull_cable()          the host's network is gone; everything on its mount hangs

Needs root, /dev/fuse, and Debian's moosefs-master, moosefs-chunkserver, moosefs-client, fuse3 and iproute2. Only the
mount process lives in the host's namespace: a test's processes stay in the machine's own network, beside their hub.
Names and addresses carry the process id; everything that was started is taken down in the end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("mfsmaster", "mfschunkserver", "mfsmount", "ip", "nsenter", "fusermount3")
_START_S = 90.0


def why_not() -> str:
    """Why no MooseFS can run here; empty where it can."""
    if os.geteuid() != 0:
        return "needs root"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "needs /dev/fuse"
    missing = [program for program in PROGRAMS if _which(program) is None]
    return f"needs {', '.join(missing)} (Debian packages, see .ci/run)" if missing else ""


@dataclass
class Host:
    """One host: a network namespace with a cable to the store, and a mount."""

    name: str
    address: str
    mount: Path
    cable: str

    def pull_cable(self) -> None:
        _run("ip", "-n", self.name, "link", "set", self.cable, "down")

    def set_quota(self, folder: Path, size_bytes: int) -> None:
        """A hard quota on what the files of a folder below the mount may hold, as RunPod sets one on a volume."""
        self._tool("mfssetquota", "-L", str(size_bytes), str(folder))

    def _tool(self, *command: str) -> None:
        _run("nsenter", f"--net=/run/netns/{self.name}", *command)

    def plug_in_cable(self) -> None:
        _run("ip", "-n", self.name, "link", "set", self.cable, "up")


@dataclass
class MooseFS:
    """The running file system."""

    folder: Path
    hosts: list[Host] = field(default_factory=list)

    @classmethod
    @contextmanager
    def running(cls, *, hosts: int = 3) -> Iterator[MooseFS]:
        """Start everything; end and remove it all at the end of the block."""
        suffix = f"{os.getpid() % 100_000:x}"
        network = f"10.77.{os.getpid() % 250}"
        with ExitStack() as stack:
            folder = Path(tempfile.mkdtemp(prefix="moosefs-"))  # not pytest's: the servers run as another user
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            folder.chmod(0o755)
            store = stack.enter_context(_namespace(f"mfs{suffix}s"))
            _run("ip", "-n", store, "link", "set", "lo", "up")
            _run("ip", "-n", store, "link", "add", "br0", "type", "bridge")
            _run("ip", "-n", store, "addr", "add", f"{network}.1/24", "dev", "br0")
            _run("ip", "-n", store, "link", "set", "br0", "up")
            _start_servers(stack, folder, store, network)
            moosefs = cls(folder)
            for number in range(1, hosts + 1):
                host = stack.enter_context(_host(folder, store, f"mfs{suffix}h{number}", network, number))
                moosefs.hosts.append(host)
            yield moosefs


def _start_servers(stack: ExitStack, folder: Path, store: str, network: str) -> None:
    master, chunks, data = folder / "master", folder / "chunkserver", folder / "chunks"
    for path in (master, chunks, data):
        path.mkdir(parents=True)
    shutil.copy("/var/lib/mfs/metadata.mfs.empty", master / "metadata.mfs")
    (folder / "exports.cfg").write_text(f"{network}.0/24 / rw,alldirs,admin,maproot=0:0\n{network}.0/24 . rw\n")
    (folder / "topology.cfg").write_text("")
    (folder / "hdd.cfg").write_text(f"{data}\n")
    common = "WORKING_USER = mfs\nWORKING_GROUP = mfs\nSYSLOG_MIN_LEVEL = WARNING\n"
    (folder / "master.cfg").write_text(
        f"{common}DATA_PATH = {master}\nEXPORTS_FILENAME = {folder}/exports.cfg\n"
        f"TOPOLOGY_FILENAME = {folder}/topology.cfg\nMATOML_LISTEN_HOST = {network}.1\n"
        f"MATOCS_LISTEN_HOST = {network}.1\nMATOCL_LISTEN_HOST = {network}.1\n"
    )
    (folder / "chunkserver.cfg").write_text(
        f"{common}DATA_PATH = {chunks}\nHDD_CONF_FILENAME = {folder}/hdd.cfg\nMASTER_HOST = {network}.1\n"
        f"BIND_HOST = {network}.1\nCSSERV_LISTEN_HOST = {network}.1\nHDD_LEAVE_SPACE_DEFAULT = 1GiB\n"
    )
    for path in (folder, *folder.rglob("*")):
        shutil.chown(path, "mfs", "mfs")
    stack.enter_context(
        _process(folder / "master.log", store, "mfsmaster", "-c", f"{folder}/master.cfg", "-f", "start")
    )
    stack.enter_context(
        _process(folder / "chunkserver.log", store, "mfschunkserver", "-c", f"{folder}/chunkserver.cfg", "-f", "start")
    )


@contextmanager
def _host(folder: Path, store: str, name: str, network: str, number: int) -> Iterator[Host]:
    mount, cable = folder / f"host{number}", f"v{number}"
    mount.mkdir()
    host = Host(name, f"{network}.{number + 10}", mount, cable)
    with _namespace(name), ExitStack() as stack:
        _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", store, "link", "add", f"b{number}", "type", "veth", "peer", "name", cable, "netns", name)
        _run("ip", "-n", store, "link", "set", f"b{number}", "master", "br0", "up")
        _run("ip", "-n", name, "addr", "add", f"{host.address}/24", "dev", cable)
        _run("ip", "-n", name, "link", "set", cable, "up")
        # mfsmount tries once and gives up, so the master must listen before it starts.
        _wait_for(lambda: _reaches(name, f"{network}.1", 9421), "the master to listen", folder / "master.log")
        stack.callback(subprocess.run, ["umount", "--lazy", mount], capture_output=True, check=False)
        log = folder / f"{mount.name}.log"
        stack.enter_context(_process(log, name, "mfsmount", "-f", "-H", f"{network}.1", str(mount)))
        _wait_for(lambda: os.path.ismount(mount), f"{mount} to be mounted", log)
        _wait_for(lambda: _writes(mount / f".{name}"), f"{mount} to take a file", folder / "chunkserver.log")
        yield host


@contextmanager
def _namespace(name: str) -> Iterator[str]:
    _run("ip", "netns", "add", name)
    try:
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@contextmanager
def _process(log: Path, namespace: str, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server in the foreground, in a namespace, ended by its id."""
    with log.open("wb") as file:
        process = subprocess.Popen(["nsenter", f"--net=/run/netns/{namespace}", *command], stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(condition: Callable[[], bool], what: str, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited in vain for {what}: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.1)


def _reaches(namespace: str, address: str, port: int) -> bool:
    command = ["nsenter", f"--net=/run/netns/{namespace}", "bash", "-c", f"exec 3<>/dev/tcp/{address}/{port}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _writes(path: Path) -> bool:
    """Whether the chunkserver takes bytes: for a moment after its start it does not."""
    try:
        with path.open("wb") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
        path.unlink()
    except OSError:
        return False
    return True


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
