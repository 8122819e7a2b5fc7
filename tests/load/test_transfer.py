"""The other end of the ring, against a device that takes its time: order, and how long each slot is left alone."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from modelstore import ModelStore
from modelstore.errors import DeviceFailed, DigestMismatch
from modelstore.load.reader import Reading, start_reading
from modelstore.load.tensors import ArrivingTensors, load_tensors
from modelstore.load.torch_device import TorchDevices
from modelstore.load.transfer import Part, Transfer
from modelstore.timeline import Timeline
from modelstore.volume.manifest import FileRecord
from tests.support.models import MODELS, save
from tests.support.readings import MB, start, weights_file, write


class SlowStream:
    """A device with one stream: it copies in its own thread, in order, some time after it was asked to."""

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s
        self.memory: list[bytearray] = []
        self.pinned: set[int] = set()
        self.most_under_way = self.asked = self.copied = 0
        self.is_closed = False
        self._queue: queue.Queue[tuple[Sequence[Part], threading.Event] | None] = queue.Queue()

    def run(self) -> None:
        while (work := self._queue.get()) is not None:
            parts, done = work
            time.sleep(self.delay_s)
            for part in parts:
                part.memory[part.begin : part.begin + len(part.view)] = part.view
            self.copied += 1
            done.set()

    def end(self) -> None:
        self._queue.put(None)

    def allocate(self, device: str, size_bytes: int) -> bytearray:
        assert device == "slow"
        self.memory.append(bytearray(size_bytes))
        return self.memory[-1]

    def pin(self, memory: memoryview) -> None:
        self.pinned.add(id(memory))

    def unpin(self, memory: memoryview) -> None:
        assert self.copied == self.asked, "unpinned under a copy"
        self.pinned.remove(id(memory))

    def copy(self, parts: Sequence[Part]) -> threading.Event:
        assert self.pinned
        done = threading.Event()
        self.asked += 1
        self.most_under_way = max(self.most_under_way, self.asked - self.copied)
        self._queue.put((parts, done))
        return done

    def is_done(self, event: threading.Event) -> bool:
        return event.is_set()

    def wait(self, event: threading.Event) -> None:
        assert event.wait(10)

    def close(self) -> None:
        assert self.copied == self.asked
        self.is_closed = True


def begun(reading: Reading, device: Any) -> Transfer:
    return Transfer(reading, lambda: device, lambda _name: "slow")


@pytest.fixture
def files(tmp_path: Path) -> list[FileRecord]:
    return [weights_file(tmp_path, f"{i}.safetensors", 9 * MB + 17 * i, MB) for i in range(3)]


@pytest.fixture
def stream(request: pytest.FixtureRequest) -> Iterator[SlowStream]:
    stream = SlowStream(request.param)
    thread = threading.Thread(target=stream.run)
    thread.start()
    yield stream
    stream.end()
    thread.join()


@pytest.mark.parametrize("stream", [0.0, 0.01], indirect=True, ids=["fast device", "slow device"])
@pytest.mark.parametrize("how", [{"ring_bytes": 4 * MB}, {"ring_bytes": 4 * MB, "beside": True}, {}], ids=str)
def test_every_byte_gets_there(
    tmp_path: Path, files: list[FileRecord], stream: SlowStream, how: dict[str, int]
) -> None:
    """A slot that went back too early would be overwritten by the next block before the stream came to copy it."""
    reading = start(tmp_path, files, MB, **how)
    transfer = begun(reading, stream)
    transfer.wait()
    for file in files:
        data = (tmp_path / file.path).read_bytes()
        assert [slab.memory for slab in transfer.slabs[file.path]] == [data[transfer.headers[file.path].data_start :]]
    assert not stream.pinned
    assert stream.is_closed
    if how.get("ring_bytes"):
        assert stream.most_under_way <= 4
    reading.close()


@pytest.mark.parametrize("stream", [0.0], indirect=True)
def test_other_files_are_left_to_their_waiters(tmp_path: Path, files: list[FileRecord], stream: SlowStream) -> None:
    small = write(tmp_path, "config.json", 100, MB)
    reading = start(tmp_path, [small, *files], MB, ring_bytes=4 * MB)
    transfer = begun(reading, stream)
    transfer.wait()
    assert reading.wait("config.json") == (tmp_path / "config.json").read_bytes()
    assert "config.json" not in transfer.slabs
    reading.close()


@pytest.mark.parametrize("stream", [0.01], indirect=True)
def test_a_wrong_block_stops_it_after_the_copies_under_way(
    tmp_path: Path, files: list[FileRecord], stream: SlowStream
) -> None:
    with (tmp_path / files[1].path).open("r+b") as file:
        file.seek(5 * MB)
        file.write(os.urandom(10))
    reading = start(tmp_path, files, MB, ring_bytes=4 * MB)
    with pytest.raises(DigestMismatch, match=files[1].path):
        begun(reading, stream).wait()
    assert stream.copied == stream.asked
    assert not stream.pinned
    assert stream.is_closed
    reading.close()


@pytest.mark.parametrize("stream", [0.0], indirect=True)
def test_a_reading_that_is_closed_ends_it(tmp_path: Path, files: list[FileRecord], stream: SlowStream) -> None:
    reading = Reading(ring_bytes=4 * MB)
    reading.add(tmp_path, files, block_bytes=MB)  # and never `no_more`
    threading.Timer(0.2, reading.close).start()
    transfer = begun(reading, stream)
    with pytest.raises(OSError, match="closed"):
        transfer.wait()
    transfer.end()


def test_a_device_that_cannot_be_opened_is_an_error_of_the_waiter(tmp_path: Path, files: list[FileRecord]) -> None:
    def refuse() -> Any:
        raise DeviceFailed("no")

    reading = start(tmp_path, files, MB, ring_bytes=4 * MB)
    transfer = Transfer(reading, refuse, lambda _name: "slow")
    for use in (transfer.wait, lambda: transfer.prepare(files[0].path)):
        with pytest.raises(DeviceFailed, match="no"):
            use()
    reading.close()


class FakeCuda:
    """torch.cuda's streams, events and runtime, as far as they are used, noting what was asked of them in what order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.register = 0

    class Stream:
        cuda: FakeCuda

        def __init__(self, device: torch.device) -> None:
            self.cuda.calls.append("stream")

        def wait_stream(self, other: object) -> None:
            assert other == "current"
            self.cuda.calls.append("wait for the current stream")

        def __enter__(self) -> None:
            self.cuda.calls.append("copy")

        def __exit__(self, *_: object) -> None: ...

        def record_event(self) -> FakeCuda.Event:
            self.cuda.calls.append("record")
            return FakeCuda.Event(self.cuda)

    class Event:
        def __init__(self, cuda: FakeCuda) -> None:
            self.cuda = cuda

        def query(self) -> bool:
            return False

        def synchronize(self) -> None:
            self.cuda.calls.append("synchronize")

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert address % 4096 == 0
        assert size == 8 << 20, "one slot"
        self.calls.append("register")
        return self.register

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append("unregister")
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(FakeCuda.Stream, "cuda", fake, raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", FakeCuda.Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: "current")
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    return fake


@pytest.mark.parametrize("refused", [False, True])
def test_torch_copies_on_a_stream_of_its_own_out_of_memory_that_is_pinned_meanwhile(
    cuda: FakeCuda, store: ModelStore, tmp_path: Path, refused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.register = int(refused)
    save(MODELS["llama"](), tmp_path / "original", shards=True)
    snapshot = store.ensure(f"file://{tmp_path}/original")
    reading = start_reading(snapshot, ring_bytes=1)
    device = TorchDevices(["cuda:0"])
    device._streams = {torch.device("cpu"): next(iter(device._streams.values()))}
    transfer = Transfer(reading, lambda: device, lambda _name: "cpu:0")
    weights = ArrivingTensors(reading, transfer, Timeline())
    weights.prepare(snapshot)
    tensors = weights.wait()
    reading.close()
    for name, tensor in load_tensors(snapshot, "cpu").items():
        assert torch.equal(tensors[name], tensor)
    shards = len(snapshot.weights)
    assert cuda.calls[0] == "stream"
    assert cuda.calls.count("wait for the current stream") == shards, "memory of each came from others"
    assert cuda.calls.count("register") == (1 if refused else cuda.calls.count("unregister"))
    assert cuda.calls.count("copy") == cuda.calls.count("record") == shards
    assert cuda.calls[-1] == ("synchronize" if refused else "unregister")
    assert ("cannot be pinned" in caplog.text) == refused
