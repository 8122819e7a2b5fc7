"""A snapshot that another process opens from this one's memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from handler.engines.server import MemoryBackedSnapshot
from modelstore import warmstart
from modelstore.errors import DigestMismatch
from modelstore.load.reader import start_reading
from modelstore.reference import parse_reference
from modelstore.settings import Settings
from modelstore.store import ModelStore
from modelstore.volume.manifest import Manifest
from modelstore.volume.snapshots import Snapshot
from tests.support.checkpoints import write_repo

DIGEST = "import sys, hashlib, pathlib; print(hashlib.sha256(pathlib.Path(sys.argv[1]).read_bytes()).hexdigest())"


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    write_repo(tmp_path / "source", shards=2)
    return ModelStore(tmp_path / "store").ensure(f"file://{tmp_path}/source")


def digest_elsewhere(path: Path) -> str:
    """As another process sees the file."""
    done = subprocess.run([sys.executable, "-c", DIGEST, str(path)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def assert_same(folder: Path, manifest: Manifest) -> None:
    for file in manifest.files:
        assert digest_elsewhere(folder / file.path) == file.sha256, file.path
        assert (folder / file.path).stat().st_size == file.size_bytes


def test_another_process_reads_the_weights_from_memory_until_they_are_let_go(snapshot: Snapshot) -> None:
    folder = MemoryBackedSnapshot(snapshot, start_reading(snapshot, beside=True))
    weights = snapshot.weights[0].path
    assert (folder.path / weights).readlink().parts[:2] == ("/", "proc")
    assert_same(folder.path, snapshot.manifest)
    opened = (folder.path / weights).open("rb")
    folder.release_memory()
    assert (folder.path / weights).readlink() == snapshot.path / weights
    assert_same(folder.path, snapshot.manifest)
    with opened:
        assert opened.read() == (snapshot.path / weights).read_bytes(), "who has it open is not disturbed"
    folder.close()
    assert not folder.path.exists()


@pytest.mark.parametrize("how", [{"beside": False}, {"beside": True, "weights": False}])
def test_without_shared_memory_the_links_lead_to_the_volume(snapshot: Snapshot, how: dict[str, bool]) -> None:
    folder = MemoryBackedSnapshot(snapshot, start_reading(snapshot, **how))
    assert {(folder.path / file.path).readlink().parent for file in snapshot.weights} == {snapshot.path}
    assert_same(folder.path, snapshot.manifest)
    folder.release_memory()
    folder.close()


def test_wrong_bytes_are_never_shared(snapshot: Snapshot) -> None:
    path = snapshot.path / snapshot.weights[0].path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    reading = start_reading(snapshot, beside=True)
    with pytest.raises(DigestMismatch):
        MemoryBackedSnapshot(snapshot, reading)
    reading.close()


def test_a_model_larger_than_the_host_is_left_to_the_server(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("modelstore.load.memory.free_host_bytes", lambda: 1)
    settings = Settings(root=tmp_path / "store", model=parse_reference(f"file://{tmp_path}/source"))
    pending = warmstart.begin(settings, target="shared")
    folder = MemoryBackedSnapshot(pending.snapshot, pending.reading)
    assert (folder.path / snapshot.weights[0].path).readlink().parent == snapshot.path
    assert "the server will read the weights from the volume by itself" in caplog.text
    folder.release_memory()
    folder.close()
    pending.in_use.end()


def test_a_server_starts_on_an_empty_volume(tmp_path: Path) -> None:
    write_repo(tmp_path / "source")
    settings = Settings(root=tmp_path / "store", model=parse_reference(f"file://{tmp_path}/source"))
    pending = warmstart.begin(settings, target="shared")
    folder = MemoryBackedSnapshot(pending.snapshot, pending.reading)
    assert pending.timeline.outcome == "copied"
    assert_same(folder.path, pending.snapshot.manifest)
    folder.release_memory()
    folder.close()
    pending.in_use.end()
