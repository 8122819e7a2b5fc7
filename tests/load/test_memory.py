"""The free memory: the machine's, or the container's if that is less."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelstore.load.memory import free_host_bytes

GB = 10**9


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "meminfo").write_text("MemTotal: 64000000 kB\nMemFree: 1 kB\nMemAvailable:   40000000 kB\n")
    return tmp_path


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_the_machines_memory_if_there_is_no_limit(proc: Path, tmp_path: Path) -> None:
    assert free_host_bytes(proc, tmp_path / "none") == 40_960_000_000
    unlimited = write(tmp_path / "two", memory__max="max\n", memory__current="5\n", memory__stat="")
    assert free_host_bytes(proc, unlimited) == 40_960_000_000
    write(
        tmp_path / "one" / "memory",
        memory__limit_in_bytes=str(2**63 - 4096),
        memory__usage_in_bytes="5",
        memory__stat="",
    )
    assert free_host_bytes(proc, tmp_path / "one") == 40_960_000_000


def test_a_containers_limit_counts_and_its_cache_is_free(proc: Path, tmp_path: Path) -> None:
    stat = f"anon 7\ninactive_file {2 * GB}\nactive_file {GB}\ntotal_inactive_file {GB}\ntotal_active_file {3 * GB}\n"
    two = write(tmp_path / "two", memory__max=str(16 * GB), memory__current=str(10 * GB), memory__stat=stat)
    assert free_host_bytes(proc, two) == 9 * GB
    write(
        tmp_path / "one" / "memory",
        memory__limit_in_bytes=str(16 * GB),
        memory__usage_in_bytes=str(10 * GB),
        memory__stat=stat,
    )
    assert free_host_bytes(proc, tmp_path / "one") == 10 * GB


@pytest.mark.parametrize("version", [1, 2])
def test_the_limits_of_the_groups_around_count_too(proc: Path, tmp_path: Path, version: int) -> None:
    """A process in a group within a container's: the tightest of all holds."""
    names = ("memory__max", "memory__current") if version == 2 else ("memory__limit_in_bytes", "memory__usage_in_bytes")
    (tmp_path / "self").mkdir()
    line = "0::/outer/inner\n" if version == 2 else "4:memory,hugetlb:/outer/inner\n3:cpu:/else\n"
    (tmp_path / "self" / "cgroup").write_text(line)
    root = tmp_path / "group"
    top = root if version == 2 else root / "memory"
    for folder, limit in ((top, 30), (top / "outer", 8), (top / "outer" / "inner", 20)):
        write(folder, **{names[0]: str(limit * GB), names[1]: str(5 * GB), "memory__stat": ""})
    assert free_host_bytes(proc, root) == 3 * GB
    (tmp_path / "self" / "cgroup").write_text(line.replace("/outer/inner", "/../elsewhere"))
    assert free_host_bytes(proc, root) == 25 * GB, "of another container"


def test_nothing_is_told_if_nothing_is_known(tmp_path: Path) -> None:
    assert free_host_bytes(tmp_path, tmp_path) is None


def test_this_machine_has_some() -> None:
    found = free_host_bytes()
    assert found is not None
    assert found > 10**8
