"""The exclusive right to fill one snapshot, across processes and hosts.

    claims/<org>--<name>/<commit>.<dtype>/
      1        {"worker": "a", "host": "…", "pid": 7, "state": "held", "beat": 41, "done": …, "total": …, "eta_s": …}
      2        the highest number is the one that counts

Guaranteed: each generation is created by exactly one process (`O_CREAT|O_EXCL`, for which MooseFS elects one winner),
numbers only grow, and the holder of a lower one learns so at its next `check`. Some volumes let two processes create
one file: so each holder reads its record before each heartbeat, and stops if another process has overwritten it. Not
guaranteed: that two processes never work at once. A holder that was stopped for longer than the lease goes on until its
next check; the store stays correct because writes are idempotent and publishing is one rename.

A contender takes over when one of these holds, and only by creating the next generation:
- the record says the holder is through with it;
- the generation's `FileLock` is free and the record has not changed for `DEAD_AFTER_S`: the process is gone. Locks that
  a mount keeps local to its host (`mfsnobsdlocks`) look free from elsewhere; then the heartbeat decides;
- the record has not changed for the lease time, on the contender's own monotonic clock: the host is gone. The lock
  alone would not do: MooseFS keeps a lost host's locks for a day.

The record is rewritten in place, never renamed over, because the lock lives on the file.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from filelock import FileLock, Timeout

from modelstore.errors import ClaimLost, ModelStoreError
from modelstore.units import printable, size
from modelstore.volume import durable, tree

DEAD_AFTER_S = 1.25
_HEARTBEAT_S = 0.5
_LOCK_TIMEOUT_S = 1.0
_RECORD_BYTES = 1024
_KEPT_GENERATIONS = 8
_GENERATION = re.compile(r"[1-9][0-9]{0,14}")  # a file with a longer number could have no successor
_ENDLESS = 1e18  # no number of bytes, seconds or beats is as large

logger = logging.getLogger(__name__)

State = Literal["held", "released", "published"]


@dataclass(frozen=True, slots=True)
class ClaimRecord:
    """The record in a generation's file; `done` and `total` in bytes, `eta_s` in seconds if it is known; `reserved`:
    bytes that the snapshot and its staging will take on the volume."""

    worker: str
    host: str
    pid: int
    state: State = "held"
    beat: int = 0
    phase: str = ""
    done: int = 0
    total: int = 0
    eta_s: float | None = None
    reserved: int = 0

    @property
    def holder(self) -> tuple[str, str, int]:
        """What tells one holder from another."""
        return self.worker, self.host, self.pid

    def encode(self) -> bytes:
        fields = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps(fields, separators=(",", ":")).encode().ljust(_RECORD_BYTES - 1) + b"\n"


_FIELDS = frozenset(ClaimRecord.__slots__)


def parse_record(data: bytes) -> ClaimRecord | None:
    """The record in a generation's file, or None while it is empty or half-written. Fields that a newer version has
    added are passed over."""
    try:
        record = ClaimRecord(**{name: value for name, value in json.loads(data).items() if name in _FIELDS})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    numbers = (record.pid, record.beat, record.done, record.total, record.reserved)
    texts = (record.worker, record.host, record.state, record.phase)
    if not all(isinstance(each, str) for each in texts) or not all(type(each) is int for each in numbers):
        return None
    amounts = numbers if record.eta_s is None else (*numbers, record.eta_s)
    if not all(isinstance(each, int | float) and abs(each) < _ENDLESS for each in amounts):
        return None
    return replace(
        record,
        worker=printable(record.worker),
        host=printable(record.host),
        phase=printable(record.phase),
    )


@dataclass(frozen=True, slots=True)
class Holder:
    """Another process's claim as a contender sees it; `silent_s` is how long its record has not changed."""

    generation: int
    record: ClaimRecord | None
    silent_s: float

    def describe(self) -> str:
        """One phrase for a person: the worker, its progress, the time left."""
        if self.record is None:
            return f"generation {self.generation}, not started yet"
        text = f"worker {self.record.worker} ({self.record.phase or 'starting'}"
        if self.record.total:
            text += f", {self.record.done / self.record.total:.0%} of {size(self.record.total)}"
        if self.record.eta_s is not None:
            text += f", about {self.record.eta_s:.0f} s left"
        return text + (f"; silent for {self.silent_s:.0f} s)" if self.silent_s > 3 else ")")


