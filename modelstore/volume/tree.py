"""Folders on the volume: their entries, their sizes and times, and the links in them. Writes nothing.

Over a network file system each look is a round trip, so many small ones are made together (`map_concurrently`), and a
folder's entries are asked for their states at once.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from modelstore.errors import RootUnusable, UnsafeName

T = TypeVar("T")
R = TypeVar("R")
_AT_ONCE = 16


def once_more(look: Callable[[], R]) -> R:
    """A look at the volume; a second one if the name that this mount has is stale (ESTALE), because another host has
    replaced what it stands for."""
    try:
        return look()
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
    return look()


def entries(folder: Path) -> list[Path]:
    """The paths in a folder, by name; none if it does not exist."""
    return [folder / name for name in names(folder)]


def names(folder: str | Path) -> list[str]:
    """The same as names alone. Raises RootUnusable if the folder is there and cannot be read."""
    try:
        return sorted(once_more(lambda: os.listdir(folder)))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable(error, folder) from error


def folder_names(folder: str | Path) -> list[str]:
    """The names of the folders in a folder, links left out, sorted; none if it does not exist. Raises RootUnusable.

    Each is asked for its state, because a file system that sees this sends the states of the next ones with their names
    (FUSE's and NFS's readdirplus), and a look below one of them within a second saves a round trip.
    """
    folders = []
    try:
        with os.scandir(folder) as listing:
            for entry in listing:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                    with suppress(OSError):  # it may be gone by now
                        entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unreadable(error, folder) from error
    return sorted(folders)


def exists(path: str | Path) -> bool:
    """Whether anything has this name, a link too. Raises RootUnusable if that cannot be told."""
    try:
        once_more(lambda: os.lstat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(error, path) from error
    return True


def size_of(path: str | Path) -> int | None:
    """The size of a regular file in bytes; None if there is none, or that cannot be told."""
    try:
        state = os.lstat(path)
    except OSError:
        return None
    return state.st_size if stat.S_ISREG(state.st_mode) else None


def unreadable(error: OSError, path: str | Path) -> RootUnusable:
    """The error for a file or a folder that is there, or may be, and cannot be read."""
    return RootUnusable(f"cannot read {path}: {error.strerror}; check the mount and MODELSTORE_ROOT")


def map_concurrently(look: Callable[[T], R], things: Iterable[T]) -> list[R]:
    """Look at many small things together, because over a network file system each is a round trip."""
    items = list(things)
    length = (
        -(-len(items) // (4 * _AT_ONCE)) or 1
    )  # a part at a time: handing over each thing alone takes as long again
    parts = [items[start : start + length] for start in range(0, len(items), length)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return [result for part in pool.map(lambda part: [look(item) for item in part], parts) for result in part]


def tree_bytes(folder: Path, counted: set[tuple[int, int]] | None = None, *, unshared: bool = False) -> int:
    """The bytes of a folder's regular files by their sizes, each inode once; `counted` carries inodes between calls.

    `unshared`: only the bytes that are freed when the folder goes, without files that have another name. Sizes, not
    blocks: MooseFS tells the whole size for a sparse file, too.
    """
    counted = set() if counted is None else counted
    total = 0
    for state in _file_states(folder):
        if state.st_nlink == 1 or not (unshared or (state.st_dev, state.st_ino) in counted):
            counted.add((state.st_dev, state.st_ino))
            total += state.st_size
    return total


def tree_blocks(folder: Path) -> int:
    """The bytes of a folder's regular files on the disk, holes left out; MooseFS counts holes."""
    return sum(state.st_blocks * 512 for state in _file_states(folder))


def _file_states(folder: Path) -> Iterator[os.stat_result]:
    """The states of a folder's regular files, at any depth. What another process removes or renames meanwhile is left
    out."""
    try:
        with os.scandir(folder) as entry_names:
            for entry in entry_names:
                with suppress(FileNotFoundError):
                    if entry.is_dir(follow_symlinks=False):
                        yield from _file_states(Path(entry.path))
                    elif entry.is_file(follow_symlinks=False):
                        yield entry.stat(follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return


def newest_mtime(path: Path) -> float:
    """The latest mtime of a file, or of a folder and all it holds; 0 if it does not exist."""
    try:
        state = path.lstat()
        children = entries(path) if stat.S_ISDIR(state.st_mode) else []
    except FileNotFoundError:
        return 0.0
    return max([state.st_mtime, *map(newest_mtime, children)])


def check_no_links(root: Path, path: Path) -> None:
    """Raise UnsafeName if a component of `path` below `root` is a symbolic link, as another user of the volume may
    have planted it. A path that does not exist is fine."""
    step = str(root)
    for part in path.relative_to(root).parts:
        step = f"{step}/{part}"
        try:
            if stat.S_ISLNK(os.lstat(step).st_mode):
                raise UnsafeName(f"{step} is a link: the store follows none; remove it, it was put there by hand")
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise unreadable(error, step) from error


def is_free_of_links(root: Path, path: Path) -> bool:
    """Whether no component of `path` below `root` is a symbolic link: see `check_no_links`."""
    try:
        check_no_links(root, path)
    except UnsafeName:
        return False
    return True


def check_no_links_below(folder: Path) -> None:
    """Raise UnsafeName if a symbolic link lies anywhere below `folder`; one that does not exist is fine."""
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            if os.path.islink(path := os.path.join(parent, name)):
                raise UnsafeName(f"{path} is a link: the store follows none; remove it, it was put there by hand")
