"""Changing the volume: the package's only caller of write, fsync, rename, link, unlink and mkdir.

Guaranteed: `write_atomic` leaves the old file or the new one, never a part; after `publish_folder` returns, the
folder and all it holds survive a crash. Not guaranteed: writes before an fsync may be seen late or never by another
mount (MooseFS shows size 0 until the writer flushes), and no lock is taken here.

Another user of the volume may have put anything at a path. So links are never followed at the last
component, opening waits for nothing (a named pipe), and only regular files are written, or read as a whole, those up to
a size that its kind of record can have.

A full volume or quota is NoSpace wherever it shows (MooseFS reports it at fsync or close, too); a root that cannot be
written is RootUnusable. Every path must come from `layout.py`.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from modelstore.errors import ModelStoreError, NoSpace, RootUnusable, UnsafeName
from modelstore.volume.tree import check_no_links, once_more, unreadable

_SYNC_FILE_RANGE_WRITE = 2  # of linux/fs.h
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_UNUSABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ELOOP})
_NO_FILE_OF_OURS = frozenset({errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENXIO})
_FOREIGN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # for every open: another user may have put anything there
_FILE_MODE = 0o644
_STALE_ATTEMPTS = 3
_STALE_S = 1.0
RECORD_BYTES = 1 << 20  # no alias, ref, pin or record of a start is as large
MANIFEST_BYTES = 64 << 20  # 16 hex digits for each block of 8 MiB: 32 TB
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def mapped_errors(path: Path) -> Iterator[None]:
    """Turn an OSError on `path` into the package's own if it means a full or an unusable volume."""
    try:
        yield
    except OSError as error:
        raise _own_error(error, path) from error


def _own_error(error: OSError, path: Path) -> ModelStoreError | OSError:
    if error.errno == errno.ENOSPC and _has_no_inodes(path):
        return NoSpace(f"no inodes are left for {path}, though there may be space: remove files, or a model")
    if error.errno in _FULL:
        return NoSpace(f"no space for {path}: {error.strerror}; free some, raise the quota, or remove a model")
    if error.errno in _UNUSABLE:
        return _unusable(error, path)
    if error.filename is None:  # of a call on a descriptor
        error.filename = str(path)
    return error


def _has_no_inodes(path: Path) -> bool:
    """Whether the file system takes no more files; one that does not count them says that it has none at all."""
    try:
        state = os.statvfs(next(folder for folder in path.parents if folder.exists()))
    except OSError:
        return False
    return state.f_files > 0 and state.f_favail == 0


def _unusable(error: OSError, path: Path) -> RootUnusable:
    return RootUnusable(f"cannot write {path}: {error.strerror}; mount the volume writable, or set MODELSTORE_ROOT")


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents if they are missing. Raises NoSpace, or RootUnusable for all else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise (_own_error(error, folder) if error.errno in _FULL else _unusable(error, folder)) from error


def open_for_write(path: Path, *, exclusive: bool = False) -> int:
    """Open `path` for reading and writing, created if missing, never truncated; returns the descriptor.

    `exclusive`: fail with FileExistsError if it exists; this is the one election that holds on MooseFS.
    """
    return _open_regular(path, os.O_RDWR | os.O_CREAT | (os.O_EXCL if exclusive else 0))


def _open_regular(path: Path, flags: int) -> int:
    """Open a file to change it. Raises UnsafeName if something else than a regular file lies there."""
    with mapped_errors(path):
        try:
            fd = os.open(path, flags | _FOREIGN, _FILE_MODE)
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.EISDIR):  # a pipe without a reader, a socket, a folder
                raise _not_regular(path) from error
            raise
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise _not_regular(path)
        return fd


def _not_regular(path: Path) -> UnsafeName:
    return UnsafeName(f"{path} is no regular file: remove it, it was put there by hand")


def open_for_read(path: Path) -> int:
    """Open a regular file; a link, a folder, a pipe or a device in its place is an OSError, at once."""
    fd = once_more(lambda: os.open(path, os.O_RDONLY | _FOREIGN))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return fd


def read_file(path: Path, limit_bytes: int = RECORD_BYTES) -> bytes:
    """The bytes of a regular file; one that is larger than `limit_bytes` is an OSError."""
    return read_with_state(path, limit_bytes).data


