"""The trials of a volume: what one mount of it does, and what two mounts show of each other.

Each trial works in a folder of its own. A trial that goes as it should is a `yes`; `capabilities.py` knows what a `yes`
of one mount is worth.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from modelstore.errors import ModelStoreError, ReadOnlyVolume
from modelstore.volume import durable, tree

Answer = Literal["yes", "no", "unproven"]
Finding = tuple[Answer, str]
"""The answer to a trial, and what was seen."""
Trial = Callable[[Path], str]
"""Works in a folder; returns what went otherwise than it should, empty if nothing did."""

FRESH_S = 1.0  # a write is seen by another host within this time
_LOOK_FOR_S = 12.0
_RACES = 12
_PART = 4096


def on_one_mount(folder: Path) -> dict[str, Finding]:
    """The findings of each trial that needs one mount, by the capability's name, in a folder of the volume. Raises
    NoSpace and RootUnusable if nothing can be written, FileNotFoundError if the folder is removed meanwhile."""
    return {name: _tried(trial, folder) for name, trial in _TRIALS.items()}


def on_two_mounts(folder: Path, other: Path) -> dict[str, Finding]:
    """The findings of the trials that need two mounts, which show the same folder. Raises ReadOnlyVolume if the other
    one is not of this volume."""
    if _seconds_until(other.is_dir) is None:
        raise ReadOnlyVolume(
            f"{other.parent.parent} does not show within {_LOOK_FOR_S:g} s what is written here: name the store's "
            "folder on another mount of this volume"
        )
    findings: dict[str, Finding] = {}
    both = sum(_raced(folder / f"race-{number}", other / f"race-{number}") for number in range(_RACES))
    findings["exclusive_create"] = (
        ("no", f"{both} of {_RACES} files were created by both mounts") if both else ("yes", f"{_RACES} races")
    )
    durable.write_atomic(folder / "name", b"1")
    findings["fresh_names"] = _fresh(_seconds_until(lambda: "name" in tree.names(other)), "seen")
    data = os.urandom(3 * _PART)
    durable.write_atomic(folder / "bytes", data)
    findings["fresh_bytes"] = _fresh(_seconds_until(lambda: _reads(other / "bytes", data)), "read")
    findings["locks"] = _locked_across(folder, other)
    return findings


def _tried(trial: Trial, folder: Path) -> Finding:
    place = folder / trial.__name__.strip("_")
    try:
        durable.make_folder(place)
        problem = trial(place)
    except FileNotFoundError:
        if not folder.is_dir():  # the trash was emptied
            raise
        return "no", "a file that was made is not there"
    except ModelStoreError as error:
        if error.exit_code != 1:
            raise
        return "no", getattr(error.__cause__, "strerror", None) or str(error)
    except OSError as error:
        return "no", error.strerror or str(error)
    return ("no" if problem else "yes"), problem


def _exclusive_create(place: Path) -> str:
    """A second creation is refused while the first file is still open."""
    first = durable.open_for_write(place / "claim", exclusive=True)
    try:
        os.close(durable.open_for_write(place / "claim", exclusive=True))
    except FileExistsError:
        return ""
    finally:
        os.close(first)
    return "the same file was created twice"


def _refused_rename(place: Path) -> str:
    for name in ("staged", "published"):
        durable.make_folder(place / name)
        durable.write_atomic(place / name / "file", name.encode())
    try:
        durable.rename(place / "staged", place / "published")
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return ""
        raise
    return "a folder was replaced by a rename"


def _random_writes(place: Path) -> str:
    path, parts = place / "file", [bytes([number]) * _PART for number in range(1, 5)]
    fd = durable.open_for_write(path)
    try:
        durable.set_size(fd, len(parts) * _PART, path=path)
        for number in (2, 0, 3, 1):
            durable.write_at(fd, parts[number], number * _PART, path=path)
        durable.sync(fd, path=path)
    finally:
        durable.close(fd, path=path)
    durable.rename(path, place / "renamed")
    return "" if durable.read_file(place / "renamed") == b"".join(parts) else "it reads back otherwise"


def _hard_links(place: Path) -> str:
    durable.write_atomic(place / "one", b"1")
    durable.link(place / "one", place / "two")
    return "" if durable.read_file(place / "two") == b"1" else "the second name shows other bytes"


def _locks(place: Path) -> str:
    """Two openings of one file exclude each other as two processes do."""
    durable.write_atomic(place / "lock", b"1")
    first, second = (durable.open_for_read(place / "lock") for _each in range(2))
    try:
        return "" if _excludes(first, second) else "a lock that is held is taken again"
    finally:
        os.close(first)
        os.close(second)


def _excludes(first: int, second: int) -> bool:
    """Whether a lock on the first descriptor is seen by the second. Raises OSError if there are no locks."""
    fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _fresh(seconds: float | None, verb: str) -> Finding:
    if seconds is None:
        return "no", f"not {verb} by the other mount within {_LOOK_FOR_S:g} s"
    return ("yes" if seconds <= FRESH_S else "no"), f"{verb} by the other mount after {seconds:.2f} s"


def _reads(path: Path, data: bytes) -> bool:
    try:
        return durable.read_file(path) == data
    except OSError:
        return False


def _seconds_until(is_so: Callable[[], bool]) -> float | None:
    """How long it takes; None if it takes too long."""
    began = time.monotonic()
    while not is_so():
        if time.monotonic() - began > _LOOK_FOR_S:
            return None
        time.sleep(0.002)
    return time.monotonic() - began


def _raced(path: Path, other: Path) -> bool:
    """Whether both mounts create the same file at the same time, each while the other still has it open."""
    barrier, fds = threading.Barrier(2), [-1, -1]

    def create(number: int, name: Path) -> None:
        barrier.wait()
        with suppress(OSError, ModelStoreError):
            fds[number] = durable.open_for_write(name, exclusive=True)

    threads = [threading.Thread(target=create, args=each) for each in enumerate((path, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for fd in fds:
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)
    return all(fd >= 0 for fd in fds)


def _locked_across(folder: Path, other: Path) -> Finding:
    durable.write_atomic(folder / "across", b"1")
    if _seconds_until(lambda: (other / "across").exists()) is None:
        return "no", "the other mount does not see the file"
    try:
        first, second = durable.open_for_read(folder / "across"), durable.open_for_read(other / "across")
    except OSError as error:
        return "no", error.strerror or str(error)
    try:
        return ("yes", "seen by the other mount") if _excludes(first, second) else ("no", "not seen by the other mount")
    except OSError as error:
        return "no", error.strerror or str(error)
    finally:
        os.close(first)
        os.close(second)


_TRIALS: Mapping[str, Trial] = {
    "exclusive_create": _exclusive_create,
    "refused_rename": _refused_rename,
    "random_writes": _random_writes,
    "hard_links": _hard_links,
    "locks": _locks,
}
