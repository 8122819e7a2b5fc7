"""How much memory this host, or the container on it, can still give."""

from __future__ import annotations

from pathlib import Path

_UNLIMITED = 1 << 60


def free_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a process may still take before something is killed: of the machine's memory, and of the container's limit;
    the page cache counts as free. None where it cannot be told."""
    found = [
        size
        for size in (_of_machine(proc / "meminfo"), _of_cgroup_2(cgroup), _of_cgroup_1(cgroup / "memory"))
        if size is not None
    ]
    return max(0, min(found)) if found else None


def _of_machine(meminfo: Path) -> int | None:
    for line in _read(meminfo).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _of_cgroup_2(folder: Path) -> int | None:
    return _left(folder / "memory.max", folder / "memory.current", folder / "memory.stat", "")


def _of_cgroup_1(folder: Path) -> int | None:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    limit, usage, stat = (folder / name for name in names)
    return _left(limit, usage, stat, "total_")


def _left(limit: Path, usage: Path, stat: Path, prefix: str) -> int | None:
    """A container's limit less what it holds, but for cached files."""
    most, held = _read(limit).strip(), _read(usage).strip()
    if not (most.isdigit() and held.isdigit()) or int(most) >= _UNLIMITED:
        return None
    cache = (f"{prefix}inactive_file", f"{prefix}active_file")
    lines = [line.split() for line in _read(stat).splitlines()]
    return int(most) - int(held) + sum(int(line[1]) for line in lines if len(line) == 2 and line[0] in cache)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
