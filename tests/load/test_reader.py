"""Bytes of a snapshot into memory, verified on the way: by threads and by the reader process, whole and through a ring."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelstore import processors
from modelstore.errors import DigestMismatch, SnapshotNotFound
from modelstore.load import blocks
from modelstore.load.blocks import MOST_AT_ONCE, CachedPages, ReadConcurrency
from modelstore.load.reader import Reading
from modelstore.volume.manifest import FileRecord
from tests.support.readings import BLOCK, MB, children, start, write


@pytest.fixture(params=[False, True], ids=["threads", "process"])
def beside(request: pytest.FixtureRequest) -> Iterator[bool]:
    """How it is read; nothing of a reader process is left after the test."""
    before = children()
    yield request.param
    assert children() == before


def evict(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def test_every_byte_of_every_file_arrives(tmp_path: Path, beside: bool) -> None:
    files = [write(tmp_path, f"f{i}", size) for i, size in enumerate((0, 1, BLOCK, 10 * BLOCK, 10 * BLOCK + 7))]
    reading = start(tmp_path, files, beside=beside)
    for file in reversed(files):
        assert reading.wait(file.path) == (tmp_path / file.path).read_bytes()
    reading.wait_all()
    assert reading.ended is not None
    assert reading.size_bytes == sum(file.size_bytes for file in files)
    reading.close()
    assert reading.wait(files[-1].path) == (tmp_path / files[-1].path).read_bytes(), "the memory outlives the reading"


def test_files_may_be_added_while_others_are_read(tmp_path: Path, beside: bool) -> None:
    reading = Reading(beside=beside)
    for number in range(5):
        file = write(tmp_path, f"f{number}", 3 * MB + number, MB)
        reading.add(tmp_path, [file], block_bytes=MB)
        assert reading.wait(file.path) == (tmp_path / file.path).read_bytes()
        assert reading.ended is None
    reading.no_more()
    reading.wait_all()
    reading.close()


@pytest.mark.parametrize("size", [8 * MB, 8 * MB + 4097, 5 * MB - 1])
def test_a_cold_file_is_read_past_the_page_cache(tmp_path: Path, beside: bool, size: int) -> None:
    file = write(tmp_path, "x", size, MB)
    data = (tmp_path / "x").read_bytes()
    evict(tmp_path / "x")
    reading = start(tmp_path, [file], MB, beside=beside)
    assert reading.wait("x") == data
    reading.close()
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    pages = CachedPages(fd, size)
    cached = [pages.contain(offset, min(MB, size - offset)) for offset in range(0, size, MB)]
    os.close(fd)
    assert not any(cached), "bytes that a direct read brings are not in the page cache"


def test_cached_pages_are_copied_from_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "x", 8 * MB, MB)
    evict(tmp_path / "x")
    with (tmp_path / "x").open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for block in (0, 3):
            os.pread(opened.fileno(), MB, block * MB)
    direct: list[int] = []
    real = blocks._direct_read
    monkeypatch.setattr(
        blocks, "_direct_read", lambda fd, view, offset: direct.append(offset // MB) or real(fd, view, offset)
    )
    reading = start(tmp_path, [file], MB)
    assert reading.wait("x") == (tmp_path / "x").read_bytes()
    reading.close()
    assert sorted(direct) == [1, 2, 4, 5, 6, 7]


@pytest.mark.parametrize("refuses", ["at the open", "at the read", "after a part"])
def test_a_mount_that_refuses_direct_reads_is_read_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    if refuses == "at the open":
        monkeypatch.setattr(blocks, "_reopened_direct", lambda fd: None)
    else:
        part = 8192 if refuses == "after a part" else 0
        monkeypatch.setattr(
            blocks,
            "_direct_read",
            lambda fd, view, offset: os.preadv(fd, [view[:part]], offset) if part and offset % MB == 0 else -1,
        )
    file = write(tmp_path, "x", 8 * MB + 5, MB)
    evict(tmp_path / "x")
    reading = start(tmp_path, [file], MB)
    assert reading.wait("x") == (tmp_path / "x").read_bytes()
    reading.close()


def test_through_a_ring_any_size_needs_the_same_memory(tmp_path: Path, beside: bool) -> None:
    files = [write(tmp_path, f"{i}.safetensors", 5 * MB + i, MB) for i in range(4)]
    small = write(tmp_path, "config.json", 100, MB)
    reading = start(tmp_path, [small, *files], MB, beside=beside, ring_bytes=4 * MB)
    got = {file.path: bytearray(file.size_bytes) for file in (small, *files)}
    memories = set()
    while (arrival := reading.next_arrival(wait=True)) is not None:
        got[arrival.path][arrival.offset : arrival.offset + arrival.length] = reading.view(arrival)
        memory, _offset, _block_bytes = reading.memory_behind(arrival)
        memories.add((id(memory), len(memory)))
        reading.release(arrival)
    reading.wait_all()
    for path, data in got.items():
        assert data == (tmp_path / path).read_bytes()
    assert sorted(length for _id, length in memories) == [4096, 4 * MB], "one for the small file, and the ring"
    assert reading.memory("config.json")
    with pytest.raises(ValueError, match="ring"):
        reading.memory("0.safetensors")
    reading.close()


def test_a_slot_is_not_filled_again_before_its_release(tmp_path: Path, beside: bool) -> None:
    file = write(tmp_path, "x.safetensors", 32 * MB, MB)
    data = (tmp_path / "x.safetensors").read_bytes()
    reading = start(tmp_path, [file], MB, beside=beside, ring_bytes=4 * MB)
    held = [reading.next_arrival(wait=True) for _ in range(4)]
    time.sleep(0.2)
    assert reading.next_arrival(wait=False) is None, "there were only four slots"
    for arrival in held:
        assert arrival is not None
        assert reading.view(arrival) == data[arrival.offset : arrival.offset + arrival.length]
        reading.release(arrival)
    assert reading.next_arrival(wait=True) is not None
    reading.close()


def test_a_flipped_bit_is_found_and_placed(tmp_path: Path, beside: bool) -> None:
    files = [write(tmp_path, "fine", 3 * BLOCK), write(tmp_path, "bad", 5 * BLOCK)]
    data = bytearray((tmp_path / "bad").read_bytes())
    data[3 * BLOCK + 17] ^= 4
    (tmp_path / "bad").write_bytes(data)
    reading = start(tmp_path, files, beside=beside)
    with pytest.raises(DigestMismatch, match=f"bad differs from the published bytes at byte {3 * BLOCK}"):
        reading.wait("bad")
    with pytest.raises(DigestMismatch):
        reading.wait_all()
    with pytest.raises(DigestMismatch):
        reading.next_arrival(wait=True)
    assert isinstance(reading.damage(), DigestMismatch)
    reading.close()
    assert isinstance(reading.damage(), DigestMismatch), "closing hides nothing"


def test_without_verification_the_bytes_come_as_they_are(tmp_path: Path, beside: bool) -> None:
    file = write(tmp_path, "bad", 2 * BLOCK)
    (tmp_path / "bad").write_bytes(bytes(2 * BLOCK))
    reading = start(tmp_path, [file], verify=False, beside=beside)
    assert reading.wait("bad") == bytes(2 * BLOCK)
    reading.close()


def test_a_file_that_shrank_is_found(tmp_path: Path, beside: bool) -> None:
    file = write(tmp_path, "short", 2 * BLOCK)
    os.truncate(tmp_path / "short", BLOCK + 1)
    reading = start(tmp_path, [file], beside=beside)
    with pytest.raises(DigestMismatch, match="ends early"):
        reading.wait("short")
    reading.close()


def test_a_volume_that_fails_is_an_oserror_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_arguments: Any) -> int:
        raise OSError(5, "Input/output error")

    file = write(tmp_path, "x", 2 * BLOCK)
    monkeypatch.setattr(os, "preadv", fails)
    reading = start(tmp_path, [file])
    with pytest.raises(OSError, match="Input/output error") as caught:
        reading.wait("x")
    assert caught.value.errno == 5
    assert "check the volume" in str(reading.damage())
    reading.close()


def test_a_missing_file_and_a_link_are_refused_before_anything_is_read(tmp_path: Path, beside: bool) -> None:
    file = write(tmp_path, "real", BLOCK)
    (tmp_path / "link").symlink_to("real")
    for name in ("missing", "link"):
        with pytest.raises(SnapshotNotFound):
            start(tmp_path, [file, FileRecord(name, BLOCK, "0" * 64, file.blocks)], beside=beside)


def test_a_file_deleted_after_the_open_is_read_to_the_end(tmp_path: Path, beside: bool) -> None:
    file = write(tmp_path, "x", 24 * MB, MB)
    data = (tmp_path / "x").read_bytes()
    evict(tmp_path / "x")
    reading = start(tmp_path, [file], MB, beside=beside)
    (tmp_path / "x").unlink()
    assert reading.wait("x") == data
    reading.close()


def test_no_descriptor_and_no_thread_is_left(tmp_path: Path, beside: bool) -> None:
    def left() -> int:
        return len(os.listdir("/proc/self/fd")) + len(os.listdir("/proc/self/task"))

    before = left()
    for index in range(20):
        file = write(tmp_path, f"f{index}", BLOCK if index % 2 else 5 * MB)
        reading = start(tmp_path, [file], beside=beside)
        if index % 3:
            reading.wait_all()
        reading.close()
        reading.close()
        del reading
    until = time.monotonic() + 60
    while left() > before and time.monotonic() < until:  # a thread that was joined is a task for a moment more
        time.sleep(0.01)
    assert left() <= before


def test_a_reader_process_that_is_killed_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    before = children()
    file = write(tmp_path, "x.safetensors", 32 * MB, MB)
    reading = start(tmp_path, [file], MB, beside=True, ring_bytes=4 * MB)
    assert reading.next_arrival(wait=True) is not None
    (pid,) = set(children()) - set(before)
    os.kill(int(pid), signal.SIGKILL)
    with pytest.raises(OSError, match="the reader process was ended by SIGKILL"):
        reading.wait_all()
    reading.close()
    assert children() == before


def test_threads_read_if_no_process_can_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_arguments: Any, **_keywords: Any) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "posix_spawn", refused)
    file = write(tmp_path, "x", 3 * BLOCK)
    reading = start(tmp_path, [file], beside=True)
    assert reading.wait("x") == (tmp_path / "x").read_bytes()
    reading.close()
    assert "threads read instead" in caplog.text


def test_threads_read_if_no_memory_can_be_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forbidden(_name: str, _flags: int = 0) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    file = write(tmp_path, "a", 3 * BLOCK + 5)
    reading = start(tmp_path, [file], beside=True)
    assert reading.wait("a") == (tmp_path / "a").read_bytes()
    assert reading.descriptor("a") == -1, "a server reads the volume then"
    assert "threads read instead" in caplog.text
    reading.close()


@pytest.mark.parametrize("room", [0, 8])
def test_the_limit_of_open_files_is_raised_or_named(tmp_path: Path, room: int) -> None:
    """In a process of its own, which may open few files; `room`: how far it may raise that."""
    code = f"""
