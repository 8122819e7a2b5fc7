"""Weights are stored while they arrive: what a conversion reads is verified last, and only then counts."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from modelstore import load_tensors
from modelstore.errors import NoSpace, WeightOverflow
from modelstore.fill.observer import Observer
from modelstore.fill.source import SourceFile
from modelstore.fill.staged_file import StagedFile
from modelstore.fill.stored_file import StoredFile
from modelstore.volume.checksums import Digests
from modelstore.volume.layout import SnapshotKey, StagingLayout
from modelstore.volume.manifest import FileRecord
from modelstore.volume.verify import verify_snapshot
from tests.conftest import MakeStore
from tests.support.checkpoints import LLAMA_CONFIG, published, write_repo
from tests.support.hub import Hub

SHAPE = (512, 512)
WEIGHTS = "model.safetensors"
MOVED = {"moved": (np.float16, "never")}
FORMS = {"converted": (np.float32, "never"), "compressed": (np.float16, "always"), "both": (np.float32, "always")}
WRONG = ("no safetensors", "a weight too large", "other weights", "other names", "another dtype")


class Memory(bytearray):
    """Memory that can be watched."""


class Keeping(Observer):
    """Gives memory to each file, and compares it with the record once that is said to be in it."""

    def __init__(self) -> None:
        self.given: list[int] = []
        self.compared: list[bool] = []

    def memory(self, key: SnapshotKey, path: str, size_bytes: int) -> memoryview:
        self.given.append(size_bytes)
        return memoryview(bytearray(size_bytes))

    def finished(self, key: SnapshotKey, folder: Path, record: FileRecord, memory: memoryview | None = None) -> None:
        if memory is not None:
            content = record.content
            self.compared.append(hashlib.sha256(memory[: content.size_bytes]).hexdigest() == content.sha256)


def wrong_file(right: Path, folder: Path, kind: str) -> Path:
    """A file of the same size with other bytes."""
    folder.mkdir()
    path = folder / right.name
    tensors = load_file(right)
    match kind:
        case "no safetensors":
            path.write_bytes(bytes(right.stat().st_size))
        case "a weight too large":
            tensors["layers.0.weight"][0, 0] = np.finfo(tensors["layers.0.weight"].dtype).max
        case "other weights":
            tensors["layers.0.weight"][0, 0] += 1
        case "other names":
            tensors = {f"other{name[5:]}": tensor for name, tensor in tensors.items()}
        case "another dtype":  # which is converted if this one is not, and the other way round
            data = right.read_bytes()
            end = 8 + int.from_bytes(data[:8], "little")
            header = {name: entry for name, entry in json.loads(data[8:end]).items() if name != "__metadata__"}
            for entry in header.values():
                entry["dtype"] = {"F16": "BF16", "F32": "I32"}[entry["dtype"]]
            path.write_bytes(data[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(end - 8) + data[end:])
    if not path.exists():
        save_file(tensors, path, metadata={"format": "pt"})
    assert path.stat().st_size == right.stat().st_size
    assert path.read_bytes() != right.read_bytes()
    return path


def sources(dtype: type, layers: int = 6) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {f"layers.{number}.weight": generator.standard_normal(SHAPE).astype(dtype) for number in range(layers)}


@pytest.mark.parametrize("form", FORMS | MOVED)
@pytest.mark.parametrize("kind", WRONG)
def test_of_wrong_bytes_nothing_counts_not_even_an_error(
    hub: Hub, make_store: MakeStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str, kind: str
) -> None:
    dtype, compress = (FORMS | MOVED)[form]
    tensors = sources(dtype)
    repo = write_repo(hub.folder / "org" / "name", tensors, config=LLAMA_CONFIG | {"torch_dtype": dtype.__name__})
    hub.faults.wrong_first[WEIGHTS] = wrong_file(repo / WEIGHTS, tmp_path / "wrong", kind)
    observer = Keeping()
    with caplog.at_level(logging.WARNING):
        snapshot = make_store(compress=compress).ensure("org/name", observer=observer)
    assert "fetching it once more" in caplog.text
    assert "overflow" not in caplog.text
    assert observer.given
    assert all(observer.compared)
    assert observer.compared or form == "moved"
    assert verify_snapshot(snapshot).ok
    loaded = load_tensors(snapshot)
    assert loaded.keys() == tensors.keys()
    assert all(np.array_equal(loaded[name].numpy(), tensors[name].astype(np.float16)) for name in tensors)


def test_an_error_of_right_bytes_counts(hub: Hub, make_store: MakeStore) -> None:
    tensors = sources(np.float32)
    tensors["layers.5.weight"][-1, -1] = 1e6
    write_repo(hub.folder / "org" / "name", tensors)
    store = make_store()
    with pytest.raises(WeightOverflow, match=r"layers\.5\.weight"):
        store.ensure("org/name")
    assert published(store) == []


@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_stored_while_its_own_bytes_arrive(
    hub: Hub, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    dtype, compress = FORMS[form]
    write_repo(hub.folder / "org" / "name", sources(dtype, layers=30))
    write, finish = StoredFile.write, StagedFile.finish
    written: list[int] = []
    before_the_last_byte: list[int] = []

    def counted(stored: StoredFile, data: bytes) -> None:
        write(stored, data)
        written.append(len(data))

    def finished(staged: StagedFile) -> Digests:
        if staged.file.path == WEIGHTS:
            before_the_last_byte.append(sum(written))
        return finish(staged)

    monkeypatch.setattr(StoredFile, "write", counted)
    monkeypatch.setattr(StagedFile, "finish", finished)
    hub.faults.bytes_per_s = 20e6
    make_store(compress=compress).ensure("org/name")
    assert before_the_last_byte[0] >= 0.4 * sum(written)


@pytest.mark.parametrize("form", FORMS | MOVED)
def test_a_file_has_the_memory_of_one(hub: Hub, make_store: MakeStore, form: str) -> None:
    """A config that names another dtype than the weights have: the memory for what comes is given back."""
    dtype, compress = (FORMS | MOVED)[form]
    write_repo(hub.folder / "org" / "name", sources(dtype), config=LLAMA_CONFIG | {"torch_dtype": "float16"})
    taken: list[bool] = []

    class Watching(Keeping):
        def memory(self, key: SnapshotKey, path: str, size_bytes: int) -> memoryview:
            deadline = time.monotonic() + 5  # a thread may just be making digests of it
            while any(reference() is not None for reference in references) and time.monotonic() < deadline:
                time.sleep(0.01)
            taken.extend(reference() is not None for reference in references)
            data = Memory(size_bytes)
            references.append(weakref.ref(data))
            return memoryview(data)

    references: list[weakref.ref[Memory]] = []
    make_store(compress=compress).ensure("org/name", observer=Watching())
    assert references
    assert not any(taken)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_conversion_that_fails_stops_the_download(
    hub: Hub, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    repo = write_repo(hub.folder / "org" / "name", sources(np.float32, layers=30), shards=shards)

    def full(_file: StoredFile, _data: object) -> None:
        raise NoSpace("the volume is full", free_bytes=0)

    monkeypatch.setattr(StoredFile, "write", full)
    hub.faults.bytes_per_s = 8e6  # so that connections hold few bytes that were sent ahead
    with pytest.raises(NoSpace, match="the volume is full"):
        make_store().ensure("org/name")
    assert hub.served.total_bytes < sum(path.stat().st_size for path in repo.glob("*.safetensors")) / 2


class SlowCopies:
    """Copies that wait until they may end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()
        monkeypatch.setattr("modelstore.fill.staged_file.copy_bytes", self.copy)

    def copy(self, target: memoryview, source: bytes) -> None:
        self.begun.set()
        assert self.may_end.wait(10)
        if source.startswith(b"fails"):
            raise MemoryError
        target[: len(source)] = source


