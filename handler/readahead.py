"""The files that a start opens, asked of the kernel ahead of the imports that wait for them one by one.

    python -m handler.readahead          start the worker of the environment, and record the files that it opened
    python -I -S readahead.py RECORD     ask for all that was recorded; `begin` runs this beside a start

A worker that lands on a host for the first time reads some thousand files from a cold disk. The record lies in the
Python environment (see `record_path`), a line for each range: offset, length, and the path from the environment's
root. It names whole files of byte-code, and of shared libraries only the ranges that were touched: those of CUDA have
gigabytes.

The reader is a process of its own, with the standard library alone: threads would wait for the interpreter's lock,
which the imports hold. If a few of the files are in the page cache already, it ends at once. Nothing depends on it:
without a record, or on a system that refuses anything, a start only takes its time.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import threading
from collections.abc import Iterable, Iterator

_RECORD = "share/modelstore/start-files"
_THREADS = 8
_PROBED_FILES = 20
_GAP_PAGES = 64  # between two touched ranges of a library: to leave it out would not be worth a request
_PRESENT = 1 << 63  # of a page, in /proc/PID/pagemap

Range = tuple[int, int, str]
"""Offset and length in bytes, and a path."""


def record_path() -> str:
    """The place of the record in this environment."""
    return os.path.join(sys.prefix, _RECORD)


def begin() -> None:
    """Ask the kernel for the files of a start, if they were recorded, in a process that ends by itself."""
    record = record_path()
    if not os.path.exists(record):
        return
    from modelstore.environment import bare_environment  # not above: the reader has the standard library alone

    program = [sys.executable, "-I", "-S", __file__, record]
    with contextlib.suppress(OSError):  # nothing depends on it
        pid = os.posix_spawn(sys.executable, program, bare_environment())
        threading.Thread(target=os.waitpid, args=(pid, 0), name="readahead", daemon=True).start()


def ask_for(ranges: list[Range], folder: str) -> None:
    """Ask the kernel for ranges of files below a folder; those that are gone are left out."""
    remaining = iter(ranges)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                each = next(remaining, None)
            if each is None:
                return
            offset, length, path = each
            try:
                fd = os.open(os.path.join(folder, path), os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            with contextlib.suppress(OSError):
                os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)
            os.close(fd)

    threads = [threading.Thread(target=work) for _ in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def are_cached(ranges: Iterable[Range], folder: str) -> bool:
    """Whether all of these lie in the page cache; no, if that cannot be told."""
    import ctypes

    mincore = ctypes.CDLL(None).mincore
    for offset, length, path in ranges:
        try:
            with open(os.path.join(folder, path), "rb") as file:
                begin = offset - offset % mmap.PAGESIZE
                window = mmap.mmap(file.fileno(), offset + length - begin, flags=mmap.MAP_PRIVATE, offset=begin)
        except (OSError, ValueError):
            return False
        pages = ctypes.create_string_buffer(-(-len(window) // mmap.PAGESIZE))
        start = ctypes.c_char.from_buffer(window)
        failed = mincore(ctypes.byref(start), ctypes.c_size_t(len(window)), pages)
        if failed or b"\0" in pages.raw:
            return False
    return True


def read_record(path: str) -> list[Range]:
    """The ranges of a record. Raises OSError and ValueError."""
    with open(path) as file:
        fields = (line.rstrip("\n").split(" ", 2) for line in file)
        return [(int(offset), int(length), name) for offset, length, name in fields]


def files_in_use() -> list[Range]:
    """The byte-code of all modules that this process has imported, and the parts of libraries that it has touched; the
    files below the environment's root, the parts of libraries first."""
    code = {
        str(path)
        for module in list(sys.modules.values())
        for path in (getattr(getattr(module, "__spec__", None), "cached", None),)
        if path and os.path.exists(path)
    }
    ranges = [*touched_parts("/proc/self/maps", "/proc/self/pagemap")]
    ranges += [(0, os.path.getsize(path), path) for path in sorted(code)]
    root = os.path.join(sys.prefix, "")
    return [(offset, length, path.removeprefix(root)) for offset, length, path in ranges if path.startswith(root)]


def touched_parts(maps: str, pagemap: str) -> Iterator[Range]:
    """The ranges of mapped files whose pages a process has in memory; see proc(5)."""
    import numpy as np

    with open(maps) as lines, open(pagemap, "rb") as entries:
        for line in lines:
            fields = line.split(maxsplit=5)
            if len(fields) < 6 or not fields[5].startswith("/") or ".so" not in fields[5]:
                continue
            first, last = (int(address, 16) // mmap.PAGESIZE for address in fields[0].split("-"))
            entries.seek(first * 8)
            touched = np.flatnonzero(np.frombuffer(entries.read((last - first) * 8), "<u8") & np.uint64(_PRESENT))
            file_offset, path = int(fields[2], 16), fields[5].rstrip("\n")
            end_of_file = os.path.getsize(path) if os.path.exists(path) else 0
            for run in np.split(touched, np.flatnonzero(np.diff(touched) > _GAP_PAGES) + 1):
                if len(run):
                    begin, end = int(run[0]) * mmap.PAGESIZE, (int(run[-1]) + 1) * mmap.PAGESIZE
                    length = min(file_offset + end, end_of_file) - file_offset - begin
                    if length > 0:
                        yield file_offset + begin, length, path


def record_start() -> None:
    """Start the worker of this environment, and write the record of the files that it opened."""
    from handler.__main__ import start

    start()
    ranges = files_in_use()
    os.makedirs(os.path.dirname(record_path()), exist_ok=True)
    with open(record_path(), "w") as file:
        file.writelines(f"{offset} {length} {path}\n" for offset, length, path in ranges)
    total = sum(length for _offset, length, _path in ranges)
    print(f"{len(ranges)} ranges, {total / 1e6:.0f} MB, recorded in {record_path()}", file=sys.stderr)


def main() -> None:
    try:
        ranges, folder = read_record(sys.argv[1]), os.path.dirname(sys.argv[1]).removesuffix(os.path.dirname(_RECORD))
        if not are_cached(ranges[-_PROBED_FILES:], folder):  # byte-code, which was read as a whole
            ask_for(ranges, folder)
    except (OSError, ValueError):
        sys.exit(1)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main()
    else:
        record_start()