def read_record(path: Path, limit_bytes: int = RECORD_BYTES) -> bytes | None:
    """The bytes of a record of the store; None if there is none, or if something is in its place that no store writes:
    a folder, a link, a pipe or a file too large, which is a warning.

    Raises RootUnusable if it is there, or may be, and cannot be read: that is not the same as no record.
    """
    try:
        return read_file(path, limit_bytes)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if not is_no_file_of_ours(error):
            raise unreadable(error, path) from error
        logger.warning("%s is passed over: it is no file of the store (%s)", path, error.strerror)
        return None


def is_no_file_of_ours(error: OSError) -> bool:
    """Whether an open failed because something is there that no store writes, such as a folder, a link or a pipe."""
    return error.errno in _NO_FILE_OF_OURS


class Contents(NamedTuple):
    """A small file as it was read, and its state then."""

    data: bytes
    state: os.stat_result


def read_with_state(path: Path, limit_bytes: int = RECORD_BYTES) -> Contents:
    """The same, and the state of the file that was read, which asks the file system nothing more."""
    return once_more(lambda: _read_with_state(path, limit_bytes))


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """The descriptor of a regular file, open for reading. Errors are those of `open_for_read`."""
    fd = open_for_read(path)
    try:
        yield fd
    finally:
        os.close(fd)


def _read_with_state(path: Path, limit_bytes: int) -> Contents:
    with opened(path) as fd:
        state = os.fstat(fd)
        size = state.st_size + 1  # asked for more than it believes to have, a file system looks again
        remaining = limit_bytes + 1
        parts = []
        while state.st_size <= limit_bytes and remaining and (part := os.read(fd, min(remaining, size))):
            parts.append(part)
            remaining -= len(part)
        if state.st_size > limit_bytes or not remaining:
            raise OSError(errno.EINVAL, f"larger than {limit_bytes} bytes, which no such file is", str(path))
        return Contents(b"".join(parts), state)


def write_at(fd: int, data: bytes | bytearray | memoryview, offset: int, *, path: Path) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data).cast("B")
    with mapped_errors(path):
        while view:
            written = os.pwrite(fd, view, offset)
            view = view[written:]
            offset += written


def set_size(fd: int, size_bytes: int, *, path: Path) -> None:
    """Give the file its final size; if it has that size already, nothing happens."""
    with mapped_errors(path):
        if os.fstat(fd).st_size != size_bytes:
            os.ftruncate(fd, size_bytes)


def sync(fd: int, *, path: Path) -> None:
    """Wait until the file's bytes are on the volume."""
    with mapped_errors(path):
        os.fsync(fd)


