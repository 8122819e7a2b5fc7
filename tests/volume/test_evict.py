"""Pins, marks of use, eviction and the quota."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from modelstore.errors import ModelStoreError, NoSpace
from modelstore.store import ModelStore
from modelstore.volume import durable, pins
from modelstore.volume import evict as evict_module
from modelstore.volume.claim import Claim, Contender
from modelstore.volume.evict import evict, first_that_free, survey
from modelstore.volume.layout import StagingLayout
from modelstore.volume.snapshots import Snapshot
from modelstore.volume.tree import tree_bytes
from modelstore.volume.verify import verify_snapshot
from tests.conftest import MakeStore, leave_unfinished
from tests.support.checkpoints import random_tensors, weights_bytes, write_repo
from tests.support.hub import Hub


def seeded(hub: Hub, store: ModelStore, *names: str) -> list[Snapshot]:
    """Models of about 0.5 MB, used one after the other."""
    found = []
    for age, name in enumerate(reversed(names)):
        write_repo(hub.folder / "org" / name, random_tensors(4, seed=len(name) + age))
    for age, name in enumerate(names):
        snapshot = store.ensure(f"org/{name}")
        last = store.layout.used(snapshot.key) / ".last"
        os.utime(last, (0, last.stat().st_mtime - 1000 * (len(names) - age)))
        found.append(snapshot)
    return found


def test_the_least_recently_used_goes_first_and_the_pinned_and_used_stay(hub: Hub, store: ModelStore) -> None:
    a, b, c, d = seeded(hub, store, "a", "b", "c", "d")
    pins.pin(store.layout, a.key, "me")
    pins.UsageMark(store.layout, b.key, "worker-1").end()
    assert [path.name for path in store.layout.used(b.key).iterdir()] == [".last"]
    serving = pins.UsageMark(store.layout, b.key, "worker-1")
    order = survey(store.layout)
    assert [candidate.key for candidate in order] == [a.key, c.key, d.key, b.key]
    assert order[0].retained_by == "it is pinned"
    assert order[3].retained_by == "it is in use by worker-1"
    assert [candidate.key for candidate in first_that_free(order, 1)] == [c.key]
    assert [candidate.key for candidate in first_that_free(order, 10**12)] == [c.key, d.key]
    assert not evict(store.layout, a.key)
    assert not evict(store.layout, b.key)
    assert evict(store.layout, c.key)
    assert not c.path.exists()
    assert not list(store.layout.trash.iterdir())
    serving.end()
    assert evict(store.layout, b.key)
    assert pins.unpin(store.layout, a.key)
    assert evict(store.layout, a.key)
    assert [snapshot.key for snapshot in store.snapshots()] == [d.key]


def test_a_worker_that_is_gone_keeps_nothing_after_five_minutes(hub: Hub, store: ModelStore) -> None:
    (snapshot,) = seeded(hub, store, "a")
    pins.UsageMark(store.layout, snapshot.key, "pod/1 \n")
    (mark,) = [mark for mark in pins.marks(store.layout, snapshot.key) if mark.worker]
    assert mark.worker == "pod/1 \ufffd"
    assert pins.users(store.layout, snapshot.key, mark.touched_at + 299) == ("pod/1 \ufffd",)
    assert pins.users(store.layout, snapshot.key, mark.touched_at + 301) == ()


def test_a_worker_says_every_minute_that_it_is_there(
    hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (snapshot,) = seeded(hub, store, "a")
    monkeypatch.setattr(pins, "_TOUCH_EVERY_S", 0.1)
    use = pins.UsageMark(store.layout, snapshot.key, "worker-1")
    folder = store.layout.used(snapshot.key)
    for _again in range(2):
        for path in folder.iterdir():
            os.utime(path, (0, path.stat().st_mtime - 1000))
        deadline = time.monotonic() + 60
        while any(time.time() - path.stat().st_mtime > 500 for path in folder.iterdir()):
            assert time.monotonic() < deadline, "the mark and .last are both touched"
            time.sleep(0.02)
    now = pins.volume_time(store.layout)
    assert pins.users_of(pins.recent_marks(store.layout, snapshot.key, now), now) == ("worker-1",)
    use.end()


def test_a_worker_that_was_frozen_says_at_once_that_it_is_there(
    hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FlashBoot leaves a process: only the wall clock has gone on."""
    (snapshot,) = seeded(hub, store, "a")
    ahead = [0.0]
    monkeypatch.setattr(pins, "_LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(pins, "time", SimpleNamespace(time=lambda: time.time() + ahead[0]))
    use = pins.UsageMark(store.layout, snapshot.key, "worker-1")
    (mark,) = [path for path in store.layout.used(snapshot.key).iterdir() if path.name.startswith("worker-1")]
    for jump in (600.0, -600.0):
        time.sleep(0.1)  # the thread waits again
        os.utime(mark, (0, mark.stat().st_mtime - 1000))
        ahead[0] += jump
        deadline = time.monotonic() + 60
        while time.time() - mark.stat().st_mtime > 500:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    use.end()


def test_of_a_worker_and_an_eviction_one_sees_the_other(
    hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order, either the worker looks the snapshot up again or the eviction gives up."""
    (snapshot,) = seeded(hub, store, "a")
    with pins.evicting(store.layout, snapshot.key) as in_time:
        assert in_time()
        waits = threading.Thread(target=pins.wait_while_evicting, args=(store.layout, snapshot.key))
        waits.start()
        time.sleep(0.1)
        assert waits.is_alive()
    waits.join(5)
    assert not waits.is_alive()
    assert not pins.wait_while_evicting(store.layout, snapshot.key)
    real = pins.volume_time

    def a_worker_comes(layout: object) -> float:
        pins.UsageMark(store.layout, snapshot.key, "late")
        return real(store.layout)

    monkeypatch.setattr(evict_module.pins, "volume_time", a_worker_comes)
    assert not evict(store.layout, snapshot.key)
    assert snapshot.path.exists()


def test_an_eviction_that_was_cut_short_holds_up_no_other(
    hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (snapshot,) = seeded(hub, store, "a")
    monkeypatch.setattr(pins, "_EVICTING_S", 0.2)
    (store.layout.used(snapshot.key) / ".evicting").touch()
    began = time.monotonic()
    assert pins.wait_while_evicting(store.layout, snapshot.key)
    assert 0.15 < time.monotonic() - began < 4.0, "not the five seconds of a real one"
    assert not pins.wait_while_evicting(store.layout, snapshot.key)
    (store.layout.used(snapshot.key) / ".evicting").touch()
    time.sleep(0.5)
    assert evict(store.layout, snapshot.key)


def test_no_model_of_another_repo_is_downloaded_beyond_the_quota(hub: Hub, make_store: MakeStore) -> None:
    store = make_store(quota_bytes=2_300_000)
    first, second = seeded(hub, store, "a", "b")  # 0.53 MB each, 1.6 MB while it is made
    write_repo(hub.folder / "org" / "c")
    hub.served.reset()
    with pytest.raises(
        NoSpace,
        match=r"1\.57 MB while it is made and 1\.2[45] MB of MODELSTORE_QUOTA=2\.30 MB are free: .*MODELSTORE_EVICT=1",
    ) as caught:
        store.ensure("org/c")
    assert caught.value.exit_code == 6
    assert hub.served.bytes["model.safetensors"] == 0
    assert {snapshot.key for snapshot in store.snapshots()} == {first.key, second.key}


def test_the_least_recently_used_makes_room_if_that_is_allowed(hub: Hub, make_store: MakeStore) -> None:
    store = make_store(quota_bytes=2_300_000, evict=True)
    first, second = seeded(hub, store, "a", "b")
    write_repo(hub.folder / "org" / "c")
    third = store.ensure("org/c")
    assert {snapshot.key for snapshot in store.snapshots()} == {second.key, third.key}
    assert tree_bytes(store.settings.root) < 2_300_000
    assert verify_snapshot(third).ok
    pins.pin(store.layout, second.key, "me")
    serving = pins.UsageMark(store.layout, third.key, "w")
    write_repo(hub.folder / "org" / "d", random_tensors(4, seed=9))
    with pytest.raises(NoSpace, match="remove a model, or raise"):
        store.ensure("org/d")
    serving.end()
    assert store.ensure("org/d").path.exists()
    assert {snapshot.repo_id for snapshot in store.snapshots()} == {"org/b", "org/d"}
    assert not first.path.exists()


def test_a_model_that_can_never_fit_is_refused_and_leaves_nothing(hub: Hub, make_store: MakeStore) -> None:
    write_repo(hub.folder / "org" / "name")
    store = make_store(quota_bytes=1_000_000, evict=True)
    with pytest.raises(NoSpace, match="choose a smaller model"):
        store.ensure("org/name")
    assert hub.served.bytes["model.safetensors"] == 0
    assert not list(store.settings.root.glob("staging/*/*/*/*"))


def test_a_model_that_would_fit_keeps_its_bytes_for_a_resume(hub: Hub, make_store: MakeStore) -> None:
    repo = write_repo(hub.folder / "org" / "name", shards=2)
    store = make_store(sleep=lambda _seconds: None)
    leave_unfinished(hub, store)
    (other,) = seeded(hub, make_store(), "other")
    full = make_store(quota_bytes=1_500_000)
    hub.served.reset()
    with pytest.raises(NoSpace):
        full.ensure("org/name")
    evict(store.layout, other.key)
    assert full.ensure("org/name").status == "resumed"
    assert hub.served.total_bytes < 0.7 * weights_bytes(repo)


HOLDER = """
import sys, time
from pathlib import Path
from modelstore.volume.claim import Contender
claim = Contender(Path(sys.argv[1]), worker="other", lease_s=30).try_claim()
claim.reserve(int(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


def test_another_downloads_reservation_counts_as_long_as_its_heart_beats(hub: Hub, make_store: MakeStore) -> None:
    write_repo(hub.folder / "org" / "name")
    store = make_store(quota_bytes=3_000_000)
    (other,) = seeded(hub, make_store(), "other")
    evict(store.layout, other.key)
    StagingLayout(store.layout.staging(other.key) / "2").snapshot.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(store.layout.claims(other.key)), "2500000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(NoSpace, match="are free"):
            store.ensure("org/name")
    finally:
        holder.kill()
        holder.communicate()
    assert store.ensure("org/name").status in ("downloaded", "resumed")


def test_counting_is_done_by_one_at_a_time(tmp_path: Path, make_store: MakeStore, hub: Hub) -> None:
    write_repo(hub.folder / "org" / "name")
    store = make_store(quota_bytes=3_000_000)
    somebody = Contender(store.layout.space_claim, worker="w", lease_s=30).try_claim()
    assert isinstance(somebody, Claim)
    seeder = threading.Thread(target=store.ensure, args=("org/name",))
    seeder.start()
    time.sleep(0.6)
    assert hub.served.bytes["model.safetensors"] == 0
    somebody.finish("released")
    seeder.join(20)
    assert store.lookup("org/name") is not None


def test_models_are_not_evicted_for_a_download_that_fails_anyway(hub: Hub, make_store: MakeStore) -> None:
    store = make_store(quota_bytes=3_000_000, evict=True)
    first, second = seeded(hub, store, "a", "b")
    pins.pin(store.layout, second.key, "me")
    write_repo(hub.folder / "org" / "big", random_tensors(7))  # 2.75 MB while it is made: too much beside one of them
    with pytest.raises(NoSpace):
        store.ensure("org/big")
    assert {snapshot.key for snapshot in store.snapshots()} == {first.key, second.key}


def test_downloads_of_dead_workers_make_room(hub: Hub, make_store: MakeStore) -> None:
    """An eviction that was killed leaves its snapshot in the trash, a seeder its staging."""
    store = make_store(quota_bytes=2_300_000, evict=True)
    (first,) = seeded(hub, store, "a")
    store.layout.trash.mkdir(exist_ok=True)
    first.path.rename(store.layout.aside(store.layout.trash, first.key))
    other = store.layout.staging(first.key) / "1" / "source"
    other.mkdir(parents=True)
    (other / "model.safetensors").write_bytes(bytes(1_000_000))
    (store.layout.used(first.key) / ".evicting").touch()
    write_repo(hub.folder / "org" / "b", random_tensors(4, seed=5))
    assert store.ensure("org/b").path.exists()
    assert tree_bytes(store.settings.root) < 1_000_000


def test_a_damaged_snapshot_is_mended_under_a_tight_quota(hub: Hub, make_store: MakeStore) -> None:
    store = make_store(quota_bytes=1_700_000)
    (snapshot,) = seeded(hub, store, "a")
    weights = snapshot.path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    mended = store.ensure("org/a", damaged=snapshot)
    assert verify_snapshot(mended).ok
    assert tree_bytes(store.settings.root) < 1_700_000


@pytest.mark.parametrize("number", [errno.EPERM, errno.EIO, errno.EROFS, errno.ENOSPC])
def test_a_volume_whose_clock_cannot_be_set_is_read_by_the_clock_of_this_host(
    hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    seeded(hub, store, "a")

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "utime", refuse)
    assert abs(pins.volume_time(store.layout) - time.time()) < 60
    with pytest.raises((OSError, ModelStoreError), match=re.escape(str(store.layout.root))):
        durable.touch(store.layout.root / "touched")


def test_two_processes_of_one_worker_have_a_mark_each(hub: Hub, store: ModelStore) -> None:
    (snapshot,) = seeded(hub, store, "a")
    pins.UsageMark(store.layout, snapshot.key, "pod")
    pins.UsageMark(store.layout, snapshot.key, "pod").end()
    assert pins.users(store.layout, snapshot.key, pins.volume_time(store.layout)) == ("pod",)
    assert not evict(store.layout, snapshot.key)


def test_the_mark_of_a_process_that_ends_goes_with_it(hub: Hub, store: ModelStore, store_env: dict[str, str]) -> None:
    (snapshot,) = seeded(hub, store, "a")
    code = (
        "import sys; from modelstore import ModelStore; from modelstore.volume import pins; store = ModelStore.from_env();"
        "pins.UsageMark(store.layout, store.lookup('org/a').key, 'pod');"
        "print(pins.users(store.layout, store.lookup('org/a').key, pins.volume_time(store.layout))); sys.exit(1)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | store_env, capture_output=True, text=True)
    assert done.stdout == "('pod',)\n", done.stderr
    assert pins.users(store.layout, snapshot.key, pins.volume_time(store.layout)) == ()


def test_an_eviction_waits_for_another_and_takes_its_place_if_that_died(
    hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (snapshot,) = seeded(hub, store, "a")
    monkeypatch.setattr(pins, "_EVICTING_S", 0.5)
    with pins.evicting(store.layout, snapshot.key):
        waiting = threading.Thread(target=evict, args=(store.layout, snapshot.key))
        waiting.start()
        time.sleep(0.1)
        assert waiting.is_alive()
    waiting.join(5)
    assert not snapshot.path.exists()
