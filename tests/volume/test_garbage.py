"""The garbage that is collected, and above all the files that are not."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from modelstore.errors import NoSpace
from modelstore.store import ModelStore
from modelstore.volume import garbage, pins
from modelstore.volume.claim import Claim, Contender
from modelstore.volume.evict import evict
from modelstore.volume.garbage import collect, find_garbage
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.verify import Position, save_position
from tests.conftest import MakeStore, leave_unfinished
from tests.support.checkpoints import write_repo
from tests.support.hub import Hub

HOUR_S = 3600.0


def age(path: Path, seconds: float) -> None:
    """Make everything at `path` look untouched for that long."""
    then = time.time() - seconds
    for each in [*path.rglob("*"), path]:
        os.utime(each, (then, then), follow_symlinks=False)


def collected(store: ModelStore, *, grace_s: float = HOUR_S) -> dict[str, list[str]]:
    """Collect everything; what went, by kind."""
    found: dict[str, list[str]] = {}
    for item in find_garbage(store.layout, grace_s=grace_s):
        if collect(store.layout, item, worker="gc", lease_s=30.0, grace_s=grace_s):
            found.setdefault(item.kind, []).append(str(item.path.relative_to(store.settings.root)))
    return found


@pytest.fixture
def cut_short(hub: Hub, make_store: MakeStore) -> ModelStore:
    """A store with a download that was given up."""
    write_repo(hub.folder / "org" / "name", shards=2)
    store = make_store(sleep=lambda _seconds: None)
    leave_unfinished(hub, store)
    return store


def test_a_store_in_use_has_no_garbage(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name")
    snapshot = store.ensure("org/name")
    pins.UsageMark(store.layout, snapshot.key, "w")
    pins.pin(store.layout, snapshot.key, "me")
    save_position(store.layout, snapshot.key, Position(20, 1, 0))
    age(store.settings.root, 1000 * HOUR_S)
    collected(store)  # the empty folder that a publish leaves
    assert store.lookup("org/name") is not None
    assert collected(store) == {}
    assert pins.is_pinned(store.layout, snapshot.key)


def test_an_abandoned_download_goes_after_the_grace_and_not_before(cut_short: ModelStore) -> None:
    store = cut_short
    assert collected(store) == {}
    age(store.settings.root, 2 * HOUR_S)
    found = collected(store)
    assert len(found["staging"]) == 1
    assert not list(store.settings.root.glob("staging/*/*/*"))
    assert store.ensure("org/name").status == "downloaded"


def test_a_download_that_is_resumed_meanwhile_stays(cut_short: ModelStore, hub: Hub) -> None:
    store = cut_short
    age(store.settings.root, 2 * HOUR_S)
    (item,) = find_garbage(store.layout, grace_s=HOUR_S)
    next(item.path.rglob("done/*.json")).touch()
    assert not collect(store.layout, item, worker="gc", lease_s=30.0, grace_s=HOUR_S)
    assert store.ensure("org/name").status == "resumed"


def test_a_download_whose_heart_beats_stays_however_old_its_files_are(cut_short: ModelStore) -> None:
    store = cut_short
    age(store.settings.root, 2 * HOUR_S)
    (item,) = find_garbage(store.layout, grace_s=HOUR_S)
    assert item.key is not None
    claim = Contender(store.layout.claims(item.key), worker="alive", lease_s=30.0).try_claim()
    assert isinstance(claim, Claim)
    with claim:
        assert {found.kind for found in find_garbage(store.layout, grace_s=HOUR_S)} == {"generation"}
        assert not collect(store.layout, item, worker="gc", lease_s=30.0, grace_s=HOUR_S)
        claim.check()


def test_trash_and_quarantine_go_after_the_grace(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name")
    first = store.ensure("org/name")
    (first.path / "config.json").write_bytes(b"!" * (first.path / "config.json").stat().st_size)
    store.ensure("org/name", damaged=first)
    leftover = store.layout.aside(store.layout.trash, first.key)
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(bytes(1000))
    assert collected(store) == {}
    for folder in (store.layout.trash, store.layout.quarantine):
        age(folder, 2 * HOUR_S)
    found = collected(store)
    assert found["trash"] == [f"trash/{leftover.name}"]
    assert len(found["quarantine"]) == 1
    assert not list(store.layout.trash.iterdir())
    assert not list(store.layout.quarantine.iterdir())


def test_of_the_generations_the_highest_stays(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name")
    snapshot = store.ensure("org/name")
    folder = store.layout.claims(snapshot.key)
    for _again in range(3):
        claim = Contender(folder, worker="w", lease_s=30.0).try_claim()
        assert isinstance(claim, Claim)
        claim.finish("released")
    age(store.settings.root, 2 * HOUR_S)
    assert len(collected(store)["generation"]) == 3
    assert [path.name for path in folder.iterdir()] == ["4"]


def test_marks_of_the_dead_go_but_the_newest_says_when_it_was_used(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name")
    snapshot = store.ensure("org/name")
    folder = store.layout.used(snapshot.key)
    for number in range(5):
        (folder / f"w{number}.0").touch()
        age(folder / f"w{number}.0", (10 - number) * HOUR_S)
    age(folder / ".last", 20 * HOUR_S)
    assert len(collected(store)["mark"]) == 5
    assert [path.name for path in folder.iterdir()] == ["w4.0"]


def test_a_live_workers_mark_and_a_persons_pin_stay_with_any_grace(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name")
    key = store.ensure("org/name").key
    (store.layout.used(key) / "w.0").touch()
    age(store.layout.used(key) / "w.0", 40)
    pins.pin(store.layout, key, "me")
    age(store.layout.pins, 100 * HOUR_S)
    assert "mark" not in collected(store, grace_s=30.0)
    assert evict(store.layout, key, force=True)
    pins.pin(store.layout, key, "me")
    age(store.layout.pins, 100 * HOUR_S)
    collected(store, grace_s=30.0)
    assert pins.is_pinned(store.layout, key), "the snapshot may be coming back"


def test_records_of_snapshots_that_are_gone_and_temporary_files_go(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name")
    key = store.ensure("org/name").key
    save_position(store.layout, key, Position(20, 1, 0))
    evict(store.layout, key)
    store.layout.aliases.mkdir()
    temporary = [folder / ".0123456789abcdef.tmp" for folder in (store.layout.aliases, store.layout.refs("org/name"))]
    for path in temporary:
        path.write_bytes(b"{")
    age(store.settings.root, 2 * HOUR_S)
    found = collected(store)
    assert found["record"] == [str(store.layout.verified(key).relative_to(store.settings.root))]
    assert found["temporary"] == [str(path.relative_to(store.settings.root)) for path in temporary]
    assert found["mark"] == [str((store.layout.used(key) / ".last").relative_to(store.settings.root))]


def test_files_of_others_stay(hub: Hub, make_store: MakeStore) -> None:
    """Somebody's own folders may have the same names as the store's, where the root is a folder in use."""
    weights = write_repo(hub.folder / "org" / "name") / "model.safetensors"
    store = make_store(quota_bytes=3 * weights.stat().st_size)
    theirs = [
        store.settings.root / name
        for name in ("trash/thesis.pdf", "trash/photos/a.jpg", "quarantine/evidence.bin", ".notes.tmp", "refs/a/.b.tmp")
    ]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(weights.stat().st_size))
    age(store.settings.root, 100 * HOUR_S)
    assert collected(store) == {}
    with pytest.raises(NoSpace):
        store.ensure("org/name")
    assert all(path.exists() for path in theirs)


def test_a_link_in_the_trash_is_not_followed(store: ModelStore, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    store.layout.trash.mkdir(parents=True)
    link = store.layout.aside(store.layout.trash, SnapshotKey("org/name", "a" * 40, "float16"))
    link.symlink_to(precious)
    os.utime(link, (0, 0), follow_symlinks=False)
    (item,) = find_garbage(store.layout, grace_s=HOUR_S)
    with pytest.raises(garbage.durable.UnsafeName):
        collect(store.layout, item, worker="gc", lease_s=30.0, grace_s=HOUR_S)
    assert (precious / "file").exists()
