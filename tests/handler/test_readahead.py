"""The files of a start are recorded once, and asked of the kernel ahead of the next one."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from handler import readahead
from handler.readahead import are_cached, ask_for, read_record, touched_parts
from tests.support.models import write_model

MB = 1 << 20


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A file that is not in the page cache."""
    path = tmp_path / "lib.so"
    path.write_bytes(os.urandom(4 * MB))
    evict(path)
    return path


def evict(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def wait_until_cached(path: Path, offset: int, length: int) -> None:
    deadline = time.monotonic() + 60
    while not are_cached([(offset, length, path.name)], str(path.parent)):
        assert time.monotonic() < deadline, "it was not read"
        time.sleep(0.01)


def test_ranges_are_brought_into_the_page_cache(library: Path) -> None:
    folder = str(library.parent)
    assert not are_cached([(0, 4 * MB, "lib.so")], folder)
    ask_for([(0, MB, "gone.so"), (3 * MB + 5, MB - 5, "lib.so")], folder)
    wait_until_cached(library, 3 * MB + 5, MB - 5)
    assert not are_cached([(0, MB, "lib.so")], folder), "no more than was asked for"
    assert not are_cached([(0, 1, "gone.so")], folder)


def test_a_start_asks_for_what_was_recorded_and_leaves_no_process(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    readahead.begin()  # without a record nothing happens
    record = Path(readahead.record_path())
    record.parent.mkdir(parents=True)
    record.write_text("0 4194304 lib.so\n0 1 name with spaces.pyc\n")
    assert read_record(str(record)) == [(0, 4 * MB, "lib.so"), (0, 1, "name with spaces.pyc")]
    readahead.begin()
    wait_until_cached(library, 0, 4 * MB)
    deadline = time.monotonic() + 60
    while "readahead.py" in "".join(command_lines()):
        assert time.monotonic() < deadline, "it did not end"
        time.sleep(0.01)


def command_lines() -> list[str]:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    lines = []
    for pid in children:
        try:
            lines.append(Path(f"/proc/{pid}/cmdline").read_text())
        except OSError:
            continue
    return lines


@pytest.mark.parametrize("text", ["", "a b c\n", "0\n", "\0\0\n"])
def test_a_damaged_record_hinders_nobody(text: str, tmp_path: Path) -> None:
    record = tmp_path / "start-files"
    record.write_text(text)
    program = [sys.executable, "-I", "-S", readahead.__file__, str(record)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=240)
    assert done.returncode == (1 if text else 0)
    assert done.stderr == ""


def test_of_a_library_the_parts_are_recorded_that_were_touched() -> None:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    parts = [each for each in touched_parts("/proc/self/maps", "/proc/self/pagemap") if each[2] == str(library)]
    assert parts
    assert 0 < sum(length for _offset, length, _path in parts) < library.stat().st_size
    assert max(offset + length for offset, length, _path in parts) < library.stat().st_size + mmap.PAGESIZE


def test_a_start_is_recorded_with_its_byte_code(tmp_path: Path, store_env: dict[str, str]) -> None:
    """In an environment of links, so that the record does not land in the one that runs the tests."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", venv], check=True)
    packages = next((venv / "lib").glob("python3*/site-packages"))
    own = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    for entry in own.iterdir():
        if not (packages / entry.name).exists():
            (packages / entry.name).symlink_to(entry)
    write_model(tmp_path / "model", seed=1)
    env = {**os.environ, **store_env, "MODEL_ID": f"file://{tmp_path}/model", "MODELSTORE_OFFLINE": "1"}
    root = Path(readahead.__file__).parent.parent
    done = subprocess.run(
        [venv / "bin/python", "-m", "handler.readahead"],
        env={**env, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    ranges = read_record(str(venv / "share/modelstore/start-files"))
    code = [path for _offset, _length, path in ranges if path.endswith(".pyc")]
    assert any("torch/__pycache__/__init__" in path for path in code)
    assert any("modeling_llama" in path for path in code), "also of the model's own class"
