"""The other end of the ring, against a device that takes its time: order, and how long each slot is left alone."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from modelstore import ModelStore
from modelstore.errors import DigestMismatch
from modelstore.load.device import transfer
from modelstore.load.reader import LoadedBlock, Reading, start_reading
from modelstore.load.tensors import Weights, load_tensors
from modelstore.load.torch_device import CudaDevices
from modelstore.timeline import Timeline
from modelstore.volume.manifest import FileRecord
from tests.support.models import MODELS, save
from tests.support.readings import MB, start, write


@dataclass
class SlowStream:
    """A device with one stream: it copies in its own thread, in order, some time after it was asked to."""

    delay_s: float
    received: dict[str, bytearray]
    pinned: set[int] = field(default_factory=set)
    most_under_way: int = 0
    asked: int = 0
    copied: int = 0
    _queue: queue.Queue[tuple[LoadedBlock, memoryview, threading.Event] | None] = field(default_factory=queue.Queue)

    def run(self) -> None:
        while (work := self._queue.get()) is not None:
            arrival, view, done = work
            time.sleep(self.delay_s)
            self.received[arrival.path][arrival.offset : arrival.offset + arrival.length] = view
            self.copied += 1
            done.set()

    def end(self) -> None:
        self._queue.put(None)

    def pin(self, memory: memoryview) -> None:
        self.pinned.add(id(memory))

    def unpin(self, memory: memoryview) -> None:
        assert self.copied == self.asked, "unpinned under a copy"
        self.pinned.remove(id(memory))

    def copy(self, arrival: LoadedBlock, view: memoryview) -> threading.Event:
        assert self.pinned
        done = threading.Event()
        self.asked += 1
        self.most_under_way = max(self.most_under_way, self.asked - self.copied)
        self._queue.put((arrival, view, done))
        return done

    def wait(self, event: threading.Event) -> None:
        assert event.wait(10)


@pytest.fixture
def files(tmp_path: Path) -> list[FileRecord]:
    return [write(tmp_path, f"{i}.safetensors", 9 * MB + 17 * i, MB) for i in range(3)]


@pytest.fixture
def stream(files: list[FileRecord], request: pytest.FixtureRequest) -> Iterator[SlowStream]:
    stream = SlowStream(request.param, {file.path: bytearray(file.size_bytes) for file in files})
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
    transfer(reading, stream)
    for path, data in stream.received.items():
        assert data == (tmp_path / path).read_bytes()
    assert not stream.pinned
    if how.get("ring_bytes"):
        assert stream.most_under_way <= 4
    reading.close()


@pytest.mark.parametrize("stream", [0.0], indirect=True)
def test_other_files_are_left_to_their_waiters(tmp_path: Path, files: list[FileRecord], stream: SlowStream) -> None:
    small = write(tmp_path, "config.json", 100, MB)
    reading = start(tmp_path, [small, *files], MB, ring_bytes=4 * MB)
    transfer(reading, stream)
    assert reading.wait("config.json") == (tmp_path / "config.json").read_bytes()
    assert "config.json" not in stream.received
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
        transfer(reading, stream)
    assert stream.copied == stream.asked
    assert not stream.pinned
    reading.close()


@pytest.mark.parametrize("stream", [0.0], indirect=True)
def test_a_reading_that_is_closed_ends_it(tmp_path: Path, files: list[FileRecord], stream: SlowStream) -> None:
    reading = Reading(ring_bytes=4 * MB)
    reading.add(tmp_path, files, block_bytes=MB)  # and never `no_more`
    threading.Timer(0.2, reading.close).start()
    with pytest.raises(OSError, match="closed"):
        transfer(reading, stream)


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

        def synchronize(self) -> None:
            self.cuda.calls.append("synchronize")

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert address % 4096 == 0
        assert size >= 4 * (8 << 20)
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
def test_copies_go_on_a_stream_of_their_own_out_of_memory_that_is_pinned_meanwhile(
    cuda: FakeCuda, store: ModelStore, tmp_path: Path, refused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.register = int(refused)
    save(MODELS["llama"](), tmp_path / "original", shards=True)
    snapshot = store.ensure(f"file://{tmp_path}/original")
    reading = start_reading(snapshot, ring_bytes=1)
    weights = Weights(reading, {"": torch.device("cpu")})
    transfer(reading, CudaDevices(weights.parts, {torch.device("cpu")}))
    weights.complete(snapshot)
    tensors = weights.wait(Timeline())
    reading.close()
    for name, tensor in load_tensors(snapshot, "cpu").items():
        assert torch.equal(tensors[name], tensor)
    shards = len(snapshot.weights)
    assert cuda.calls[:4] == ["stream", "register", "wait for the current stream", "copy"]
    assert cuda.calls.count("wait for the current stream") == shards, "memory of each came from others"
    assert cuda.calls.count("copy") == cuda.calls.count("record") == cuda.calls.count("synchronize") == shards
    assert cuda.calls[-1] == ("synchronize" if refused else "unregister")
    assert ("cannot be pinned" in caplog.text) == refused