import os, resource, sys
sys.path.insert(0, {str(Path.cwd())!r})
from pathlib import Path
from modelstore.load.reader import _open_all
from tests.support.readings import write
folder = Path({str(tmp_path)!r})
records = [write(folder, str(number), 10) for number in range(6)]
used = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2, used + 2 + {room}))
print(len(_open_all(folder, records)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == ("6" if room else ""), done.stderr
    assert ("ulimit -n" in done.stderr) == (not room)


def test_the_reader_process_ends_with_the_worker_in_every_case(tmp_path: Path) -> None:
    write(tmp_path, "x.safetensors", 32 * MB, MB)
    code = f"""
import os, sys, time
from pathlib import Path
from modelstore.volume.manifest import FileRecord
from modelstore.load.reader import Reading
reading = Reading(beside=True, ring_bytes=4 << 20)
reading.add(Path({str(tmp_path)!r}), [FileRecord("x.safetensors", 32 << 20, "", "")], block_bytes=1 << 20)
reading.next_arrival(wait=True)
print(Path(f"/proc/self/task/{{os.getpid()}}/children").read_text(), flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        reader = Path("/proc", worker.stdout.readline().strip())
        assert b"blocks.py" in (reader / "cmdline").read_bytes()
        worker.kill()
    deadline = time.monotonic() + 60
    while reader.exists() and "Z" not in (reader / "status").read_text().split("State:")[1][:4]:
        assert time.monotonic() < deadline, "the reader outlived its worker"
        time.sleep(0.01)


@pytest.mark.parametrize("beside", [False, True])
def test_a_full_ring_holds_up_no_file_with_memory_of_its_own(tmp_path: Path, beside: bool) -> None:
    weights = write(tmp_path, "0.safetensors", 9 * MB, MB)
    small = write(tmp_path, "config.json", 100, MB)
    reading = start(tmp_path, [weights, small], MB, beside=beside, ring_bytes=4 * MB)
    assert reading.wait("config.json") == (tmp_path / "config.json").read_bytes(), "nobody takes blocks from the ring"
    reading.close()


def test_a_reader_that_breaks_is_an_error_and_not_a_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(blocks.BlockReader, "_read", broken)
    monkeypatch.setattr(threading, "excepthook", lambda _arguments: None)
    reading = start(tmp_path, [write(tmp_path, "x", 3 * MB, MB)], MB)
    with pytest.raises(OSError, match="Input/output error"):
        reading.wait("x")
    reading.close()


def rates(pace: ReadConcurrency, rate_of: dict[int, float], *, seconds: float) -> list[int]:
    """What `pace` asks for over time, on a volume that gives `rate_of[reads at once]` blocks of 1 MB a second."""
    now, seen = 0.0, [pace.readers]
    while now < seconds:
        now += 1 / rate_of[pace.readers]
        pace.note_read(1_000_000, now)
        if seen[-1] != pace.readers:
            seen.append(pace.readers)
    return seen


def test_more_reads_at_once_as_long_as_that_is_faster() -> None:
    latency_bound = {1: 25.0, 2: 50.0, 4: 100.0, 8: 200.0, 16: 400.0}
    assert rates(ReadConcurrency(4), latency_bound, seconds=5) == [4, 8, MOST_AT_ONCE]
    one_disk = dict.fromkeys((1, 2, 4, 8, 16), 300.0)
    assert rates(ReadConcurrency(4), one_disk, seconds=2) == [4, 8, 4], "it was tried, and taken back"
    assert rates(ReadConcurrency(4), one_disk, seconds=30).count(8) > 1, "and tried again later"


def test_a_stretch_of_the_page_cache_is_no_slow_volume() -> None:
    pace, now = ReadConcurrency(4), 0.0
    per_reader = {4: 100.0, 8: 200.0, MOST_AT_ONCE: 400.0}
    for number in range(2000):
        if number in (150, 400):
            now += 5.0  # of copies
            pace.note_read(1_000_000, now, is_copy=True)
        now += 1 / per_reader[pace.readers]
        before = pace.readers
        pace.note_read(1_000_000, now)
        assert pace.readers >= before, "every trial was faster"
    assert pace.readers == MOST_AT_ONCE


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another account")
def test_the_page_cache_is_not_known_to_those_who_may_not_write(tmp_path: Path) -> None:
    """To them the kernel says that all of a file is in it."""
    write(tmp_path, "0.safetensors", 5 * MB, MB)
    (tmp_path / "0.safetensors").chmod(0o644)
    fd = os.open(tmp_path / "0.safetensors", os.O_RDONLY)
    pid = os.fork()
    if not pid:
        code = 2
        try:
            os.setuid(65534)
            code = int(CachedPages(fd, 5 * MB).contain(0, 5 * MB))
        finally:  # without an exit the child would go on with the other tests
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    os.close(fd)


def test_blocks_of_the_page_cache_are_copied_by_most_processors_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, readers in ((2, 4), (8, 6), (16, 12), (64, MOST_AT_ONCE)):
        monkeypatch.setattr(processors, "processors", lambda count=count: count)
        pace = ReadConcurrency(4)
        assert pace.note_cached_block() == (readers != 4)
        assert pace.readers == readers
        assert not pace.note_cached_block(), "once"
        assert not any(pace.note_read(1_000_000, now / 1000, is_copy=True) for now in range(10_000)), "no trial of more"
        full = dict.fromkeys(range(1, MOST_AT_ONCE + 1), 3000.0)
        assert max(rates(pace, full, seconds=10)) <= MOST_AT_ONCE, "the blocks that come from the volume are"


def test_the_page_cache_is_asked_for_each_block(tmp_path: Path) -> None:
    file = write(tmp_path, "0.safetensors", 5 * MB + 100, MB)
    fd = os.open(tmp_path / "0.safetensors", os.O_RDONLY)
    try:
        pages = CachedPages(fd, file.size_bytes)
        assert pages.contain(0, 5 * MB)
        assert pages.contain(5 * MB, 100), "also of a page that the file does not fill"
        evict(tmp_path / "0.safetensors")
        assert not any(pages.contain(n * MB, MB) for n in range(5))
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(fd, 2 * MB, MB)
        assert [pages.contain(n * MB, MB) for n in range(5)] == [False, True, True, False, False]
        assert pages.contain(MB, 2 * MB)
        assert not pages.contain(MB, 3 * MB)
    finally:
        os.close(fd)
    assert not CachedPages(-1, MB).contain(0, MB), "no, if it cannot be told"
