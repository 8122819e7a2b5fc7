"""The one room that changes the volume: a full volume is NoSpace wherever it shows, and nothing is left half-done."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from modelstore.errors import NoSpace, RootUnusable, UnsafeName
from modelstore.load.blocks import CachedPages
from modelstore.store import ModelStore
from modelstore.volume import durable, tree
from modelstore.volume.evict import evict
from modelstore.volume.verify import verify_snapshot
from tests.support.checkpoints import write_repo
from tests.support.hub import Hub


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, int], list[int]]:
    """Let one function of `os` fail, from its third call on files of the store on; counts how often it did."""
    real_open = os.open
    ours: set[int] = set()

    def watch_open(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        fd = real_open(path, flags, *rest, **options)
        if "modelstore" in str(path) and flags & (os.O_RDWR | os.O_WRONLY) and "claims" not in str(path):
            ours.add(fd)
        else:
            ours.discard(fd)
        return fd

    def fail(name: str, number: int) -> list[int]:
        real, failed, calls = getattr(os, name), [0], [0]

        def function(*arguments: Any, **options: Any) -> Any:
            on_ours = arguments[0] in ours if isinstance(arguments[0], int) else "modelstore" in str(arguments[0])
            calls[0] += on_ours
            if on_ours and calls[0] > 2:
                failed[0] += 1
                if name == "close":
                    real(*arguments)
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        monkeypatch.setattr(os, "open", watch_open)
        monkeypatch.setattr(os, name, function)
        return failed

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("name", ["pwrite", "fsync", "close", "ftruncate", "mkdir"])
def test_a_full_volume_is_one_typed_error_wherever_it_shows(
    hub: Hub,
    store: ModelStore,
    failing: Callable[[str, int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    number: int,
) -> None:
    write_repo(hub.folder / "org" / "name", shards=2)
    with monkeypatch.context():
        failed = failing(name, number)
        with pytest.raises(NoSpace) as caught:
            store.ensure("org/name")
        assert failed[0]
    assert caught.value.exit_code == 6
    assert os.strerror(number) in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert not list(store.settings.root.glob("models/*/*"))
    assert store.ensure("org/name").path.exists()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_volume_that_takes_no_writes_is_named(
    hub: Hub, store: ModelStore, failing: Callable[[str, int], list[int]], number: int
) -> None:
    write_repo(hub.folder / "org" / "name")
    failing("pwrite", number)
    with pytest.raises(RootUnusable, match="MODELSTORE_ROOT"):
        store.ensure("org/name")


def test_a_second_publisher_does_not_replace_the_first(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    assert durable.publish_folder(tmp_path / "a", tmp_path / "models" / "x")
    assert not durable.publish_folder(tmp_path / "b", tmp_path / "models" / "x")
    assert (tmp_path / "models" / "x" / "file").read_text() == "a"


def test_a_file_is_the_old_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record"
    durable.write_atomic(path, b"old")

    def fail(*_arguments: Any) -> None:
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no"):
        durable.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"


def test_links_are_told_from_folders_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "dangling").symlink_to("nowhere")
    tree.check_no_links(tmp_path, tmp_path / "real" / "deep" / "not there" / "at all")
    for path in ("link/deep/x", "link", "real/dangling"):
        with pytest.raises(UnsafeName, match="is a link"):
            tree.check_no_links(tmp_path, tmp_path / path)


def test_a_folder_is_measured_while_others_write_into_it(tmp_path: Path) -> None:
    """As a waiting worker does with the staging of another one."""
    for number in range(20):
        (tmp_path / f"{number}").write_bytes(bytes(4096))
    has_ended = threading.Event()

    def write() -> None:
        while not has_ended.is_set():
            for number in range(20):
                durable.write_atomic(tmp_path / f"{number}", bytes(4096))
            (tmp_path / "sub").mkdir()
            (tmp_path / "sub").rename(tmp_path / "moved")
            (tmp_path / "moved").rmdir()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(2000):
            assert 0 < tree.tree_bytes(tmp_path) <= 21 * 4096
            assert tree.tree_blocks(tmp_path) > 0
    finally:
        has_ended.set()
        writer.join()
    assert tree.tree_bytes(tmp_path) == 20 * 4096


def test_hard_links_are_counted_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(bytes(100))
    durable.link(tmp_path / "a", tmp_path / "sub" / "b")
    durable.link(tmp_path / "a", tmp_path / "sub" / "b")
    (tmp_path / "c").write_bytes(bytes(7))
    (tmp_path / "sub" / "d").symlink_to("/etc/passwd")
    assert tree.tree_bytes(tmp_path) == 107
    assert tree.tree_bytes(tmp_path / "nowhere") == 0
    with pytest.raises(FileExistsError):
        durable.link(tmp_path / "c", tmp_path / "sub" / "b")


def test_a_folder_that_goes_while_its_siblings_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("a")
    scandir, asked = os.scandir, []

    class Entry:
        """One that tells whether it was asked for its state."""

        def __init__(self, real: os.DirEntry[str]) -> None:
            self.name, self.is_dir, self._real = real.name, real.is_dir, real

        def stat(self, *, follow_symlinks: bool) -> os.stat_result:
            asked.append(self.name)
            return self._real.stat(follow_symlinks=follow_symlinks)

    def scan(folder: Path) -> Any:
        entries = [Entry(entry) for entry in scandir(folder)]
        (tmp_path / "b").rmdir()
        return nullcontext(entries)

    monkeypatch.setattr(os, "scandir", scan)
    assert tree.folder_names(tmp_path) == ["a", "b", "c"], "whoever looks below finds nothing there"
    assert sorted(asked) == ["a", "b", "c"], "this makes the file system send the states of the next ones, too"
    monkeypatch.undo()
    assert tree.folder_names(tmp_path) == ["a", "c"]
    assert tree.folder_names(tmp_path / "b") == []


def test_a_file_that_comes_in_short_reads_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FUSE gives it with direct I/O."""
    path = tmp_path / "record"
    path.write_bytes(bytes(range(250)) * 4)
    real = os.read
    monkeypatch.setattr(os, "read", lambda fd, count: real(fd, min(count, 300)))
    for limit in (1000, 1001, 1500, 100_000):
        assert durable.read_file(path, limit) == bytes(range(250)) * 4
    with pytest.raises(OSError, match="larger than"):
        durable.read_file(path, 999)


