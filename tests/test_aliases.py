"""Names that point to snapshots: what a reader sees is the last that was set, and never half of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from modelstore import ModelStore, aliases
from modelstore.errors import InvalidReference, SnapshotNotFound
from modelstore.layout import SnapshotKey
from tests.hub import Hub
from tests.test_store import random_tensors, write_repo


@pytest.fixture
def two(hub: Hub, store: ModelStore) -> ModelStore:
    for name in ("name", "other"):
        write_repo(hub.folder / "org" / name, random_tensors(2))
    return store


def key_of(store: ModelStore, **how: str) -> SnapshotKey:
    found = store.lookup("@chat", **how)
    assert found is not None
    return found.key


def test_an_alias_leads_to_what_it_was_set_to(two: ModelStore) -> None:
    first = two.set_alias("chat", "org/name")
    assert key_of(two) == first.key
    second = two.set_alias("chat", "org/other", dtype="bfloat16")
    assert second.dtype == "bfloat16"
    assert key_of(two, dtype="float16") == second.key, "an alias has its own dtype"
    assert [entry.key for entry in aliases.history(two.layout, "chat")] == [first.key, second.key]
    assert all(entry.by == two.settings.worker_id and entry.at > 0 for entry in aliases.history(two.layout, "chat"))
    assert list(aliases.names(two.layout)) == ["chat"]


def test_an_alias_whose_snapshot_is_gone_brings_it_back(two: ModelStore, hub: Hub) -> None:
    snapshot = two.set_alias("chat", "org/name")
    key = snapshot.key
    shutil.rmtree(snapshot.path)
    assert two.lookup("@chat") is None
    assert two.ensure("@chat").key == key


def test_what_cannot_be_had_leaves_the_alias_alone(two: ModelStore) -> None:
    first = two.set_alias("chat", "org/name")
    with pytest.raises(Exception, match="org/gone"):
        two.set_alias("chat", "org/gone")
    assert key_of(two) == first.key


@pytest.mark.parametrize("name", ["", "Chat", "a/b", "../x", "-a", "@chat", "a" * 65])
def test_a_name_that_is_none_is_refused(two: ModelStore, name: str) -> None:
    with pytest.raises(InvalidReference):
        two.set_alias(name, "org/name")


def test_an_unknown_alias_says_what_to_do(two: ModelStore) -> None:
    for ask in (two.lookup, two.ensure):
        with pytest.raises(SnapshotNotFound, match="no alias @chat: set it"):
            ask("@chat")


@pytest.mark.parametrize("data", [b"", b"{}", b'{"history": [{}]}', b'{"history": [{"repo_id": "../x"}]}', b"[" * 9999])
def test_a_damaged_record_is_an_error_until_it_is_set_anew(two: ModelStore, data: bytes) -> None:
    two.set_alias("chat", "org/name")
    two.layout.alias("chat").write_bytes(data)
    with pytest.raises((InvalidReference, SnapshotNotFound), match=r"point @chat anew|no alias"):
        two.lookup("@chat")
    assert two.set_alias("chat", "org/other").key == key_of(two)


def test_a_record_that_is_a_link_is_not_followed(two: ModelStore, tmp_path: Path) -> None:
    two.set_alias("chat", "org/name")
    record = two.layout.alias("chat")
    record.rename(tmp_path / "elsewhere.json")
    record.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(InvalidReference, match="point @chat anew"):
        two.lookup("@chat")
