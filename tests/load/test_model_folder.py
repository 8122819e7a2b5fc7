"""A snapshot's folder for a server: the path is fixed, the bytes are those that were compared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from modelstore import warmstart
from modelstore.errors import DigestMismatch, Refused
from modelstore.load.model_folder import ModelFolder
from modelstore.load.reader import Reading, start_reading
from modelstore.reference import parse_reference
from modelstore.runtime import OwnedFolder, runtime_folder
from modelstore.settings import Settings
from modelstore.store import ModelStore
from modelstore.volume.manifest import Manifest
from modelstore.volume.snapshots import Snapshot
from tests.support.checkpoints import write_repo

DIGEST = "import sys, hashlib, pathlib; print(hashlib.sha256(pathlib.Path(sys.argv[1]).read_bytes()).hexdigest())"
HOLD = """
import sys, time
from pathlib import Path
from modelstore.runtime import OwnedFolder
folder = OwnedFolder(Path(sys.argv[1]))
(folder.path / "mine").touch()
print(folder.path, flush=True)
sys.stdin.read()
folder.close()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of the test's own."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    write_repo(tmp_path / "source", shards=2)
    return ModelStore(tmp_path / "store").ensure(f"file://{tmp_path}/source")


@pytest.fixture
def holders(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that hold a folder until their input ends; each is started with `hold`."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def hold(holders: list[subprocess.Popen[str]], path: Path) -> Path:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    holders.append(process)
    assert process.stdout is not None
    return Path(process.stdout.readline().strip())


def digest_elsewhere(path: Path) -> str:
    """As another process sees the file."""
    done = subprocess.run([sys.executable, "-c", DIGEST, str(path)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def share(snapshot: Snapshot, reading: Reading, stack: ExitStack) -> None:
    folder = ModelFolder(snapshot, reading)
    stack.callback(folder.close)
    folder.link_to_memory(reading)


def assert_same(folder: Path, manifest: Manifest) -> None:
    for file in manifest.files:
        assert digest_elsewhere(folder / file.path) == file.sha256, file.path
        assert (folder / file.path).stat().st_size == file.size_bytes


def test_each_start_has_the_same_path(snapshot: Snapshot, temporary: Path) -> None:
    paths = set()
    for _start in range(2):
        reading = start_reading(snapshot, beside=True)
        folder = ModelFolder(snapshot, reading)
        paths.add(folder.path)
        folder.close()
        reading.close()
        assert not folder.path.exists()
    (path,) = paths
    assert path == temporary.joinpath(f"modelstore-{os.geteuid()}", *snapshot.key.parts)


def test_another_process_reads_the_weights_from_memory_until_they_are_let_go(snapshot: Snapshot) -> None:
    reading = start_reading(snapshot, beside=True)
    folder = ModelFolder(snapshot, reading)
    weights = folder.path / snapshot.weights[0].path
    assert weights.readlink() == snapshot.path / weights.name
    folder.link_to_memory(reading)
    assert weights.readlink().parts[:2] == ("/", "proc")
    assert_same(folder.path, snapshot.manifest)
    opened = weights.open("rb")
    folder.link_to_volume()
    reading.close()
    assert weights.readlink() == snapshot.path / weights.name
    assert_same(folder.path, snapshot.manifest)
    with opened:
        assert opened.read() == (snapshot.path / weights.name).read_bytes(), "who has it open is not disturbed"
    folder.close()


@pytest.mark.parametrize("how", [{"beside": False}, {"beside": True, "weights": False}])
def test_without_shared_memory_the_links_lead_to_the_volume(snapshot: Snapshot, how: dict[str, bool]) -> None:
    reading = start_reading(snapshot, **how)
    folder = ModelFolder(snapshot, reading)
    folder.link_to_memory(reading)
    assert {(folder.path / file.path).readlink().parent for file in snapshot.weights} == {snapshot.path}
    assert_same(folder.path, snapshot.manifest)
    folder.close()
    reading.close()


@pytest.mark.parametrize("damaged", ["config.json", "weights"])
def test_wrong_bytes_are_never_shared(snapshot: Snapshot, damaged: str) -> None:
    path = snapshot.path / (damaged if damaged != "weights" else snapshot.weights[0].path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    reading = start_reading(snapshot, beside=True)
    with ExitStack() as stack, pytest.raises(DigestMismatch):
        share(snapshot, reading, stack)
    reading.close()
    assert not runtime_folder().joinpath(*snapshot.key.parts).exists()


def test_a_model_larger_than_the_host_is_left_to_the_server(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("modelstore.load.memory.free_host_bytes", lambda: 1)
    settings = Settings(root=tmp_path / "store", model=parse_reference(f"file://{tmp_path}/source"))
    pending = warmstart.begin(settings, target="shared")
    folder = ModelFolder(pending.snapshot, pending.reading)
    folder.link_to_memory(pending.reading)
    assert (folder.path / snapshot.weights[0].path).readlink().parent == snapshot.path
    assert "the server will read the weights from the volume by itself" in caplog.text
    folder.close()
    pending.reading.close()
    pending.in_use.end()


def test_a_server_starts_on_an_empty_volume(tmp_path: Path) -> None:
    write_repo(tmp_path / "source")
    settings = Settings(root=tmp_path / "store", model=parse_reference(f"file://{tmp_path}/source"))
    pending = warmstart.begin(settings, target="shared")
    folder = ModelFolder(pending.snapshot, pending.reading)
    assert pending.timeline.outcome == "copied"
    assert_same(folder.path, pending.snapshot.manifest)
    folder.close()
    pending.reading.close()
    pending.in_use.end()


def test_a_folder_has_one_owner_and_each_clears_up_its_own(
    tmp_path: Path, holders: list[subprocess.Popen[str]]
) -> None:
    path = tmp_path / "runtime" / "folder"
    assert hold(holders, path) == path
    second = OwnedFolder(path)
    assert second.path == path.with_name("folder.2")
    assert (path / "mine").exists()
    second.close()
    assert not second.path.exists()
    assert (path / "mine").exists()
    holders[0].communicate("")
    assert not path.exists()


def test_the_folder_of_a_killed_process_is_taken_over_empty(
    tmp_path: Path, holders: list[subprocess.Popen[str]]
) -> None:
    path = tmp_path / "runtime" / "folder"
    hold(holders, path)
    holders[0].send_signal(signal.SIGKILL)
    holders[0].wait()
    assert (path / "mine").exists()
    folder = OwnedFolder(path)
    assert folder.path == path
    assert not list(path.iterdir())
    folder.close()


@pytest.mark.parametrize("planted", ["for all", "link", "file"])
def test_a_runtime_folder_that_others_can_write_is_refused(temporary: Path, planted: str) -> None:
    place = temporary / f"modelstore-{os.geteuid()}"
    if planted == "for all":
        place.mkdir()
        place.chmod(0o777)
    elif planted == "link":
        (temporary / "other").mkdir(mode=0o700)
        place.symlink_to("other")
    else:
        place.touch()
    with pytest.raises(Refused, match="TMPDIR"):
        runtime_folder()


def test_a_link_in_the_place_of_a_folder_is_removed_and_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").touch()
    path = tmp_path / "runtime" / "folder"
    path.parent.mkdir(mode=0o700)
    path.symlink_to(other)
    folder = OwnedFolder(path)
    assert (other / "precious").exists()
    assert not folder.path.is_symlink()
    folder.close()
