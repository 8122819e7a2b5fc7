"""The store from outside: lookups, hits and their cost, waits, and damaged snapshots."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelstore.errors import (
    FormatTooNew,
    NoSpace,
    Refused,
    RootUnusable,
    SnapshotNotFound,
    WaitTimeout,
)
from modelstore.fill.observer import Observer
from modelstore.fill.progress import Progress
from modelstore.store import ModelStore
from modelstore.volume import durable
from modelstore.volume.claim import Claim
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.space import Space
from modelstore.volume.verify import verify_snapshot
from tests.conftest import MakeStore
from tests.support.checkpoints import random_tensors, write_repo
from tests.support.hub import Hub


def test_a_second_seed_makes_one_metadata_call_and_downloads_nothing(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name")
    store.ensure("org/name", refresh=True)
    hub.served.reset()
    snapshot = store.ensure("org/name", refresh=True)
    assert (snapshot.status, snapshot.downloaded_bytes) == ("present", 0)
    assert len(hub.served.requests) == 1
    assert hub.served.total_bytes == 0


def test_a_hit_needs_no_network_and_takes_under_5_ms(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name", shards=4)
    store.ensure("org/name")
    hub.served.reset()
    times = []
    for _ in range(50):
        began = time.perf_counter()
        assert store.ensure("org/name").status == "present"
        times.append(time.perf_counter() - began)
    assert hub.served.requests == []
    assert statistics.quantiles(times, n=10)[0] < 0.005, "the others may have waited for a processor"


def test_a_fleet_serves_one_commit_until_the_next_seed(hub: Hub, store: ModelStore) -> None:
    repo = write_repo(hub.folder / "org" / "name")
    first = store.ensure("org/name")
    write_repo(repo, random_tensors(4, seed=1))
    assert store.ensure("org/name").commit == first.commit
    second = store.ensure("org/name", refresh=True)
    assert second.commit != first.commit
    assert store.ensure("org/name").commit == second.commit
    assert store.ensure(f"org/name@{first.commit}").path == first.path
    assert len(list(store.snapshots())) == 2


def test_a_snapshot_that_is_gone_is_made_again_at_the_commit_the_fleet_uses(hub: Hub, store: ModelStore) -> None:
    repo = write_repo(hub.folder / "org" / "name")
    first = store.ensure("org/name")
    old = shutil.copytree(repo, hub.folder.parent / "old")
    hub.revisions["org/name", "old"] = old
    write_repo(repo, random_tensors(4, seed=1))
    shutil.rmtree(first.path)
    assert store.ensure("org/name").commit == first.commit
    assert store.ensure("org/name").status == "present"


def test_a_worker_that_finishes_late_does_not_turn_the_fleet_back(hub: Hub, make_store: MakeStore) -> None:
    repo = write_repo(hub.folder / "org" / "name")
    store = make_store()
    old = hub.commit(repo)
    hub.revisions["org/name", "old"] = shutil.copytree(repo, hub.folder.parent / "old")

    class SeedMeanwhile(Observer):
        """While the first worker downloads, somebody moves the branch and seeds."""

        done = False

        def filling(self, key: SnapshotKey, progress: Progress) -> None:
            if not self.done:
                self.done = True
                write_repo(repo, random_tensors(4, seed=1))
                make_store().ensure("org/name", refresh=True)

    assert store.ensure("org/name", observer=SeedMeanwhile()).commit == old
    assert store.ensure("org/name").commit == hub.commit(repo) != old


@pytest.mark.parametrize("trouble", ["down", "slow", "429"])
def test_a_hub_in_trouble_changes_nothing_for_a_hit(hub: Hub, store: ModelStore, trouble: str) -> None:
    write_repo(hub.folder / "org" / "name")
    store.ensure("org/name")
    match trouble:
        case "down":
            hub.stop()
        case "slow":
            hub.faults.metadata_delay_s = 60
        case "429":
            hub.faults.status["metadata"] = [(429, {"Retry-After": "60"})] * 10
    began = time.monotonic()
    assert store.ensure("org/name").status == "present"
    assert time.monotonic() - began < 10


def test_variants_of_one_commit_lie_side_by_side(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name")
    paths = {store.ensure("org/name", dtype=dtype).path for dtype in ("float16", "bfloat16", "float32", "keep")}
    assert len(paths) == 4
    assert len(list(store.snapshots())) == 4


def test_a_store_of_a_newer_format_is_left_alone(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name")
    store.settings.root.mkdir(parents=True)
    store.layout.format_file.write_text("2\n")
    for call in (lambda: store.ensure("org/name"), lambda: store.lookup("org/name"), lambda: list(store.snapshots())):
        with pytest.raises(FormatTooNew, match="upgrade") as caught:
            call()
        assert caught.value.exit_code == 8
    assert [path.name for path in store.settings.root.iterdir()] == ["FORMAT"]


def test_a_root_that_is_a_file_is_named(hub: Hub, make_store: MakeStore, tmp_path: Path) -> None:
    write_repo(hub.folder / "org" / "name")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RootUnusable, match="MODELSTORE_ROOT"):
        make_store(root=tmp_path / "file" / "modelstore").ensure("org/name")


def test_a_model_that_is_not_allowed_is_refused_before_anything_is_asked(hub: Hub, make_store: MakeStore) -> None:
    from modelstore.reference import parse_reference

    store = make_store(allowed_models=(parse_reference("org/other"),))
    with pytest.raises(Refused, match="MODELSTORE_ALLOWED_MODELS"):
        store.ensure("org/name")
    assert hub.served.requests == []


@pytest.mark.parametrize("lost", [["model-00001-of-00002.safetensors"], ["config.json"], ["manifest.json"], "all"])
def test_a_snapshot_that_lost_files_is_completed_in_its_place(
    hub: Hub, store: ModelStore, lost: list[str] | str
) -> None:
    """The files may be there for others: this host's view of the folder can be old."""
    write_repo(hub.folder / "org" / "name", random_tensors(4), shards=2)
    first = store.ensure("org/name")
    kept = first.path / "model-00002-of-00002.safetensors"
    inode = kept.lstat().st_ino
    for path in [first.path / name for name in lost] if lost != "all" else list(first.path.iterdir()):
        path.unlink()
    assert store.lookup("org/name") is None
    hub.served.bytes.clear()
    again = store.ensure("org/name")
    assert (again.path, again.manifest.files) == (first.path, first.manifest.files)
    assert verify_snapshot(again).ok
    assert not (store.settings.root / "quarantine").exists(), "nothing was moved"
    if lost != "all" and "manifest.json" not in lost:
        assert kept.lstat().st_ino == inode, "what was there stays"
        assert not hub.served.bytes[kept.name]
        assert again.manifest == first.manifest, "those who serve it see no other snapshot"