def begin_sync(fd: int, offset: int, length: int) -> None:
    """Have the kernel begin to write those of these bytes that it only keeps in memory, so that `sync` has less to wait
    for. They stay in the page cache. An error shows at `sync`; a system without such a call does nothing."""
    begin = _sync_file_range()
    if begin is not None:
        begin(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


@cache
def _sync_file_range() -> Any:
    import ctypes  # few commands write so much

    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


def close(fd: int, *, path: Path) -> None:
    """Close a file that was written: MooseFS may say only now that the volume is full."""
    with mapped_errors(path):
        os.close(fd)


def sync_path(path: Path) -> None:
    """`sync` for a path: a file's bytes, or a folder's entries."""
    with mapped_errors(path):
        fd = os.open(path, os.O_RDONLY | _FOREIGN)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `path` whole: a temporary file of its own beside it, fsync, rename over it."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # process ids repeat from container to container
    make_folder(path.parent)
    fd = open_for_write(temporary, exclusive=True)
    try:
        try:
            write_at(fd, data, 0, path=temporary)
            set_size(fd, len(data), path=temporary)
            sync(fd, path=temporary)
        finally:
            close(fd, path=temporary)
        rename(temporary, path)
    except BaseException:
        with suppress(ModelStoreError, OSError):
            remove_file(temporary)
        raise
    sync_path(path.parent)


def is_temporary(name: str) -> bool:
    """Whether `write_atomic` gave this name to a file, and was killed before it was done."""
    return _TEMPORARY.fullmatch(name) is not None


def rename(source: Path, target: Path) -> None:
    """Rename, replacing a file at `target`."""
    with mapped_errors(target):
        os.rename(source, target)


def publish_folder(source: Path, target: Path) -> bool:
    """Make the folder `source` appear as `target` in one step; False if a non-empty `target` was there first.

    `rename(2)` refuses a non-empty target (ENOTEMPTY, or EEXIST on some file systems), on MooseFS as elsewhere, so a
    second publisher cannot replace the first. Everything in `source` must have been synced.
    """
    make_folder(target.parent)
    sync_path(source)
    try:
        rename(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    sync_path(target.parent)
    return True


def complete_folder(source: Path, target: Path, *, last: str) -> None:
    """Move each file of the folder `source` to its place below `target`, over what is there, the file `last` at the
    end. A file that is there already, by a second name, stays. Everything in `source` must have been synced."""
    files = [path for path in sorted(source.rglob("*")) if not path.is_dir() and path != source / last]
    folders = {target}
    for path in (*files, source / last):
        place = target / path.relative_to(source)
        check_no_links(target, place)
        if place.is_dir():
            raise UnsafeName(f"{place} is a folder in the place of a file: remove the snapshot, and seed it again")
        make_folder(place.parent)
        folders.add(place.parent)
        if not (os.path.lexists(place) and os.path.samestat(path.lstat(), place.lstat())):
            rename(path, place)
    for folder in folders:
        sync_path(folder)


def touch(path: Path) -> float:
    """Create an empty file if it is missing, and give it the volume's own time; returns that, in seconds."""
    make_folder(path.parent)
    fd = _open_regular(path, os.O_WRONLY | os.O_CREAT)
    try:
        with mapped_errors(path):
            os.utime(fd)
            return os.fstat(fd).st_mtime
    finally:
        os.close(fd)


def touch_folder(folder: Path) -> None:
    """Give a folder the volume's own time, so that its age counts from now; fine if it is none."""
    with mapped_errors(folder):
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | _FOREIGN)
        except (NotADirectoryError, FileNotFoundError):
            return
        try:
            os.utime(fd)
        finally:
            os.close(fd)


def link(source: Path, target: Path) -> None:
    """A second name for the file `source`; fine if `target` is that file already."""
    with mapped_errors(target):
        try:
            os.link(source, target, follow_symlinks=False)
        except FileExistsError:
            if not os.path.samestat(source.lstat(), target.lstat()):
                raise


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file, or a copy of it if there can be none; fine if `target` is there already."""
    if os.path.lexists(target):
        return
    try:
        link(source, target)
    except (ModelStoreError, OSError):
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        with mapped_errors(target):
            shutil.copyfile(source, temporary, follow_symlinks=False)
            sync_path(temporary)
            os.rename(temporary, target)


def remove_file(path: Path) -> None:
    """Remove a file; fine if it is not there."""
    with mapped_errors(path):
        path.unlink(missing_ok=True)


def remove_tree(folder: Path) -> None:
    """Remove a folder with all it holds, following no links; fine if it is not there, or if all that stays are the
    files that NFS keeps while a process has them open (`.nfs…`), which go with the last of those.

    A mount that still has the name of a folder that another one replaced says ESTALE, for up to a second on MooseFS.
    """
    for attempt in range(_STALE_ATTEMPTS):
        try:
            with mapped_errors(folder):
                shutil.rmtree(folder, onerror=_ignore_missing_and_held)
            return
        except OSError as error:
            if error.errno != errno.ESTALE or attempt + 1 == _STALE_ATTEMPTS:
                raise
        time.sleep(_STALE_S)


def symlink(target: str, path: Path) -> None:
    """Create a symbolic link at `path`; fine if something is there already. A store has none, an HF cache has."""
    with mapped_errors(path), suppress(FileExistsError):
        os.symlink(target, path)


def is_held_open(name: str) -> bool:
    """Whether NFS gave this name to a file that was removed while a process has it open."""
    return name.startswith(".nfs")


def _ignore_missing_and_held(_function: object, path: Any, info: tuple[object, BaseException, object]) -> None:
    error = info[1]
    if isinstance(error, FileNotFoundError):
        return
    if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
        place = Path(os.fsdecode(path))
        names = [place.name] if not place.is_dir() else [each.name for each in place.rglob("*") if not each.is_dir()]
        if names and all(map(is_held_open, names)):
            return
    raise error
