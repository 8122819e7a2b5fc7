"""Weights for other processes: as they arrive, from one memory, and only what was compared."""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from modelstore.errors import DigestMismatch, ProcessFailed
from modelstore.load import weights_socket
from modelstore.load.reader import Reading, start_reading
from modelstore.load.weights_socket import WeightsClient, WeightsServer, connect, shared_files
from modelstore.store import ModelStore
from modelstore.volume.snapshots import Snapshot
from tests.support.checkpoints import write_repo
from tests.support.readings import children, start, weights_file


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    write_repo(tmp_path / "source", shards=3)
    return ModelStore(tmp_path / "store").ensure(f"file://{tmp_path}/source")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WeightsServer]:
    server = WeightsServer(tmp_path / "socket", tmp_path / "folder")
    yield server
    server.close()


def taken(weights: WeightsClient) -> dict[str, bytes]:
    """All bytes of all files, waited for in small steps."""
    for file in weights.files:
        for end in range(1, file.size_bytes + 1, max(1, file.size_bytes // 7)):
            weights.wait(file, end)
        weights.wait(file, file.size_bytes)
    return {file.path: bytes(file.memory) for file in weights.files}


def standing_still(snapshot: Snapshot) -> tuple[Reading, int]:
    """A reading whose process is stopped, and the id of that."""
    before = set(children())
    reading = start_reading(snapshot, beside=True)
    (reader,) = set(children()) - before
    os.kill(int(reader), signal.SIGSTOP)
    return reading, int(reader)


def on_volume(snapshot: Snapshot) -> dict[str, bytes]:
    return {file.path: (snapshot.path / file.path).read_bytes() for file in snapshot.weights}


def test_every_byte_arrives_in_each_process_from_one_memory(
    snapshot: Snapshot, server: WeightsServer, tmp_path: Path
) -> None:
    reading = start_reading(snapshot, beside=True)
    server.serve(reading, shared_files(snapshot, reading))
    with connect(tmp_path / "socket") as first, connect(tmp_path / "socket") as second:
        assert first.folder == str(tmp_path / "folder")
        assert taken(first) == taken(second) == on_volume(snapshot)
        maps = Path("/proc/self/maps").read_text()
        mapped = Counter(re.findall(r" (\d+) +/memfd:modelstore", maps))
        assert list(mapped.values()).count(3) == len(first.files), "by the reader and by each client"
        first.files[0].memory[:4] = b"mine"
        assert bytes(second.files[0].memory) == on_volume(snapshot)[second.files[0].path]
    reading.close()


def test_a_client_is_told_the_files_before_they_arrive(
    snapshot: Snapshot, server: WeightsServer, tmp_path: Path
) -> None:
    reading, reader = standing_still(snapshot)
    server.serve(reading, shared_files(snapshot, reading))
    with connect(tmp_path / "socket") as weights:
        assert [file.path for file in weights.files] == [file.path for file in snapshot.weights]
        threading.Timer(0.2, os.kill, (reader, signal.SIGCONT)).start()
        assert taken(weights) == on_volume(snapshot)
    reading.close()


def test_a_client_that_is_there_first_waits_for_the_reading(
    snapshot: Snapshot, server: WeightsServer, tmp_path: Path
) -> None:
    reading = start_reading(snapshot, beside=True)
    threading.Timer(0.2, server.serve, (reading, shared_files(snapshot, reading))).start()
    with connect(tmp_path / "socket") as weights:
        assert taken(weights) == on_volume(snapshot)
    reading.close()


def test_bytes_that_are_wrong_come_from_the_next_reading(
    snapshot: Snapshot, server: WeightsServer, tmp_path: Path
) -> None:
    right = on_volume(snapshot)
    intact = tmp_path / "intact"
    shutil.copytree(snapshot.path, intact)
    path = snapshot.path / snapshot.weights[1].path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    reading = start_reading(snapshot, beside=True)
    server.serve(reading, shared_files(snapshot, reading))
    with connect(tmp_path / "socket") as weights:
        with pytest.raises(DigestMismatch):
            reading.wait_all()
        following = start_reading(Snapshot(intact, snapshot.manifest), beside=True)
        threading.Timer(0.2, server.serve, (following, shared_files(snapshot, following))).start()
        assert taken(weights) == right
    reading.close()
    following.close()


def test_a_client_learns_why_nothing_more_comes(snapshot: Snapshot, server: WeightsServer, tmp_path: Path) -> None:
    path = snapshot.path / snapshot.weights[0].path
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    reading = start_reading(snapshot, beside=True)
    server.serve(reading, shared_files(snapshot, reading))
    with connect(tmp_path / "socket") as weights:
        threading.Timer(0.2, server.close).start()
        with pytest.raises(ProcessFailed, match="differs from the published bytes"):
            taken(weights)
    reading.close()


def test_more_files_than_one_message_has_room_for(server: WeightsServer, tmp_path: Path) -> None:
    files = [weights_file(tmp_path, f"{number}.safetensors", 100) for number in range(150)]
    reading = start(tmp_path, files, beside=True)
    server.serve(reading, files)
    with connect(tmp_path / "socket") as weights:
        assert taken(weights) == {file.path: (tmp_path / file.path).read_bytes() for file in files}
    reading.close()


def test_it_is_idle_when_those_that_came_have_loaded(snapshot: Snapshot, server: WeightsServer, tmp_path: Path) -> None:
    reading = start_reading(snapshot, beside=True)
    server.serve(reading, shared_files(snapshot, reading))
    with connect(tmp_path / "socket") as first, connect(tmp_path / "socket") as second:
        taken(first)
        assert not server.is_idle
        second.tell_loaded()  # it has wanted a part alone
        first.tell_loaded()
    wait_until(lambda: server.is_idle)
    with connect(tmp_path / "socket") as weights:
        assert not server.is_idle
        taken(weights)
    wait_until(lambda: server.is_idle)
    reading.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_a_client_is_told_if_another_reading_has_no_weights(
    snapshot: Snapshot, server: WeightsServer, tmp_path: Path
) -> None:
    reading, reader = standing_still(snapshot)
    server.serve(reading, shared_files(snapshot, reading))
    with connect(tmp_path / "socket") as weights:
        reading.failed(DigestMismatch("damaged"))
        os.kill(reader, signal.SIGCONT)
        server.serve(start_reading(snapshot), [])
        with pytest.raises(ProcessFailed, match="without them"):
            weights.wait(weights.files[-1], weights.files[-1].size_bytes)
    reading.close()


@pytest.mark.timeout(60)
def test_a_reading_is_sent_to_its_end_if_another_one_comes_meanwhile(
    snapshot: Snapshot, server: WeightsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, other = start_reading(snapshot, beside=True), start_reading(snapshot)
    send = weights_socket._send

    def sent_and_exchanged(client: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        send(client, message, descriptors)
        server.serve(other, [])

    monkeypatch.setattr(weights_socket, "_send", sent_and_exchanged)
    server.serve(reading, shared_files(snapshot, reading))
    with connect(tmp_path / "socket") as weights:
        assert taken(weights) == on_volume(snapshot)
    reading.close()
    other.close()


def test_a_connection_that_fails_ends_and_is_not_taken_for_a_reading_that_did(
    snapshot: Snapshot, server: WeightsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = start_reading(snapshot, beside=True)
    with monkeypatch.context() as patched:
        patched.setattr(reading, "shared_descriptor", lambda _path: -1)
        server.serve(reading, snapshot.weights)
        with pytest.raises(ConnectionResetError), connect(tmp_path / "socket"):
            pass
    server.serve(reading, snapshot.weights)
    with connect(tmp_path / "socket") as weights:
        assert taken(weights) == on_volume(snapshot)
        weights.tell_loaded()
    wait_until(lambda: server.is_idle)
    reading.close()


def test_the_memory_goes_with_its_last_user(snapshot: Snapshot, server: WeightsServer, tmp_path: Path) -> None:
    of_other_tests = mapped_files()
    reading = start_reading(snapshot, beside=True)
    server.serve(reading, shared_files(snapshot, reading))
    with connect(tmp_path / "socket") as weights:
        reading.wait_all()
        before = mapped_files()
        assert before > of_other_tests
        server.close()
        reading.close()
        reading.release_memory()
        assert of_other_tests < mapped_files() < before
        assert taken(weights) == on_volume(snapshot)
    del weights
    gc.collect()
    assert mapped_files() <= of_other_tests


def mapped_files() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:modelstore")


def test_nobody_serves_after_the_end(snapshot: Snapshot, server: WeightsServer, tmp_path: Path) -> None:
    server.close()
    with pytest.raises(OSError, match="No such file"), connect(tmp_path / "socket"):
        pass


def test_memory_that_no_other_process_sees_is_not_offered(snapshot: Snapshot) -> None:
    for how in ({"beside": False}, {"beside": True, "weights": False}):
        reading = start_reading(snapshot, **how)
        assert shared_files(snapshot, reading) == []
        reading.close()


def test_the_first_bytes_count_without_gaps(tmp_path: Path) -> None:
    reading = Reading()
    file = weights_file(tmp_path, "a.safetensors", 10 * 4096)
    reading.adopt(tmp_path, file, memoryview((tmp_path / file.path).read_bytes()), block_bytes=4096)
    assert reading.wait_beyond(file.path, 0) == file.size_bytes
    reading.close()