class Contender:
    """One worker's view of the claims on one snapshot. Call `try_claim` again and again until it gives a Claim."""

    def __init__(
        self, folder: Path, *, worker: str, lease_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._record = ClaimRecord(worker=worker, host=socket.gethostname(), pid=os.getpid())
        self._lease_s = lease_s
        self._clock = clock
        self._seen: tuple[int, bytes] = (0, b"")
        self._seen_since = clock()

    def try_claim(self) -> Claim | Holder:
        """One attempt, without waiting: the claim, or its holder."""
        generation = highest_generation(self._folder)
        if generation == 0:
            durable.make_folder(self._folder)
            return self._create(1, after_the_dead=True)
        path = self._folder / str(generation)
        data = _read(path)
        now = self._clock()
        if (generation, data) != self._seen:
            self._seen, self._seen_since = (generation, data), now
        silent_s = now - self._seen_since
        record = parse_record(data)
        if record is not None and record.state != "held":
            return self._create(generation + 1, after_the_dead=True)
        if silent_s >= DEAD_AFTER_S and (lock := _try_lock(path)) is not None:
            try:
                logger.warning("taking over generation %d: its process is gone", generation)
                return self._create(generation + 1, after_the_dead=True)
            finally:
                lock.release()
        if silent_s >= self._lease_s:
            logger.warning("taking over generation %d: silent for %.0f s", generation, silent_s)
            return self._create(generation + 1, after_the_dead=False)
        return Holder(generation, record, silent_s)

    def take_over(self) -> Claim | Holder:
        """Create the next generation whatever the holder's record says; for a caller who knows that it has long been
        silent."""
        generation = highest_generation(self._folder)
        if generation == 0:
            durable.make_folder(self._folder)
        return self._create(generation + 1, after_the_dead=False)

    def _create(self, generation: int, *, after_the_dead: bool) -> Claim | Holder:
        path = self._folder / str(generation)
        try:
            fd = durable.open_for_write(path, exclusive=True)
        except FileExistsError:
            return Holder(generation, None, 0.0)
        self._remove_old_generations(generation - _KEPT_GENERATIONS)
        lock = _try_lock(path, timeout_s=_LOCK_TIMEOUT_S)
        return Claim(
            path,
            fd,
            lock,
            self._record,
            heartbeat_s=min(_HEARTBEAT_S, self._lease_s / 4),
            after_the_dead=after_the_dead,
        )

    def _remove_old_generations(self, below: int) -> None:
        """Remove records that are never read again; only the highest counts, and a holder has its own open."""
        for generation in generations(self._folder):
            if generation < below:
                with suppress(ModelStoreError, OSError):  # `gc` removes it later
                    durable.remove_file(self._folder / str(generation))


class Claim:
    """A generation that this process created. As a context manager it is released at the end of the block.

    `after_the_dead`: no process can still be writing under the generation before; False if its host was only silent.
    `staging_name`: of a folder that no other holder has, on a volume that elects two, either.
    """

    def __init__(
        self,
        path: Path,
        fd: int,
        lock: FileLock | None,
        record: ClaimRecord,
        *,
        heartbeat_s: float,
        after_the_dead: bool,
    ) -> None:
        self.generation = int(path.name)
        self.staging_name = f"{self.generation}-{secrets.token_hex(4)}"
        self.after_the_dead = after_the_dead
        self._path = path
        self._fd = fd
        self._lock = lock
        self._record = record
        self._heartbeat_s = heartbeat_s
        self._write_lock = threading.Lock()
        self._stop = threading.Event()
        self._overwritten_by = ""
        try:
            self._write()
        except BaseException:
            self._release_lock()
            raise
        self._detect_second_holder()
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat-{self.generation}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise ClaimLost if a higher generation exists, or another process holds this one. Call before each expensive
        step and before publishing."""
        if self._overwritten_by:
            raise self._lost()
        highest = highest_generation(self._path.parent)
        if highest > self.generation:
            raise ClaimLost(
                f"generation {self.generation} of {self._path.parent.name} was taken over by generation {highest}: "
                "this worker stops downloading and waits for the other one"
            )

    def report(self, phase: str, *, done: int, total: int, eta_s: float | None) -> None:
        """Set the progress that the next heartbeats publish; `done` and `total` in bytes."""
        with self._write_lock:
            self._record = replace(self._record, phase=phase, done=done, total=total, eta_s=eta_s)

    def reserve(self, size_bytes: int) -> None:
        """Reserve space on the volume: every process that counts space counts this, once the call returns."""
        with self._write_lock:
            self._record = replace(self._record, reserved=size_bytes)
        self._write()

    def finish(self, state: Literal["released", "published"]) -> None:
        """Give the claim up; the file stays, so that numbers only grow. Does nothing the second time."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        if self._overwritten_by:  # the record is the other one's
            self._release_lock()
            return
        with self._write_lock:
            self._record = replace(self._record, state=state)
        try:
            self._write()
        except (ModelStoreError, OSError) as error:
            logger.warning("could not mark the claim as %s: %s", state, error)
        finally:
            self._release_lock()

    def _release_lock(self) -> None:
        os.close(self._fd)
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.finish("released")

    def _lost(self) -> ClaimLost:
        return ClaimLost(
            f"generation {self.generation} of {self._path.parent.name} is held by {self._overwritten_by}, too: "
            "this volume elected two, and this worker waits for the other one"
        )

    def _detect_second_holder(self) -> None:
        """Read the record back: on a volume that lets two processes create one file, the last to write holds it."""
        with suppress(OSError):
            record = parse_record(_read(self._path))
            if record is not None and record.holder != self._own_record().holder:
                self._overwritten_by = f"worker {record.worker}"

    def _own_record(self) -> ClaimRecord:
        """This process's record as it reads back."""
        record = parse_record(self._record.encode())
        assert record is not None
        return record

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            self._detect_second_holder()
            if self._overwritten_by:
                return
            try:
                self._write()
            except (ModelStoreError, OSError) as error:  # a later beat may get through; if none does, the lease ends
                logger.warning("heartbeat not written: %s", error)

    def _write(self) -> None:
        with self._write_lock:
            if self._overwritten_by:  # the record is the other one's
                raise self._lost()
            self._record = replace(self._record, beat=self._record.beat + 1)
            durable.write_at(self._fd, self._record.encode(), 0, path=self._path)
            durable.sync(self._fd, path=self._path)


def generations(folder: Path) -> list[int]:
    """The generations that have a file in a claim's folder, or a folder in a snapshot's staging, the highest first."""
    return sorted((int(name) for name in tree.names(folder) if _GENERATION.fullmatch(name)), reverse=True)


def highest_generation(folder: Path) -> int:
    """The first of `generations`; 0 if there is none."""
    return max(generations(folder), default=0)


def current_record(folder: Path) -> tuple[int, ClaimRecord | None]:
    """The highest generation, and its record, if that can be read: something else in its place is passed
    over with a warning, because it says nothing of the other claims."""
    generation = highest_generation(folder)
    try:
        return generation, parse_record(_read(folder / str(generation)))
    except OSError as error:
        logger.warning("the claim %s is passed over: %s", folder / str(generation), error.strerror)
        return generation, None


def last_beat_at(folder: Path) -> float:
    """The time of the last heartbeat in the highest generation, by the volume's clock; 0 if there is none."""
    return tree.newest_mtime(folder / str(highest_generation(folder)))


def reserved_bytes(folder: Path) -> tuple[int, int]:
    """The bytes that the holder of a claim has reserved, and its beat; (0, 0) if there is no holder."""
    _generation, record = current_record(folder)
    return (record.reserved, record.beat) if record is not None and record.state == "held" else (0, 0)


def _read(path: Path) -> bytes:
    try:
        return durable.read_file(path, _RECORD_BYTES)
    except FileNotFoundError:
        return b""


def _try_lock(path: Path, *, timeout_s: float = 0.0) -> FileLock | None:
    """The generation's lock, or None if another process has it or the file system knows no locks."""
    lock = FileLock(path, timeout=timeout_s, thread_local=False, fallback_to_soft=False, poll_interval=0.01)
    try:
        lock.acquire()
    except Timeout:
        return None
    except OSError as error:
        logger.warning("this file system keeps no locks (%s): a dead worker's claim is taken over by its lease", error)
        return None
    return lock
