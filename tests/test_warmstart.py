"""A start goes on if its snapshot is damaged, evicted or being made; nothing wrong is ever served."""

from __future__ import annotations

import errno
import functools
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modelstore import warmstart
from modelstore.errors import DigestMismatch, DoesNotFit
from modelstore.load.model import load_model
from modelstore.load.weights_socket import shared_files
from modelstore.pending_start import PendingStart
from modelstore.reference import parse_reference
from modelstore.settings import Settings
from modelstore.startup import gc_paused
from modelstore.store import ModelStore
from modelstore.volume import pins
from modelstore.volume.evict import evict
from modelstore.volume.snapshots import Snapshot
from modelstore.volume.verify import verify_snapshot
from modelstore.warmstart import begin
from tests.conftest import MakeStore
from tests.support.fake_cuda import FakeCuda
from tests.support.hub import Hub
from tests.support.models import write_model
from tests.support.records import record


@pytest.fixture
def model(hub: Hub, store: ModelStore) -> Snapshot:
    write_model(hub.folder / "org" / "name", seed=1)
    snapshot = store.ensure("org/name")
    hub.served.reset()
    return snapshot


def settings_of(store: ModelStore, **changes: Any) -> Settings:
    return replace(store.settings, model=parse_reference("org/name"), worker_id="w1", **changes)


def load(pending: PendingStart) -> dict[str, torch.Tensor]:
    model = load_model(pending.snapshot, "cpu", reading=pending.reading, transfer=pending.transfer)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def flip(path: Path, where: int = -1) -> None:
    """Flip one bit in place, and leave the times as they were."""
    state = path.stat()
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_flipped_bit_is_quarantined_and_fetched_again_and_the_start_goes_on(
    hub: Hub, store: ModelStore, model: Snapshot, name: str
) -> None:
    right = load(begin(settings_of(store)))
    flip(model.path / name, 40)
    pending = begin(settings_of(store))
    old, old_reading = pending.snapshot, weakref.ref(pending.reading)

    def load_again(pending: PendingStart) -> dict[str, torch.Tensor]:
        assert pending.snapshot.inode == old.inode or old_reading() is None, "two models' worth of memory at once"
        return load(pending)

    loaded = pending.load(load_again)
    assert all(torch.equal(loaded[key], right[key]) for key in right)
    assert pending.snapshot.path == old.path
    assert pending.snapshot.inode != old.inode
    assert verify_snapshot(pending.snapshot).ok
    fetched = {file for file, size in hub.served.bytes.items() if size}
    assert fetched <= {name, "config.json", "model.safetensors.index.json"}, "intact files were fetched again"
    (aside,) = store.layout.quarantine.iterdir()
    assert (aside / name).exists()
    spans = [span.name for span in pending.timeline.spans]
    assert "verify" in spans
    assert "publish" in spans
    assert "damaged" in pending.timeline.reason
    record(
        "No worker serves wrong weights",
        f"a flipped bit in {name}, found while it is loaded",
        tried=1,
        survived=1,
        figure="quarantined, the file fetched again, the start goes on",
    )


def test_a_damaged_config_that_its_parser_refuses_is_mended_too(hub: Hub, store: ModelStore, model: Snapshot) -> None:
    path = model.path / "tokenizer_config.json"
    path.write_bytes(b"\xff" * path.stat().st_size)

    def parse_before_the_bytes_are_checked(pending: PendingStart) -> str:
        return (pending.snapshot.path / "tokenizer_config.json").read_text()

    pending = begin(settings_of(store))
    assert pending.load(parse_before_the_bytes_are_checked).startswith("{")


def test_other_errors_are_raised_as_they_are(hub: Hub, store: ModelStore, model: Snapshot) -> None:
    def fail(pending: PendingStart) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        begin(settings_of(store)).load(fail)
    assert not store.layout.quarantine.exists()


def test_damage_on_the_way_leaves_the_snapshot_in_place(hub: Hub, store: ModelStore, model: Snapshot) -> None:
    """A host with bad memory must not make the whole fleet download again."""
    pending = begin(settings_of(store))
    calls = []

    def bad_once(pending: PendingStart) -> str:
        calls.append(pending.snapshot.inode)
        if len(calls) == 1:
            raise DigestMismatch("a bit fell over in this machine")
        return "loaded"

    assert pending.load(bad_once) == "loaded"
    assert len(set(calls)) == 1
    assert hub.served.total_bytes == 0
    assert not store.layout.quarantine.exists()


def test_damage_that_cannot_be_mended_fails_the_start_and_says_both(
    hub: Hub, store: ModelStore, model: Snapshot
) -> None:
    flip(model.path / "model.safetensors")
    hub.stop()
    pending = begin(settings_of(store, offline=True))
    with pytest.raises(DigestMismatch, match=r"differs from the published bytes.*could not be made again.*OFFLINE"):
        pending.load(load)
    assert not verify_snapshot(model).ok