@pytest.mark.parametrize("data", [b"12345678", b"fails   "])
def test_memory_is_handed_over_when_no_copy_goes_there_any_more(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = SlowCopies(monkeypatch)
    staged = StagedFile(SourceFile(WEIGHTS, 8), StagingLayout(tmp_path), memoryview(bytearray(8)))
    with ThreadPoolExecutor() as pool:
        putting = pool.submit(staged.put, 0, data)
        assert copies.begun.wait(10)
        taking = pool.submit(staged.take_memory)
        with pytest.raises(TimeoutError):
            taking.result(0.1)
        copies.may_end.set()
        taken = taking.result(10)
        assert taken is not None
        assert isinstance(putting.exception(10), MemoryError) if data.startswith(b"fails") else taken == data
    staged.close()


def test_the_first_of_two_that_bring_the_same_bytes_is_kept_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their bytes may differ: what was digested, what is in memory and what is on the volume may not."""
    copies, right = SlowCopies(monkeypatch), b"12345678"
    file = SourceFile(WEIGHTS, 8, sha256=hashlib.sha256(right).hexdigest())
    staged = StagedFile(file, StagingLayout(tmp_path), memoryview(bytearray(8)))
    with ThreadPoolExecutor() as pool:
        first = pool.submit(staged.put, 0, right)
        assert copies.begun.wait(10)
        second = pool.submit(staged.put, 0, b"others!!")
        with pytest.raises(TimeoutError):
            second.result(0.1)
        copies.may_end.set()
        assert (first.result(10), second.result(10)) == (True, False)
    assert staged.finish().sha256 == file.sha256
    assert staged.take_memory() == right == staged.path.read_bytes()
