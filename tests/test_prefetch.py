"""A waiting worker reads the finished files of a download, and trusts them only when they are published."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modelstore.errors import DoesNotFit, WaitTimeout
from modelstore.fill.observer import SILENT, Observer
from modelstore.load.model import load_model
from modelstore.load.reader import Reading
from modelstore.prefetch import StagingPrefetch
from modelstore.reference import parse_reference
from modelstore.store import ModelStore
from modelstore.volume.claim import Holder
from modelstore.volume.layout import SnapshotKey, StagingLayout
from modelstore.volume.manifest import FileRecord
from modelstore.volume.pins import marks, users_of, volume_time
from modelstore.volume.snapshots import Snapshot
from modelstore.warmstart import begin
from tests.conftest import MakeStore
from tests.support.fake_cuda import FakeCuda
from tests.support.hub import Hub
from tests.support.models import MODELS, assert_equal, save
from tests.support.readings import children


@pytest.fixture
def last(hub: Hub) -> Iterator[threading.Event]:
    """A model in shards, the last of which comes only when this is set."""
    torch.manual_seed(0)
    folder = hub.folder / "org" / "name"
    save(MODELS["llama"](), folder, shards=True)
    event = hub.faults.held[max(path.name for path in folder.glob("*.safetensors"))] = threading.Event()
    yield event
    event.set()


def wait_for_done(store: ModelStore, count: int) -> StagingLayout:
    """The staging of the download that is under way, once so many shards of it are finished."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        found = list(store.layout.root.glob("staging/*/*/*/done/*.safetensors.json"))
        if len(found) >= count:
            return StagingLayout(found[0].parents[1])
        time.sleep(0.02)
    raise AssertionError("no shard was finished")


def test_a_waiter_reads_finished_shards_before_the_snapshot_is_published(
    hub: Hub, make_store: MakeStore, store: ModelStore, last: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = len(list((hub.folder / "org" / "name").glob("*.safetensors")))
    added: list[tuple[str, bool]] = []
    real = Reading.add

    def add(self: Reading, folder: Path, files: list[object], *, block_bytes: int) -> None:
        added.append((folder.relative_to(store.layout.root).parts[0], last.is_set()))
        real(self, folder, files, block_bytes=block_bytes)  # type: ignore[arg-type]
        if len(added) == shards - 1:
            last.set()

    with ThreadPoolExecutor(1) as pool:
        holder = pool.submit(store.ensure, "org/name")
        wait_for_done(store, shards - 1)
        monkeypatch.setattr(Reading, "add", add)
        pending = begin(replace(store.settings, model=parse_reference("org/name"), worker_id="waiter"))
        published = holder.result(30)
    assert added == [("staging", False)] * (shards - 1) + [("models", True)]
    assert pending.timeline.outcome == "waited"
    assert pending.snapshot.manifest == published.manifest
    ours = load_model(pending.snapshot, "cpu", reading=pending.reading, timeline=pending.timeline)
    assert_equal(ours, type(ours).from_pretrained(hub.folder / "org" / "name", dtype=torch.float16))
    spans = {span.name: span for span in pending.timeline.spans}
    assert spans["read"].start < spans["wait"].end
    pending.in_use.end()


def test_other_published_bytes_are_read_again(store: ModelStore, hub: Hub, last: threading.Event) -> None:
    last.set()
    snapshot = store.ensure("org/name")
    first, *others = snapshot.weights
    for record in (replace(first, blocks="0" * 16), replace(first, size_bytes=first.size_bytes + 1)):
        following = StagingPrefetch(store.layout, SILENT, reading := Reading())
        following._followed = {first.path: record}
        assert not following.finish(snapshot)
        assert reading.over
    assert others


def test_a_spoiled_or_foreign_record_is_not_followed(
    store: ModelStore, hub: Hub, last: threading.Event, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(1) as pool:
        holder = pool.submit(store.ensure, "org/name")
        staging = wait_for_done(store, 1)
        first = sorted(staging.done.glob("*.safetensors.json"))[0]
        (staging.done / "other.safetensors.json").write_bytes(first.read_bytes())
        (staging.done / "torn.safetensors.json").write_bytes(first.read_bytes()[:-20])
        (staging.done / "link.safetensors.json").symlink_to(first)
        (staging.done / "gone.safetensors.json").mkdir()
        following = StagingPrefetch(store.layout, SILENT, reading := Reading())
        following._look(SnapshotKey("org/name", hub.commit(hub.folder / "org" / "name"), "float16"))
        assert set(following._followed) <= {path.name.removesuffix(".json") for path in staging.done.glob("model-*")}
        assert following._followed
        following.give_up()
        following.give_up()
        for name in ("other", "torn", "link"):
            (staging.done / f"{name}.safetensors.json").unlink()
        (staging.done / "gone.safetensors.json").rmdir()
        last.set()
        assert isinstance(holder.result(30), Snapshot)
    assert reading.over


def test_a_wait_in_vain_leaves_no_reader_behind(
    store: ModelStore, make_store: MakeStore, hub: Hub, last: threading.Event
) -> None:
    before = children()
    with ThreadPoolExecutor(1) as pool:
        holder = pool.submit(store.ensure, "org/name")
        wait_for_done(store, 1)
        with pytest.raises(WaitTimeout):
            begin(replace(store.settings, model=parse_reference("org/name"), worker_id="waiter", wait_s=1.0))
        assert children() == before
        last.set()
        holder.result(30)


def read_from_the_volume(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the files that are opened for a reading from now on."""
    opened: set[str] = set()
    real = Reading.add

    def add(self: Reading, folder: Path, files: list[FileRecord], *, block_bytes: int) -> None:
        opened.update(file.path for file in files)
        real(self, folder, files, block_bytes=block_bytes)

    monkeypatch.setattr(Reading, "add", add)
    return opened


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["converted", "stored as it comes"])
@pytest.mark.parametrize("shards", [True, False], ids=["shards", "one file"])
def test_the_downloading_worker_does_not_read_back(
    dtype: torch.dtype, shards: bool, hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    save(MODELS["llama"]().to(dtype), hub.folder / "org" / "name", shards=shards)
    opened = read_from_the_volume(monkeypatch)
    pending = begin(replace(store.settings, model=parse_reference("org/name")))
    assert pending.timeline.outcome == "downloaded"
    assert opened
    assert not {path for path in opened if path.endswith(".safetensors")}
    ours = load_model(pending.snapshot, "cpu", reading=pending.reading)
    assert_equal(ours, type(ours).from_pretrained(hub.folder / "org" / "name", dtype=torch.float16))
    pending.in_use.end()


def test_finished_files_of_an_earlier_worker_are_read_beside_the_rest(
    hub: Hub, store: ModelStore, last: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = next(iter(hub.faults.held))
    settings = replace(store.settings, model=parse_reference("org/name"))

    class Stop(Observer):
        def finished(
            self, key: SnapshotKey, folder: Path, record: FileRecord, memory: memoryview | None = None
        ) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.ensure("org/name", observer=Stop())
    found = {
        path.name.removesuffix(".json") for path in store.layout.root.glob("staging/*/*/*/done/*.safetensors.json")
    }
    assert found
    opened = read_from_the_volume(monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        start = pool.submit(begin, settings)
        until = time.monotonic() + 60
        while not opened and time.monotonic() < until:
            time.sleep(0.02)
        assert not start.done(), "read before the last shard came"
        last.set()
        pending = start.result(30)
    assert {path for path in opened if path.endswith(".safetensors")} == found
    assert held not in found
    ours = load_model(pending.snapshot, "cpu", reading=pending.reading)
    assert_equal(ours, type(ours).from_pretrained(hub.folder / "org" / "name", dtype=torch.float16))
    pending.in_use.end()


def test_memory_is_kept_within_its_limit_and_for_one_snapshot(store: ModelStore) -> None:
    key, other = (SnapshotKey("org/name", "a" * 40, dtype) for dtype in ("float16", "bfloat16"))
    following = StagingPrefetch(store.layout, SILENT, Reading(), keep_bytes=10_000)
    assert following.memory(key, "a.safetensors", 4096)
    assert following.memory(key, "a.safetensors", 8192), "what was begun again gives back what it had"
    assert following.memory(key, "b.safetensors", 4096) is None
    assert following.memory(other, "c.safetensors", 1) is None
    following.give_up()


@pytest.mark.parametrize("who", ["holder", "waiter"])
def test_weights_are_on_the_gpu_before_the_snapshot_is_published(
    who: str, hub: Hub, store: ModelStore, last: threading.Event, one_gpu: FakeCuda
) -> None:
    files = sorted((hub.folder / "org" / "name").glob("*.safetensors"))
    settings = replace(store.settings, model=parse_reference("org/name"), worker_id="starting")
    with ThreadPoolExecutor(2) as pool:
        holder = pool.submit(store.ensure, "org/name") if who == "waiter" else None
        if holder is not None:
            wait_for_done(store, 1)
        start = pool.submit(begin, settings)
        until = time.monotonic() + 60
        while one_gpu.state.copies <= len(files) - 1:  # and the one that tried the driver
            assert time.monotonic() < until, "nothing was moved"
            time.sleep(0.02)
        assert not start.done()
        last.set()
        pending = start.result(30)
    ours = pending.load(lambda begun: load_model(begun.snapshot, "cpu", reading=begun.reading, transfer=begun.transfer))
    assert_equal(ours, type(ours).from_pretrained(hub.folder / "org" / "name", dtype=torch.float16))
    assert one_gpu.state.copies == len(files) + 1, "none was read again"
    pending.in_use.end()


def test_a_model_too_large_for_the_gpus_is_not_downloaded(
    hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(MODELS["llama"](), hub.folder / "org" / "name", shards=False)
    monkeypatch.setattr("modelstore.load.memory.free_gpu_bytes", lambda _visible: [1000, 1000])
    before = children()
    with pytest.raises(DoesNotFit, match=r"2 GPUs have 2\.0 kB free"):
        begin(replace(store.settings, model=parse_reference("org/name")))
    assert not [request for request in hub.served.requests if "safetensors" in str(request)]
    assert children() == before


def test_a_start_that_does_not_fit_leaves_no_mark_of_use(
    hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(MODELS["llama"](), hub.folder / "org" / "name", shards=False)
    snapshot = store.ensure("org/name")
    monkeypatch.setattr("modelstore.load.memory.free_gpu_bytes", lambda _visible: [1000])
    threads = set(threading.enumerate())
    for _ in range(3):
        with pytest.raises(DoesNotFit):
            begin(replace(store.settings, model=parse_reference("org/name")))
    assert not users_of(marks(store.layout, snapshot.key), volume_time(store.layout))
    for thread in set(threading.enumerate()) - threads:
        if thread.name == "in-use":
            thread.join(10)  # it was told to end, and may still be on its way
            assert not thread.is_alive()


def test_staging_that_moves_away_is_no_error(store: ModelStore) -> None:
    class RecordedChannel(StagingPrefetch):
        def _look(self, key: SnapshotKey) -> None:
            raise OSError(2, "No such file or directory")

    seen: list[str] = []

    class Watching(type(SILENT)):  # type: ignore[misc]
        def waiting(self, key: object, holder: object, *, left_s: float) -> None:
            seen.append(str(key))

    following = RecordedChannel(store.layout, Watching(), reading := Reading())
    key = SnapshotKey("org/name", "a" * 40, "float16")
    following.waiting(key, Holder.__new__(Holder), left_s=1.0)
    following.give_up()
    assert reading.over
    assert seen == [str(key)]
