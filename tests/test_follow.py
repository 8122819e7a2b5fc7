"""Whoever waits for a download reads what is finished of it, and trusts it only when it is published."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modelstore.catalog import Snapshot
from modelstore.claim import Holder
from modelstore.errors import WaitTimeout
from modelstore.follow import Following
from modelstore.layout import SnapshotKey, StagingLayout
from modelstore.loader import load_model
from modelstore.observer import SILENT
from modelstore.reader import Reading
from modelstore.reference import parse_reference
from modelstore.store import ModelStore
from modelstore.warmstart import begin
from tests.conftest import MakeStore
from tests.hub import Hub
from tests.test_loader import MODELS, assert_equal, save
from tests.test_reader import children


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
    until = time.monotonic() + 20
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
        begun = begin(replace(store.settings, model=parse_reference("org/name"), worker_id="waiter"))
        published = holder.result(30)
    assert added == [("staging", False)] * (shards - 1) + [("models", True)]
    assert begun.timeline.outcome == "waited"
    assert begun.snapshot.manifest == published.manifest
    ours = load_model(begun.snapshot, "cpu", reading=begun.reading, timeline=begun.timeline)
    assert_equal(ours, type(ours).from_pretrained(hub.folder / "org" / "name", dtype=torch.float16))
    spans = {span.name: span for span in begun.timeline.spans}
    assert spans["read"].start < spans["wait"].end
    begun.in_use.end()


def test_what_is_published_otherwise_is_read_again(store: ModelStore, hub: Hub, last: threading.Event) -> None:
    last.set()
    snapshot = store.ensure("org/name")
    first, *others = snapshot.weights
    for record in (replace(first, blocks="0" * 16), replace(first, size_bytes=first.size_bytes + 1)):
        following = Following(store.layout, SILENT, Reading)
        following._reading, following._followed = Reading(), {first.path: record}
        assert following.finish(snapshot) is None
    assert others
    assert Following(store.layout, SILENT, Reading).finish(snapshot) is None, "nothing was followed"


def test_a_spoiled_or_foreign_record_is_not_followed(
    store: ModelStore, hub: Hub, last: threading.Event, tmp_path: Path
) -> None:
    started: list[Reading] = []

    def start() -> Reading:
        started.append(Reading())
        return started[-1]

    with ThreadPoolExecutor(1) as pool:
        holder = pool.submit(store.ensure, "org/name")
        staging = wait_for_done(store, 1)
        first = sorted(staging.done.glob("*.safetensors.json"))[0]
        (staging.done / "other.safetensors.json").write_bytes(first.read_bytes())
        (staging.done / "torn.safetensors.json").write_bytes(first.read_bytes()[:-20])
        (staging.done / "link.safetensors.json").symlink_to(first)
        (staging.done / "gone.safetensors.json").mkdir()
        following = Following(store.layout, SILENT, start)
        key = next(iter(store.layout.root.glob("staging/*/*/*"))).parent
        following._look(key)
        assert set(following._followed) <= {path.name.removesuffix(".json") for path in staging.done.glob("model-*")}
        assert following._followed
        following.give_up()
        following.give_up()
        for name in ("other", "torn", "link"):
            (staging.done / f"{name}.safetensors.json").unlink()
        (staging.done / "gone.safetensors.json").rmdir()
        last.set()
        assert isinstance(holder.result(30), Snapshot)
    assert len(started) == 1
    assert started[0].over


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


def test_staging_that_moves_away_is_no_error(store: ModelStore) -> None:
    class Told(Following):
        def _look(self, folder: Path) -> None:
            raise OSError(2, "No such file or directory")

    seen: list[str] = []

    class Watching(type(SILENT)):  # type: ignore[misc]
        def waiting(self, key: object, holder: object, *, left_s: float) -> None:
            seen.append(str(key))

    following = Told(store.layout, Watching(), Reading)
    key = SnapshotKey("org/name", "a" * 40, "float16")
    following.waiting(key, Holder.__new__(Holder), left_s=1.0)
    assert seen == [str(key)]
