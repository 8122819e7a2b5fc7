"""A record that cannot be read is not a record that is not there: nothing goes on as if there were none.

The volume is real; one call is wrapped, that which opens, lists or looks at the record, and fails as a sick mount does.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelstore.errors import IntegrityError, RootUnusable
from modelstore.reference import parse_reference
from modelstore.store import ModelStore
from modelstore.volume import aliases, pins, tree
from modelstore.volume.evict import evict
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.verify import verify_snapshot
from tests.conftest import Cli
from tests.support.checkpoints import write_repo
from tests.support.hub import Hub

ERRORS = [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT]
CALLS = ("open", "lstat", "listdir", "scandir")


@contextmanager
def sick(place: Path, number: int) -> Iterator[None]:
    """Every look at `place`, and below it, fails with this error."""
    reals = {name: getattr(os, name) for name in CALLS}

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            if isinstance(path, str | os.PathLike) and Path(path).is_relative_to(place):
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, real in reals.items():
            patch.setattr(os, name, failing(real))
        yield


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("place", ["refs", "refs/org--name", "refs/org--name/main.json"])
def test_a_fleet_keeps_its_commit_if_its_record_cannot_be_read(
    hub: Hub, store: ModelStore, place: str, number: int
) -> None:
    commit = store_one(hub, store)
    write_repo(hub.folder / "org" / "name", extra={"merges.txt": b"a b\n"})  # the Hub has a newer commit
    hub.served.reset()
    with sick(store.layout.root / place, number), pytest.raises(RootUnusable, match="cannot read"):
        store.ensure("org/name")
    assert hub.served.requests == [], "the Hub is not asked instead"
    assert store.ensure("org/name").commit == commit


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_an_alias_that_cannot_be_read_still_points(hub: Hub, store: ModelStore, number: int) -> None:
    store_one(hub, store)
    store.set_alias("live", "org/name")
    for place in ("aliases", "aliases/live.json"):
        with sick(store.layout.root / place, number):
            with pytest.raises(RootUnusable, match="cannot read"):
                store.ensure("@live")
            with pytest.raises(RootUnusable, match="cannot read"):
                aliases.point(store.layout, "live", key_of(store), "worker")
    with sick(store.layout.root / "aliases/live.json", number):
        assert not evict(store.layout, key_of(store)), "it may point to any snapshot"
    assert len(aliases.history(store.layout, "live")) == 1


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_a_pin_that_cannot_be_read_still_pins(hub: Hub, store: ModelStore, number: int) -> None:
    store_one(hub, store)
    key = key_of(store)
    pins.pin(store.layout, key, "a person")
    with sick(store.layout.pin(key), number):
        with pytest.raises(RootUnusable, match="cannot read"):
            pins.is_pinned(store.layout, key)
        with pytest.raises(RootUnusable, match="cannot read"):
            evict(store.layout, key)
    assert store.lookup("org/name") is not None


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_a_snapshot_that_cannot_be_read_is_not_made_again(hub: Hub, store: ModelStore, number: int) -> None:
    store_one(hub, store)
    folder = store.layout.snapshot(key_of(store))
    hub.served.reset()
    for place in (folder, folder / "manifest.json", folder / "model.safetensors", store.layout.models):
        with sick(place, number), pytest.raises(RootUnusable, match="cannot read"):
            store.ensure("org/name")
    assert hub.served.requests == []
    snapshot = store.lookup("org/name")
    assert snapshot is not None
    with sick(folder / "config.json", number):
        (finding,) = verify_snapshot(snapshot).findings
    assert finding.problem.startswith("cannot be read"), "it is not missing"


@pytest.mark.parametrize("content", [b"", bytes(80), b"{", b'{"commit": 7}', b"[]", b'{"commit": "main"}'])
def test_a_damaged_record_is_no_missing_one_and_a_seed_mends_it(hub: Hub, store: ModelStore, content: bytes) -> None:
    store_one(hub, store)
    path = store.layout.ref("org/name", "main")
    path.write_bytes(content)
    write_repo(hub.folder / "org" / "name", extra={"merges.txt": b"a b\n"})  # the Hub has a newer commit
    hub.served.reset()
    with pytest.raises(IntegrityError, match=rf"{path}, the record .* is damaged: .* `modelstore seed org/name`"):
        store.ensure("org/name")
    assert hub.served.requests == [], "the Hub is not asked instead"
    assert store.ensure("org/name", refresh=True).status == "downloaded"
    assert store.ensure("org/name").status == "present"


def test_only_a_missing_name_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    assert tree.exists(tmp_path / "link")
    assert not tree.exists(tmp_path / "gone")
    assert not tree.exists(tmp_path / "file" / "below")
    with pytest.raises(RootUnusable):
        tree.exists(tmp_path / ("x" * 4000))


def test_the_command_says_in_one_line_what_cannot_be_read(hub: Hub, store: ModelStore, cli: Cli) -> None:
    store_one(hub, store)
    folder = store.layout.root / "refs"
    folder.rename(folder.with_name("kept"))
    folder.symlink_to(folder)  # the kernel gives up on it
    assert len(cli("path", "org/name", code=8).stderr.splitlines()) == 1


def test_a_canary_is_not_put_in_place_of_an_alias_that_cannot_be_opened(
    hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_one(hub, store)
    store.set_alias("live", "org/name")
    key = replace(key_of(store), commit="b" * 40)
    path, real = store.layout.alias("live"), os.open
    for number in ERRORS:

        def sick_open(name: Any, *args: Any, number: int = number, **kwargs: Any) -> int:
            if Path(name) == path:
                raise OSError(number, os.strerror(number))
            return real(name, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", sick_open)
            with pytest.raises(RootUnusable):
                aliases.point(store.layout, "live", key, "worker", percent=10)
    assert [entry.percent for entry in aliases.history(store.layout, "live")] == [100]


def store_one(hub: Hub, store: ModelStore) -> str:
    """Seed org/name; returns its commit."""
    write_repo(hub.folder / "org" / "name")
    return store.ensure("org/name", refresh=True).commit


def key_of(store: ModelStore) -> SnapshotKey:
    key = store.catalog.find_key(parse_reference("org/name"), "float16")
    assert key is not None
    return key