def stale_once(monkeypatch: pytest.MonkeyPatch, name: str, wanted: str) -> list[str]:
    """Let a call of `os` on one name say ESTALE the first time; returns the calls."""
    real, calls = getattr(os, name), []

    def once(path: Any, *rest: Any, **options: Any) -> Any:
        if str(path).endswith(wanted):
            calls.append(str(path))
            if len(calls) == 1:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return real(path, *rest, **options)

    monkeypatch.setattr(os, name, once)
    return calls


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("open", "config.json"),
        ("open", "manifest.json"),
        ("lstat", "model.safetensors"),
        ("listdir", "models/org--name"),
    ],
)
def test_a_stale_name_is_looked_up_again(
    hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch, call: str, name: str
) -> None:
    write_repo(hub.folder / "org" / "name")
    snapshot = store.ensure("org/name")
    calls = stale_once(monkeypatch, call, name)
    again = store.lookup("org/name")
    assert again is not None
    assert again.config()
    assert tree.names(store.layout.models / "org--name") == [snapshot.path.name]
    assert len(calls) >= 2


def test_a_name_that_stays_stale_is_an_error_and_no_damage(
    hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_repo(hub.folder / "org" / "name")
    snapshot = store.ensure("org/name")
    real = os.lstat

    def stale(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("model.safetensors"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", stale)
        with pytest.raises(RootUnusable, match="Stale"):
            store.ensure("org/name")
    again = store.lookup("org/name")
    assert again is not None
    assert again.manifest == snapshot.manifest
    assert not store.layout.quarantine.exists()


def test_files_that_nfs_keeps_while_they_are_open_hold_up_nothing(
    hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is removed while it is open keeps a name there, and its folder cannot go."""
    write_repo(hub.folder / "org" / "name")
    snapshot = store.ensure("org/name")
    held = snapshot.path / ".nfs0000000000000001"
    held.write_bytes(b"still open")
    real = os.unlink

    def kept(path: Any, *rest: Any, **options: Any) -> None:
        if str(path).startswith(".nfs") or ".nfs" in str(path):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        real(path, *rest, **options)

    assert verify_snapshot(snapshot).ok, "it is no damage, and not foreign"
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", kept)
        assert evict(store.layout, snapshot.key, force=True)
    assert not snapshot.path.exists()
    left = [path.name for path in store.layout.trash.rglob("*") if not path.is_dir()]
    assert left == [held.name]
    (store.layout.trash / "doctor-01234567").mkdir()
    (store.layout.trash / "doctor-01234567" / "other").write_bytes(b"1")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", lambda *_rest, **_options: kept(".nfs"))
        with pytest.raises(OSError, match="busy"):
            durable.remove_tree(store.layout.trash / "doctor-01234567")


def test_a_volume_without_inodes_is_named_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_inode(*_rest: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "open", no_inode)
    for free, words in ((0, "no inodes are left"), (9, "no space for")):
        state = os.statvfs_result((*real[:5], 100, 0, free, *real[8:]))
        monkeypatch.setattr(os, "statvfs", lambda _path, state=state: state)
        with pytest.raises(NoSpace, match=words):
            durable.open_for_write(tmp_path / "file", exclusive=True)


def test_bytes_that_are_on_their_way_to_the_volume_stay_in_the_page_cache(tmp_path: Path) -> None:
    path, size = tmp_path / "file", 1 << 20
    fd = durable.open_for_write(path)
    try:
        durable.write_at(fd, bytes(size), 0, path=path)
        durable.sync(fd, path=path)
        durable.begin_sync(fd, 0, size)
        assert CachedPages(fd, size).contain(0, size)
    finally:
        os.close(fd)


def test_a_kind_of_file_that_cannot_be_written_ahead_is_left_as_it_is() -> None:
    reader, writer = os.pipe()
    try:
        durable.begin_sync(writer, 0, 1 << 20)
    finally:
        os.close(reader)
        os.close(writer)
