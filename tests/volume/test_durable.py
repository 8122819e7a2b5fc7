"""The one room that changes the volume: a full volume is NoSpace wherever it shows, and nothing is left half-done."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from modelstore.errors import NoSpace, RootUnusable, UnsafeName
from modelstore.store import ModelStore
from modelstore.volume import durable, tree
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
