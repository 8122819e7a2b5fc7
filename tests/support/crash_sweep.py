"""A process that dies, or whose volume fails, at its n-th durable step, for every n.

    python -m tests.support.crash_sweep SCENARIO FAULT --hub URL --base FOLDER [--elsewhere FOLDER] [--every N]

Scenarios: `seed` an empty store, or `seed-compressed`; `mend` a snapshot with a flipped bit; `evict` a snapshot;
`compress` and `expand` one. Faults: `kill` (SIGKILL before
the step), `torn` (half of a write, then SIGKILL), `EIO` (that one step fails), `ENOSPC` (from that step on, everything
that takes space fails). Only the steps that a fault can strike are counted: writes for `torn`. While the process runs, another one watches `models/`. After it, a fresh seed must end well and
the snapshot must verify. `--elsewhere` is the same folder through another mount: the watching and the fresh seed are done
there. Prints one JSON record: how many steps there are, how many were tried, which did not survive.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import close_session

from modelstore.errors import ModelStoreError
from modelstore.fill import staged_file
from modelstore.fill.observer import SILENT
from modelstore.fill.recode import Recoding
from modelstore.settings import CompressMode, Settings
from modelstore.store import ModelStore
from modelstore.volume.durable import remove_tree
from modelstore.volume.evict import evict
from modelstore.volume.snapshots import Snapshot
from modelstore.volume.verify import verify_snapshot

STEPS = ("pwrite", "fsync", "rename", "link", "unlink", "rmdir", "mkdir", "ftruncate", "utime", "open")
TAKES_SPACE = ("pwrite", "mkdir", "ftruncate", "open", "fsync", "link")
STRUCK = {"kill": STEPS, "torn": ("pwrite",), "EIO": STEPS, "ENOSPC": TAKES_SPACE}
WORKERS = 14  # most of them wait for a dead holder
LIMIT_S = 60.0
PAST_THE_END, TYPED_ERROR, BUG = 0, 10, 11


Answer = tuple[int, list[str]]  # how many, and the problems


class Faults:
    """Wraps the os functions through which `durable` changes the volume."""

    def __init__(self, at: int, kind: str) -> None:
        self.at, self.kind = at, kind
        self.count = 0
        self._lock = threading.Lock()
        for name in STEPS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            if not _from_durable() or (name == "open" and not arguments[1] & os.O_CREAT):
                return real(*arguments, **options)
            if name not in STRUCK[self.kind]:
                return real(*arguments, **options)
            with self._lock:
                self.count += 1
                here, later = self.count == self.at, self.count > self.at
            if self.kind == "torn" and here:
                real(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
            if self.kind in ("kill", "torn") and here:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "EIO" and here:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if self.kind == "ENOSPC" and (here or later):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **options)

        return step


def _from_durable() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__") == "modelstore.volume.durable":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class Sweep:
    def __init__(self, scenario: str, fault: str, hub: str, base: Path, elsewhere: Path) -> None:
        self.scenario, self.fault, self.hub = scenario, fault, hub
        self.base, self.elsewhere = base, elsewhere
        staged_file._SEGMENT_GRANULES = 2  # so that a small file has segments to seal

    def store(self, base: Path, name: str) -> ModelStore:
        root = base / name
        compress: CompressMode = "always" if self.scenario in ("seed-compressed", "expand") else "never"
        return ModelStore(root, settings=Settings(root=root, hf_endpoint=self.hub, worker_id="w", compress=compress))

    def prepare(self, name: str) -> None:
        """The store as it is before the fault."""
        if not self.scenario.startswith("seed"):
            shutil.copytree(self.base / "template", self.base / name)

    def make_template(self) -> None:
        """A store with the snapshot. It is made for each scenario: children that are forked after it import nothing."""
        snapshot = self.store(self.base, "template").ensure("org/name")
        close_session()  # no child may share the connections
        if self.scenario == "mend":
            flip(snapshot)

    def act(self, name: str) -> None:
        """What is interrupted."""
        store = self.store(self.base, name)
        if self.scenario.startswith("seed"):
            store.ensure("org/name", refresh=True)
            return
        snapshot = store.lookup("org/name")
        assert snapshot is not None
        if self.scenario == "evict":
            evict(store.layout, snapshot.key)
        elif self.scenario in ("compress", "expand"):
            Recoding(store.layout, store.settings, snapshot, observer=SILENT).run()
            evict(store.layout, snapshot.key, replaced_by_twin=True)
        else:
            store.ensure("org/name", damaged=snapshot)

    def recover(self, name: str) -> str:
        """What a fresh start makes of it; empty where all is well."""
        store = self.store(self.elsewhere, name)
        snapshot = store.ensure("org/name", refresh=True)
        if self.scenario == "mend" and not verify_snapshot(snapshot).ok:
            snapshot = store.ensure("org/name", damaged=snapshot)
        if self.scenario in ("compress", "expand"):
            snapshot = self._recoded(store)
        found = verify_snapshot(snapshot)
        return "" if found.ok else f"after it: {found.findings}"

    def _recoded(self, store: ModelStore) -> Snapshot:
        """The snapshot that the interrupted command makes if it is run again."""
        snapshot = store.lookup("org/name")
        assert snapshot is not None
        key = replace(snapshot.key, compressed=self.scenario == "compress")
        if snapshot.key != key:
            Recoding(store.layout, store.settings, snapshot, observer=SILENT).run()
            remove_tree(store.layout.snapshot(key.twin))
        recoded = store.catalog.published(key)
        assert recoded is not None
        return recoded

    def watch(self, name: str) -> str:
        """What is wrong with `models/` as the other mount sees it right now."""
        catalog = self.store(self.elsewhere, name).catalog
        for key in list(catalog.keys()):
            if catalog.published(key) is None and catalog._layout.snapshot(key).is_dir():
                return f"models/ held {key} incomplete"
        return ""

    def one(self, at: int) -> tuple[bool, str]:
        """One run with the fault at step `at`: whether the process got through without it, and what went wrong."""
        name = f"{self.scenario}-{self.fault}-{at}"
        self.prepare(name)
        child = forked(lambda: self._child(name, at))
        problem, status, until = "", None, time.monotonic() + LIMIT_S
        while status is None:
            problem = problem or self.watch(name)
            time.sleep(0.005)  # the child needs the processor, too
            done, code = os.waitpid(child, os.WNOHANG)
            status = code if done else None
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return False, f"step {at}: it hung"
        if os.waitstatus_to_exitcode(status) == BUG:
            problem = problem or "it ended in an error that is none of ours"
        problem = problem or self.watch(name) or self.recover(name) or self.watch(name)
        if not problem:
            remove_tree(self.base / name)
        return os.waitstatus_to_exitcode(status) == PAST_THE_END, f"step {at}: {problem}" if problem else ""

    def _child(self, name: str, at: int) -> int:
        faults = Faults(at, self.fault)
        try:
            self.act(name)
        except (ModelStoreError, OSError):
            return TYPED_ERROR
        except Exception:
            traceback.print_exc()
            return BUG
        return PAST_THE_END if faults.count < at else TYPED_ERROR

    def run(self, every: int) -> dict[str, Any]:
        self.make_template()
        ((steps, problems),) = answers([self._count_steps])
        places = [range(1 + worker * every, steps + 1, WORKERS * every) for worker in range(WORKERS)]
        tried = 0
        for struck, found in answers([partial(self._strike, those) for those in places if those]):
            tried += struck
            problems += found
        return {
            "scenario": self.scenario,
            "fault": self.fault,
            "steps": steps,
            "tried": tried,
            "survived": tried - len(problems),
            "problems": problems,
        }

    def _count_steps(self) -> Answer:
        """How many steps there are without a fault."""
        self.prepare("whole")
        faults = Faults(sys.maxsize, self.fault)
        self.act("whole")
        return faults.count, []

    def _strike(self, places: range) -> Answer:
        """How many of these steps were there to be struck, and what went wrong after them."""
        struck, problems = 0, []
        for at in places:
            try:
                through, problem = self.one(at)
            except Exception as error:
                through, problem = False, f"step {at}: {type(error).__name__}: {error}"
            problems += [problem] if problem else []
            struck += not through
        return struck, problems


def flip(snapshot: Snapshot) -> None:
    path = next(snapshot.path.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def answers(calls: list[Callable[[], Answer]]) -> list[Answer]:
    """What these return, each in a child of its own, all at once."""
    pipes = []
    for call in calls:
        read, write = os.pipe()
        child = forked(partial(_tell, call, write))
        os.close(write)
        pipes.append((child, read))
    told = []
    for child, read in pipes:
        with os.fdopen(read) as pipe:
            count, problems = json.loads(pipe.read())
            told.append((count, problems))
        os.waitpid(child, 0)
    return told


def _tell(call: Callable[[], Answer], write: int) -> int:
    with os.fdopen(write, "w") as pipe:
        json.dump(call(), pipe)
    return 0


def forked(run: Callable[[], int]) -> int:
    """`run` in a child of its own, which exits with what it returns."""
    pid = os.fork()
    if pid:
        return pid
    code = BUG
    try:
        code = run()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scenario", choices=["seed", "seed-compressed", "mend", "evict", "compress", "expand"])
    parser.add_argument("fault", choices=["kill", "torn", "EIO", "ENOSPC"])
    parser.add_argument("--hub", required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--elsewhere", type=Path)
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    sweep = Sweep(options.scenario, options.fault, options.hub, options.base, options.elsewhere or options.base)
    print(json.dumps(sweep.run(options.every)))


if __name__ == "__main__":
    main()
