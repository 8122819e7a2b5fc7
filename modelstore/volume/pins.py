"""The reasons to keep a snapshot: a person's pin, and the marks of the workers that use it. Standard library only.

    pins/<org>--<name>/<commit>.<dtype>.json        {"by": "alice"}; until a person takes it away
    used/<org>--<name>/<commit>.<dtype>/<worker>.<random>    empty; touched at a worker's start and every minute
    used/<org>--<name>/<commit>.<dtype>/.last                empty; touched with each mark and by uses without one
    used/<org>--<name>/<commit>.<dtype>/.evicting            a process is about to move the snapshot away

A worker's mark that was touched in the last five minutes says "in use"; the newest of all is the last use. Ages are
told by the volume's own clock, which gives every mtime here, so a host whose clock is wrong changes nothing.

A worker makes its mark and then looks for `.evicting`; an eviction makes `.evicting` and then looks for marks. One
of the two sees the other, so a snapshot that a worker has begun to load stays in place, also for programs that open its
files by path later. A volume that is mounted read-only gets no marks.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from modelstore.errors import ModelStoreError, NoSpace
from modelstore.units import printable
from modelstore.volume import durable, tree
from modelstore.volume.layout import Layout, SnapshotKey, key_from_parts

IN_USE_S = 300.0
_TOUCH_EVERY_S = 60.0
_LOOK_EVERY_S = 5.0
_OLD_S = 24 * 3600.0
_MOST_MARKS = 64
_MARK = re.compile(r"[^/]+\.[0-9a-f]{8}")
EVICTING = ".evicting"
_LAST = ".last"
_EVICTING_S = 5.0  # an eviction that takes longer was cut short
_POLL_S = 0.02

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Mark:
    """A use of a snapshot; `worker` is empty if it did not serve; `touched_at` in seconds of the volume's clock."""

    worker: str
    touched_at: float


class UsageMark:
    """This worker's mark on one snapshot, kept fresh in the background until `end` or the end of the process."""

    def __init__(self, layout: Layout, key: SnapshotKey, worker: str) -> None:
        self.key = key
        self._layout = layout
        self._path = layout.used(key) / f"{_file_name(worker)}.{secrets.token_hex(4)}"
        self._over = threading.Event()
        self._lock = threading.Lock()
        if _touched(layout, key, self._path):
            threading.Thread(target=self._keep_fresh, name="in-use", daemon=True).start()
            atexit.register(self.end)

    def end(self) -> None:
        """The snapshot is no longer in use by this worker, as at the end of its process; of one that is killed, that
        shows after five minutes."""
        atexit.unregister(self.end)
        with self._lock:
            self._over.set()
        if mark_used(self._layout, self.key):
            durable.remove_file(self._path)

    def _keep_fresh(self) -> None:
        while True:
            try:
                tree.check_no_links(self._layout.root, self._path)
                durable.touch(self._path.with_name(_LAST))
                with self._lock:
                    if self._over.is_set():
                        return
                    durable.touch(self._path)
                self._remove_old_marks()
            except (ModelStoreError, OSError) as error:  # five minutes are long enough to get through once
                logger.warning("the mark of use was not refreshed: %s", error)
            touched_at = time.time()
            # Also if only the wall clock has gone on: FlashBoot freezes a process, and thaws it minutes later.
            while abs(time.time() - touched_at) < _TOUCH_EVERY_S:
                if self._over.wait(min(_LOOK_EVERY_S, _TOUCH_EVERY_S)):
                    return

    def _remove_old_marks(self) -> None:
        """Remove marks of workers that were killed: all that are a day old, and, beyond the newest few, those that are
        not refreshed any more, as workers leave that start and fail in a loop. This one's own mark is the newest."""
        now = self._path.lstat().st_mtime
        marks = [path for path in tree.entries(self._path.parent) if _MARK.fullmatch(path.name)]
        ages = sorted((now - path.lstat().st_mtime, path) for path in marks)
        for number, (age, path) in enumerate(ages):
            if age > _OLD_S or (number >= _MOST_MARKS and age >= IN_USE_S):
                durable.remove_file(path)


def mark_used(layout: Layout, key: SnapshotKey) -> bool:
    """Note a use that ends at once. False, with no error, if the volume cannot be changed."""
    return _touched(layout, key, layout.used(key) / _LAST)


def _touched(layout: Layout, key: SnapshotKey, path: Path) -> bool:
    try:
        if os.statvfs(layout.root).f_flag & os.ST_RDONLY:
            return False
        tree.check_no_links(layout.root, layout.used(key))
        durable.touch(path)
    except (ModelStoreError, OSError) as error:
        logger.warning("%s is not marked as used (%s): an eviction may take it", key, error)
        return False
    return True


def marked_repos(layout: Layout) -> frozenset[str]:
    """The names of the folders under `used/`: no other repo has marks. After it `recent_marks` asks for less."""
    used = layout.root / "used"
    return frozenset(tree.folder_names(used)) if used.is_dir() else frozenset()


