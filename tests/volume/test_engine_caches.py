"""Compiled code on the volume: the first wins, and nothing but what was published is ever used."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from modelstore.errors import IntegrityError, ModelStoreError, NoSpace
from modelstore.operate import inventory
from modelstore.settings import Settings
from modelstore.store import ModelStore
from modelstore.volume import archive, engine_caches
from modelstore.volume.archive import pack, unpack
from modelstore.volume.engine_caches import EngineCache, key_of
from modelstore.volume.evict import evict
from modelstore.volume.garbage import find_garbage
from modelstore.volume.layout import Layout, SnapshotKey
from modelstore.volume.snapshots import Snapshot
from modelstore.volume.space import Space
from tests.support.checkpoints import write_repo

KEY = SnapshotKey("org/name", "a" * 40, "float16")
FACTS = {"engine": "vLLM", "versions": {"torch": "2.13"}, "arguments": ["--dtype", "float16"]}
SECRET = "a secret of twenty characters"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    (tmp_path / "store").mkdir()
    return Layout(tmp_path / "store")


@pytest.fixture
def compiled(tmp_path: Path) -> Path:
    """A folder as a compiler leaves it."""
    folder = tmp_path / "compiled"
    (folder / "inductor" / "ab").mkdir(parents=True)
    (folder / "inductor" / "ab" / "kernel.so").write_bytes(os.urandom(100_000))
    (folder / "vllm").mkdir()
    (folder / "vllm" / "plan.json").write_text("{}")
    (folder / "vllm" / "empty.lock").touch()
    os.utime(folder / "vllm" / "plan.json", (1e9, 1e9 + 0.25))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def publish(layout: Layout, folder: Path, *, answer: str = "Paris", secret: str | None = None, **facts: Any) -> Path:
    cache = EngineCache(FACTS | facts, answer, pack(folder))
    assert engine_caches.publish(layout, KEY, cache, "w1", secret)
    return layout.engine_caches_of(KEY) / key_of(FACTS | facts)


def read(layout: Layout, secret: str | None = None) -> EngineCache | None:
    return engine_caches.read(layout, KEY, key_of(FACTS), secret)


def test_what_is_published_comes_back(layout: Layout, compiled: Path, tmp_path: Path) -> None:
    assert read(layout) is None
    publish(layout, compiled)
    cache = read(layout)
    assert cache is not None
    assert (cache.facts, cache.answer) == (FACTS, "Paris")
    (tmp_path / "restored").mkdir()
    unpack(cache.archive, tmp_path / "restored")
    assert contents(tmp_path / "restored") == contents(compiled)
    assert (tmp_path / "restored" / "vllm" / "plan.json").stat().st_mtime == 1e9 + 0.25


def test_the_first_wins(layout: Layout, compiled: Path) -> None:
    publish(layout, compiled)
    assert not engine_caches.publish(layout, KEY, EngineCache(FACTS, "Rome", b"other"), "w2", None)
    cache = read(layout)
    assert cache is not None
    assert cache.answer == "Paris"
    assert not list(layout.trash.iterdir())


@pytest.mark.parametrize("secret", ["another secret of its own", SECRET], ids=["another", "the same"])
@pytest.mark.parametrize("signed", [None, SECRET], ids=["unsigned", "signed"])
def test_with_a_secret_only_what_was_signed_with_it_is_used(
    layout: Layout, compiled: Path, signed: str | None, secret: str
) -> None:
    folder = publish(layout, compiled, secret=signed)
    assert SECRET not in (folder / "manifest.json").read_text()
    if signed == secret:
        assert read(layout, secret) is not None
    else:
        with pytest.raises(IntegrityError, match="not signed"):
            read(layout, secret)
    assert read(layout) is not None, "without a secret any is used"


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(change(manifest) or manifest))

    return damage


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def replace(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).rename(folder / "elsewhere")
        make(folder / name)

    return damage


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped bit": rewrite("archive.tar.zst", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "a cut archive": rewrite("archive.tar.zst", lambda data: data[: len(data) // 2]),
    "an empty archive": rewrite("archive.tar.zst", lambda _data: b""),
    "no archive": lambda folder: (folder / "archive.tar.zst").unlink(),
    "a link for the archive": replace("archive.tar.zst", lambda path: path.symlink_to("elsewhere")),
    "a pipe for the archive": replace("archive.tar.zst", os.mkfifo),
    "a folder for the archive": replace("archive.tar.zst", Path.mkdir),
    "a cut manifest": rewrite("manifest.json", lambda data: data[:-5]),
    "no JSON": rewrite("manifest.json", lambda _data: b"\xff\xfe"),
    "a deep manifest": rewrite("manifest.json", lambda _data: b"[" * 100_000),
    "a list": rewrite("manifest.json", lambda _data: b"[]"),
    "another format": edit(lambda manifest: manifest | {"format": 2}),
    "a further field": edit(lambda manifest: manifest | {"more": 1}),
    "a field less": edit(lambda manifest: manifest.pop("answer") and None),
    "an answer that is none": edit(lambda manifest: manifest | {"answer": ["Paris"]}),
    "other facts": edit(lambda manifest: manifest | {"facts": {"engine": "other"}}),
    "another checksum": edit(lambda manifest: manifest | {"sha256": "0" * 64}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_was_not_published_so_is_never_used(layout: Layout, compiled: Path, damage: str) -> None:
    DAMAGE[damage](publish(layout, compiled))
    with pytest.raises(IntegrityError):
        read(layout)


@pytest.mark.parametrize("change", ["archive", "answer", "facts", "hmac"])
def test_a_signed_cache_is_used_as_it_was_signed_or_not_at_all(layout: Layout, compiled: Path, change: str) -> None:
    folder = publish(layout, compiled, secret=SECRET)
    manifest = json.loads((folder / "manifest.json").read_text())
    if change == "archive":  # with a checksum that fits it
        other = publish(layout, compiled / "inductor", purpose="other")
        (folder / "archive.tar.zst").write_bytes((other / "archive.tar.zst").read_bytes())
        manifest |= {name: json.loads((other / "manifest.json").read_text())[name] for name in ("sha256", "bytes")}
    else:
        manifest[change] = {"answer": "Rome", "facts": FACTS | {"more": 1}, "hmac": "é"}[change]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError):
        read(layout, SECRET)


def test_without_a_manifest_it_is_damaged_and_a_planted_link_is_not_followed(layout: Layout, compiled: Path) -> None:
    folder = publish(layout, compiled)
    (folder / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match="no manifest"):
        read(layout)
    folder.rename(folder.with_name("b" * 32))
    folder.symlink_to("b" * 32)
    with pytest.raises(ModelStoreError, match="link"):
        read(layout)


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, linkname: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, linkname
    return info


def archive_of(*members: tarfile.TarInfo) -> bytes:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for info in members:
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    return zstandard.compress(plain.getvalue())


HOSTILE = {
    "an absolute name": lambda: archive_of(member("/tmp/evil")),
    "a name that leaves": lambda: archive_of(member("a/../../evil")),
    "a link": lambda: archive_of(member("a", tarfile.SYMTYPE, linkname="/etc/passwd")),
    "a link to write through": lambda: archive_of(member("a", tarfile.SYMTYPE, linkname="/tmp"), member("a/evil")),
    "a second name": lambda: archive_of(member("a"), member("b", tarfile.LNKTYPE, linkname="a")),
    "a device": lambda: archive_of(member("a", tarfile.CHRTYPE)),
    "a pipe": lambda: archive_of(member("a", tarfile.FIFOTYPE)),
    "a folder": lambda: archive_of(member("a", tarfile.DIRTYPE)),
    "too large": lambda: archive_of(member("a", size=2_000_001)),
    "too large together": lambda: archive_of(*(member(f"{n}", size=500_000) for n in range(5))),
    "too many": lambda: archive_of(*(member(f"{n}") for n in range(21))),
    "a name twice": lambda: archive_of(member("a"), member("a")),
    "a file below a file": lambda: archive_of(member("a"), member("a/b")),
    "control characters": lambda: archive_of(member("a\nb")),
    "no archive": lambda: zstandard.compress(os.urandom(5000)),
    "not compressed": lambda: os.urandom(5000),
    "cut": lambda: archive_of(member("a", size=1_000_000))[:40],
    "nothing": lambda: b"",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(archive, "UNPACKED_BYTES", 2_000_000)
    monkeypatch.setattr(archive, "FILES", 20)
    folder = tmp_path / "restored"
    folder.mkdir()
    with pytest.raises((IntegrityError, OSError)):
        unpack(HOSTILE[kind](), folder)
    assert all(not path.is_symlink() and tmp_path in path.resolve().parents for path in folder.rglob("*"))
    assert [path.name for path in tmp_path.iterdir()] == ["restored"]
    assert not Path("/tmp/evil").exists()


def test_only_regular_files_are_packed_and_only_so_many(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(compiled)
    (compiled / "link").symlink_to("/etc/passwd")
    os.mkfifo(compiled / "pipe")
    (tmp_path / "restored").mkdir()
    unpack(pack(compiled), tmp_path / "restored")
    assert contents(tmp_path / "restored") == before
    for limit, value in (("UNPACKED_BYTES", 99_999), ("FILES", 2), ("ARCHIVE_BYTES", 1000)):
        with monkeypatch.context() as patched:
            patched.setattr(archive, limit, value)
            with pytest.raises(NoSpace):
                pack(compiled)


def test_a_wrong_cache_is_moved_away_and_another_takes_its_place(layout: Layout, compiled: Path) -> None:
    folder = publish(layout, compiled)
    engine_caches.quarantine(layout, KEY, folder.name)
    engine_caches.quarantine(layout, KEY, folder.name)
    assert read(layout) is None
    assert [path.name for path in next(layout.quarantine.iterdir()).iterdir()]
    publish(layout, compiled)


@pytest.fixture
def snapshot(tmp_path: Path, layout: Layout) -> Snapshot:
    write_repo(tmp_path / "source")
    return ModelStore(layout.root).ensure(f"file://{tmp_path}/source")


def test_a_cache_is_counted_shown_and_goes_with_its_snapshot(
    layout: Layout, snapshot: Snapshot, compiled: Path
) -> None:
    settings = Settings(root=layout.root)
    before = Space(layout, settings).taken()
    cache = EngineCache(FACTS, "Paris", pack(compiled))
    engine_caches.publish(layout, snapshot.key, cache, "w1", None)
    (record,) = inventory.models(layout)
    (listed,) = record["engine_caches"]
    assert listed["key"] == key_of(FACTS)
    assert Space(layout, settings).taken() == before + listed["bytes"]
    assert inventory.space(layout, settings)["kinds"]["engine-caches"] == listed["bytes"]
    with pytest.raises(NoSpace, match="QUOTA"):
        Space(layout, Settings(root=layout.root, quota_bytes=before + 10)).check_room(11)
    assert evict(layout, snapshot.key, sleep=lambda _seconds: None)
    assert Space(layout, settings).taken() == 0


def test_caches_that_nobody_uses_are_collected(layout: Layout, snapshot: Snapshot, compiled: Path) -> None:
    publish(layout, compiled)  # of a snapshot that is not there
    cache = EngineCache(FACTS, "Paris", pack(compiled))
    engine_caches.publish(layout, snapshot.key, cache, "w1", None)
    assert {item.kind: item.path.parent.parent.name for item in find_garbage(layout, grace_s=0)} == {
        "engine cache": "org--name"
    }
    folder = layout.engine_caches_of(snapshot.key) / key_of(FACTS)
    for path in (*folder.iterdir(), folder):
        os.utime(path, (1e9, 1e9))
    assert len(find_garbage(layout, grace_s=0)) == 2
    engine_caches.note_use(layout, snapshot.key, key_of(FACTS))
    assert len(find_garbage(layout, grace_s=0)) == 1, "a use is a use"