def test_a_folder_that_leads_elsewhere_is_moved_and_nothing_written_there(
    hub: Hub, store: ModelStore, tmp_path: Path
) -> None:
    write_repo(hub.folder / "org" / "name")
    first = store.ensure("org/name")
    (tmp_path / "victim").mkdir()
    (first.path / "config.json").unlink()
    (first.path / "config.json").symlink_to(tmp_path / "victim" / "file")
    again = store.ensure("org/name")
    assert verify_snapshot(again).ok
    assert not list((tmp_path / "victim").iterdir())
    assert len(list((store.settings.root / "quarantine").iterdir())) == 1


def test_a_download_that_runs_full_goes_on_in_its_staging(
    hub: Hub, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room made meanwhile, under the same claim: nothing is fetched twice."""
    write_repo(hub.folder / "org" / "name", random_tensors(4, (256, 256)), shards=4)
    store = make_store(evict=True)
    real, staged = durable.write_atomic, list[str]()

    def once_full(path: Path, data: bytes) -> None:
        finished = list(path.parent.glob("*.safetensors.json")) if path.parent.name == "done" else []
        if finished and not staged:
            staged.extend(each.name.removesuffix(".json") for each in finished)
            raise NoSpace(f"no space for {path}")
        real(path, data)

    monkeypatch.setattr(durable, "write_atomic", once_full)
    monkeypatch.setattr(Space, "make_room", lambda *_rest: True)
    monkeypatch.setattr(Space, "could_fit", lambda *_rest: True)
    store.ensure("org/name")
    assert staged
    for name in staged:
        assert hub.served.bytes[name] == (hub.folder / "org" / "name" / name).stat().st_size, name


def test_an_old_view_of_a_folder_moves_nothing(hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount that has not seen a published file yet says that it is not there."""
    write_repo(hub.folder / "org" / "name")
    first = store.ensure("org/name")
    real = os.lstat

    def old_view(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("models/org--name/" + first.path.name + "/model.safetensors") and not seen:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real(path, **options)

    seen: list[bool] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", old_view)
        patch.setattr(Claim, "reserve", lambda *_rest: seen.append(True))  # later in the fill it sees all
        again = store.ensure("org/name")
    assert again.manifest == first.manifest
    assert verify_snapshot(again).ok
    assert not (store.settings.root / "quarantine").exists()


def test_a_lost_file_comes_back_within_the_quota(hub: Hub, make_store: MakeStore) -> None:
    write_repo(hub.folder / "org" / "name", random_tensors(4, (256, 256)), shards=2)
    first = make_store().ensure("org/name")
    (first.path / "model-00001-of-00002.safetensors").unlink()
    again = make_store(quota_bytes=first.size_bytes * 2 + 50_000).ensure("org/name")
    assert verify_snapshot(again).ok


def test_a_snapshot_copied_under_another_name_is_passed_over(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name")
    first = store.ensure("org/name")
    shutil.copytree(first.path, first.path.with_name(f"{'0' * 40}.float16"))
    assert store.lookup(f"org/name@{'0' * 40}") is None


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_a_link_in_the_place_of_a_file_is_not_followed(hub: Hub, store: ModelStore, name: str) -> None:
    write_repo(hub.folder / "org" / "name")
    first = store.ensure("org/name")
    (first.path / name).rename(first.path.parent.parent / "elsewhere")
    (first.path / name).symlink_to(first.path.parent.parent / "elsewhere")
    assert store.lookup("org/name") is None


def test_an_alias_that_does_not_exist_is_not_found(store: ModelStore) -> None:
    with pytest.raises(SnapshotNotFound, match="alias"):
        store.ensure("@chat")


def test_a_wait_that_is_too_long_names_the_worker_and_the_remedy(hub: Hub, make_store: MakeStore) -> None:
    from modelstore.volume.claim import Claim, Contender

    repo = write_repo(hub.folder / "org" / "name")
    store = make_store(worker_id="b")
    key = SnapshotKey("org/name", hub.commit(repo), "float16")
    claim = Contender(store.layout.claims(key), worker="worker-a", lease_s=30).try_claim()
    assert isinstance(claim, Claim)
    with claim, pytest.raises(WaitTimeout, match=r"worker-a.*MODELSTORE_WAIT_S") as caught:
        store.ensure("org/name", wait_s=0.6)
    assert caught.value.exit_code == 7


def test_verify_finds_a_flipped_bit_a_lost_byte_a_missing_and_a_foreign_file(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name", shards=3)
    snapshot = store.ensure("org/name")
    shards = sorted(snapshot.path.glob("*.safetensors"))
    data = bytearray(shards[0].read_bytes())
    data[len(data) // 2] ^= 1
    shards[0].write_bytes(data)
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    shards[2].unlink()
    (snapshot.path / "stray").symlink_to("/etc/passwd")
    found = {finding.path for finding in verify_snapshot(replace(snapshot)).findings}
    assert found == {*(shard.name for shard in shards), "stray"}