def marks(layout: Layout, key: SnapshotKey) -> tuple[Mark, ...]:
    """The marks on a snapshot, the latest first."""
    entries = []
    folder = str(layout.used(key))
    for name in tree.names(folder):
        if name == EVICTING:
            continue
        try:
            worker = "" if name == _LAST else printable(unquote(name.rpartition(".")[0]))
            entries.append(Mark(worker, os.lstat(f"{folder}/{name}").st_mtime))
        except FileNotFoundError:
            continue
    return tuple(sorted(entries, key=lambda mark: -mark.touched_at))


def recent_marks(layout: Layout, key: SnapshotKey, now: float) -> tuple[Mark, ...]:
    """The same for many snapshots, at `now` in seconds of the volume's clock: a snapshot that is not in use has one,
    of its last use, which saves the listing of a folder."""
    try:
        touched_at = os.lstat(layout.used(key) / _LAST).st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return marks(layout, key)
    return marks(layout, key) if now - touched_at < IN_USE_S else (Mark("", touched_at),)


def users(layout: Layout, key: SnapshotKey, now: float) -> tuple[str, ...]:
    """The workers that use a snapshot at `now`, in seconds of the volume's clock."""
    return users_of(marks(layout, key), now)


def users_of(marks: Sequence[Mark], now: float) -> tuple[str, ...]:
    """The same, from marks that were read already."""
    using = (mark.worker for mark in marks if mark.worker and now - mark.touched_at < IN_USE_S)
    return tuple(dict.fromkeys(using))


def volume_time(layout: Layout) -> float:
    """Now, in seconds, as the volume tells it; as this host does if the volume is empty or takes no change."""
    if not layout.format_file.exists() or os.statvfs(layout.root).f_flag & os.ST_RDONLY:
        return time.time()
    clock = layout.root / "used" / ".clock"
    try:
        tree.check_no_links(layout.root, clock)
        return durable.touch(clock)
    except (ModelStoreError, OSError) as error:  # rclone without a cache of writes changes no file that is there
        logger.debug("this host's clock is used: %s", error)
        return time.time()


def pin(layout: Layout, key: SnapshotKey, by: str) -> None:
    """Keep a snapshot and its twin until `unpin`."""
    tree.check_no_links(layout.root, layout.pin(key))
    durable.write_atomic(layout.pin(key), json.dumps({"by": by}).encode() + b"\n")


def unpin(layout: Layout, key: SnapshotKey) -> bool:
    """Take a pin away; whether there was one."""
    tree.check_no_links(layout.root, layout.pin(key))
    existed = is_pinned(layout, key)
    durable.remove_file(layout.pin(key))
    return existed


def is_pinned(layout: Layout, key: SnapshotKey) -> bool:
    """Whether a person pinned the snapshot."""
    return tree.exists(layout.pin(key))


def pinned(layout: Layout) -> frozenset[SnapshotKey]:
    """All that a person pinned, by their plain keys."""
    parts = ((repo.name, path.name) for repo in tree.entries(layout.pins) for path in tree.entries(repo))
    keys = (key_from_parts(repo, name.removesuffix(".json")) for repo, name in parts if name.endswith(".json"))
    return frozenset(key for key in keys if key is not None)


def wait_while_evicting(layout: Layout, key: SnapshotKey, *, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Return when no eviction is about to move the snapshot away; whether one was, and it must be looked up again."""
    path = layout.used(key) / EVICTING
    if not tree.exists(path):
        return False
    _wait_until_gone(path, sleep)
    return True


def _wait_until_gone(path: Path, sleep: Callable[[float], None]) -> None:
    """Return when an announced eviction is over; one that takes too long was cut short, and its announcement goes."""
    until = time.monotonic() + _EVICTING_S
    while time.monotonic() < until:
        if not tree.exists(path):
            return
        sleep(_POLL_S)
    try:
        durable.remove_file(path)
    except (ModelStoreError, OSError) as error:
        logger.warning("an announcement of an eviction cannot be removed: %s", error)


@contextmanager
def evicting(
    layout: Layout, key: SnapshotKey, *, sleep: Callable[[float], None] = time.sleep
) -> Iterator[Callable[[], bool]]:
    """Announce an eviction, after one that another process has announced; yields a check to call right before the
    rename, False if it came too late."""
    path = layout.used(key) / EVICTING
    tree.check_no_links(layout.root, path)
    if tree.exists(path):
        _wait_until_gone(path, sleep)
    began = time.monotonic()
    try:
        durable.make_folder(path.parent)
        os.close(durable.open_for_write(path, exclusive=True))
    except FileExistsError:
        yield lambda: False
        return
    except NoSpace:  # not even for an empty file: an eviction that frees space need not be stopped by that
        yield lambda: time.monotonic() - began < _EVICTING_S / 2
        return
    try:
        yield lambda: time.monotonic() - began < _EVICTING_S / 2
    finally:
        durable.remove_file(path)


def _file_name(worker: str) -> str:
    name = quote(worker, safe="", errors="replace")[:200]
    return f"%2E{name[1:]}" if name.startswith(".") else name or "worker"