def test_of_many_that_find_the_damage_one_fetches(hub: Hub, store: ModelStore, model: Snapshot) -> None:
    flip(model.path / "model.safetensors")
    starts = [begin(settings_of(store)) for _worker in range(4)]
    loaded: list[dict[str, torch.Tensor]] = []
    threads = [threading.Thread(target=lambda start=start: loaded.append(start.load(load))) for start in starts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(loaded) == 4
    assert torch.get_default_dtype() == torch.float32, "concurrent builds got in each other's way"
    assert hub.served.bytes["model.safetensors"] == (hub.folder / "org/name/model.safetensors").stat().st_size
    assert len(list(store.layout.quarantine.iterdir())) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json"])
def test_wrong_bytes_on_a_read_only_volume_are_mended_for_this_worker_alone(
    hub: Hub, store: ModelStore, model: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    expected = load(begin(settings_of(store)))
    flip(model.path / name)
    before = {path: path.lstat().st_mtime_ns for path in (*store.layout.models.rglob("*"), store.layout.root)}
    settings = settings_of(store, volume_mode="read-only")
    pending = begin(settings)
    loaded = pending.load(load)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    assert "a copy of its own" in pending.timeline.reason
    assert {path: path.lstat().st_mtime_ns for path in before} == before, "nothing that others read was touched"
    assert not store.layout.quarantine.exists()
    assert pending.snapshot.manifest == model.manifest
    store.catalog.check_unchanged(pending.snapshot)  # as the worker does before it takes jobs
    others = [file for file in ("model.safetensors", "tokenizer_config.json") if file != name]
    assert not any(hub.served.bytes[file] for file in others), "what is intact comes from the volume"


@pytest.fixture
def evict_once(monkeypatch: pytest.MonkeyPatch, store: ModelStore) -> list[str]:
    """Evict the snapshot between the look and the open, the first time."""
    done: list[str] = []
    real = warmstart.start_reading

    def read(snapshot: Snapshot, **how: Any) -> Any:
        if not done:
            done.append(str(snapshot.path))
            assert evict(store.layout, snapshot.key, force=True)
        return real(snapshot, **how)

    monkeypatch.setattr(warmstart, "start_reading", read)
    return done


def test_a_snapshot_that_goes_between_the_look_and_the_open_is_made_again(
    hub: Hub, store: ModelStore, model: Snapshot, evict_once: list[str]
) -> None:
    pending = begin(settings_of(store))
    assert evict_once == [str(model.path)]
    assert pending.timeline.outcome == "downloaded"
    assert load(pending)


def test_a_start_marks_its_snapshot_as_in_use_until_it_ends(hub: Hub, store: ModelStore, model: Snapshot) -> None:
    pending = begin(settings_of(store))
    assert pins.users(store.layout, model.key, pins.volume_time(store.layout)) == ("w1",)
    assert not evict(store.layout, model.key)
    pending.in_use.end()
    assert evict(store.layout, model.key)


def test_of_an_evicted_snapshot_everything_is_read_that_was_opened(
    hub: Hub, store: ModelStore, make_store: MakeStore, model: Snapshot
) -> None:
    pending = begin(settings_of(store))
    assert evict(store.layout, model.key, force=True)
    pending.reading.wait_all()
    assert pending.reading.damage() is None


def test_a_chunk_that_the_volume_has_lost_is_mended_like_a_flipped_bit(
    hub: Hub, store: ModelStore, model: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    inode, real = (
        (model.path / "model.safetensors").stat().st_ino,
        {name: getattr(os, name) for name in ("pread", "preadv")},
    )

    def lost(name: str) -> Any:
        def read(fd: int, *arguments: Any) -> Any:
            if os.fstat(fd).st_ino == inode:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real[name](fd, *arguments)

        return read

    for name in real:
        monkeypatch.setattr(os, name, lost(name))
    threads = functools.partial(warmstart.start_reading, beside=False)  # a process of its own would read well
    monkeypatch.setattr(warmstart, "start_reading", lambda snapshot, **_how: threads(snapshot))
    pending = begin(settings_of(store))
    assert pending.load(load)
    assert pending.snapshot.inode != model.inode
    assert hub.served.bytes["model.safetensors"]


def test_the_next_work_is_done_beside_a_download_and_not_at_a_hit(hub: Hub, store: ModelStore) -> None:
    write_model(hub.folder / "org" / "name", seed=1)
    seen: list[int] = []

    def work() -> None:
        until = time.monotonic() + 60
        while not hub.served.total_bytes and time.monotonic() < until:
            time.sleep(0.01)
        seen.append(hub.served.total_bytes)
        raise ImportError("no module named so")

    pending = begin(settings_of(store), while_filling=work)
    assert pending.timeline.outcome == "downloaded"
    assert len(seen) == 1
    assert seen[0] > 0, "it ran while the bytes came"
    assert load(pending)
    begin(settings_of(store), while_filling=work).reading.close()
    assert len(seen) == 1


def test_weights_are_on_the_gpu_before_torch_is_imported(
    store: ModelStore, model: Snapshot, fake_cuda: FakeCuda
) -> None:
    program = f"""
import sys
from modelstore.load import device, memory
memory.free_gpu_bytes = lambda _visible: [1 << 40]
device.LIBRARY = {str(fake_cuda.library)!r}
from modelstore.settings import Settings
from modelstore.warmstart import begin
pending = begin(Settings.from_env())
pending.transfer.wait()
memory = [slab.memory for slabs in pending.transfer.slabs.values() for slab in slabs]
print(sum(each.size_bytes for each in memory), {{each.device for each in memory}}, "torch" in sys.modules)
"""
    env = {**os.environ, "MODEL_ID": "org/name", "MODELSTORE_ROOT": str(store.layout.root)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    size, place, has_torch = done.stdout.split()
    assert 0 < model.weights_bytes - int(size) < 8192 * len(model.weights), "all but the headers"
    assert (place, has_torch) == ("{'cuda:0'}", "False")


def test_a_damaged_model_leaves_the_gpu_before_it_comes_again(
    hub: Hub, store: ModelStore, model: Snapshot, one_gpu: FakeCuda
) -> None:
    right = load(begin(settings_of(store)))
    gc.collect()
    size = one_gpu.state.peak
    flip(model.path / model.weights[-1].path)
    pending = begin(settings_of(store))
    again = pending.load(load)
    assert right.keys() == again.keys()
    assert all(torch.equal(right[name], again[name]) for name in right)
    assert one_gpu.state.peak == size, "never twice"
    del pending
    gc.collect()
    one_gpu.check_released()


def test_a_torch_that_cannot_use_the_gpu_loads_on_the_cpu(
    store: ModelStore,
    model: Snapshot,
    one_gpu: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("modelstore.load.torch_device.can_use_gpus", lambda: False)
    pending = begin(settings_of(store))
    tensors = pending.load(load)
    assert all(torch.equal(tensor, load(begin(settings_of(store)))[name]) for name, tensor in list(tensors.items())[:2])
    assert "the model is loaded on the CPU" in caplog.text
    assert pending.transfer is None


@pytest.mark.parametrize("when", ["before the load", "in the load"])
def test_a_start_that_fails_leaves_nothing_on_the_gpu(
    when: str, store: ModelStore, model: Snapshot, one_gpu: FakeCuda
) -> None:
    def fail(begun: PendingStart) -> None:
        model = load_model(begun.snapshot, "cpu", reading=begun.reading, transfer=begun.transfer)
        assert model.num_parameters() > 0
        raise LookupError("no such tokenizer")

    pending = begin(settings_of(store))
    assert pending.transfer is not None
    if when == "in the load":
        with pytest.raises(LookupError):
            pending.load(fail)
    else:
        pending.reading.close()
        pending.transfer.end()
    del pending
    gc.collect()
    one_gpu.check_released()


def test_weights_for_several_gpus_wait_until_it_is_known_where_to(
    store: ModelStore, model: Snapshot, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_GPUS", "2")
    for free, begun in (([1 << 40, 1 << 40], True), ([1000, 1 << 40], False)):
        monkeypatch.setattr("modelstore.load.memory.free_gpu_bytes", lambda _visible, free=free: free)
        pending = begin(settings_of(store))
        assert (pending.transfer is not None) == begun
        pending.reading.close()
        if pending.transfer is not None:
            pending.transfer.end()


@pytest.mark.parametrize("has_room", [True, False])
def test_a_server_gets_the_mended_weights_as_it_got_the_first(
    store: ModelStore, model: Snapshot, monkeypatch: pytest.MonkeyPatch, has_room: bool
) -> None:
    monkeypatch.setattr("modelstore.load.memory.free_host_bytes", lambda: 1 << 40 if has_room else 1)
    damaged = "model.safetensors" if has_room else "config.json"
    flip(model.path / damaged)
    given = []

    def serve(pending: PendingStart) -> None:
        given.append(len(shared_files(pending.snapshot, pending.reading)))
        pending.reading.wait_all()

    pending = begin(settings_of(store), target="shared")
    pending.load(serve)
    assert set(given) == {int(has_room)}
    pending.reading.close()
    pending.in_use.end()


def test_a_gpu_that_fills_up_meanwhile_is_an_error_and_not_a_wait(
    hub: Hub, store: ModelStore, one_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A miss: the weights fill the ring before the small files are read, which a load waits for first."""
    write_model(hub.folder / "org" / "name", seed=1)
    monkeypatch.setenv("FAKE_CUDA_BYTES", "10000")
    pending = begin(settings_of(store))
    with pytest.raises(DoesNotFit, match="cuda:0 has no"):
        pending.load(load)
    del pending
    gc.collect()
    one_gpu.check_released()


def test_copies_for_a_snapshot_that_is_looked_up_again_give_their_memory_back(
    hub: Hub, store: ModelStore, one_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, because a start runs without the collector, and freezes what is there at its end."""
    write_model(hub.folder / "org" / "name", seed=1)
    evicting = iter([True, False])
    monkeypatch.setattr("modelstore.warmstart.wait_while_evicting", lambda *_arguments: next(evicting))
    with gc_paused():
        pending = begin(settings_of(store))
        tensors = pending.load(load)
    assert tensors
    assert one_gpu.state.peak <= 2 * sum(tensor.nbytes for tensor in tensors.values())
    del pending
    gc.collect()
    one_gpu.check_released()
