"""Names that point to snapshots: a reader sees the last target that was set, and never half of a record."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modelstore import ModelStore
from modelstore.cli.main import app
from modelstore.errors import InvalidReference, SnapshotNotFound
from modelstore.reference import parse_reference
from modelstore.volume import aliases
from modelstore.volume.evict import evict, survey
from modelstore.volume.layout import SnapshotKey
from modelstore.warmstart import begin
from tests.conftest import Cli
from tests.support.checkpoints import random_tensors, write_repo
from tests.support.hub import Hub


@pytest.fixture
def two(hub: Hub, store: ModelStore) -> ModelStore:
    for name in ("name", "other"):
        write_repo(hub.folder / "org" / name, random_tensors(2))
    return store


@pytest.fixture
def env_of(store_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in store_env.items():
        monkeypatch.setenv(name, value)
    return store_env


def key_of(store: ModelStore, **how: str) -> SnapshotKey:
    found = store.lookup("@chat", **how)
    assert found is not None
    return found.key


def test_an_alias_leads_to_its_target(two: ModelStore) -> None:
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


def test_a_missing_model_leaves_the_alias_alone(two: ModelStore) -> None:
    first = two.set_alias("chat", "org/name")
    with pytest.raises(Exception, match="org/gone"):
        two.set_alias("chat", "org/gone")
    assert key_of(two) == first.key


@pytest.mark.parametrize("name", ["", "Chat", "a/b", "../x", "-a", "@chat", "a" * 65])
def test_a_name_that_is_none_is_refused(two: ModelStore, name: str) -> None:
    with pytest.raises(InvalidReference):
        two.set_alias(name, "org/name")


def test_an_unknown_alias_names_the_remedy(two: ModelStore) -> None:
    for ask in (two.lookup, two.ensure):
        with pytest.raises(SnapshotNotFound, match="no alias @chat: set it"):
            ask("@chat")


DAMAGED = [
    b"", b"{}", b'{"history": []}', b'{"history": [{}]}', b'{"history": [{"repo_id": "../x"}]}', b"[" * 9999,
    b'"at": 1e999', b'"at": 1' + b"0" * 30, b'"percent": 1e999, "at": 1',
]  # fmt: skip


@pytest.mark.parametrize("data", DAMAGED)
def test_a_damaged_record_is_an_error_until_it_is_set_anew(two: ModelStore, data: bytes) -> None:
    two.set_alias("chat", "org/name")
    two.ensure("org/other")
    damage(two, "chat", data)
    assert run(two, "ls", "--json") == "[]\n"
    kept = [one.retained_by for one in survey(two.layout)]
    assert kept == ["@chat points to it"] * 2, "who knows to which"
    assert not any(evict(two.layout, one.key) for one in survey(two.layout))
    with pytest.raises((InvalidReference, SnapshotNotFound), match=r"point @chat anew|no alias"):
        two.lookup("@chat")
    assert two.set_alias("chat", "org/other").key == key_of(two)


def damage(store: ModelStore, name: str, data: bytes) -> None:
    """Overwrite an alias's record; data that begins with a field is that of an entry that is whole otherwise."""
    record = store.layout.alias(name)
    if data.startswith(b'"'):
        data = re.sub(rb'"at": \d+', lambda _match: data, record.read_bytes())
    record.write_bytes(data)


def test_a_record_that_is_a_link_is_not_followed(two: ModelStore, tmp_path: Path) -> None:
    two.set_alias("chat", "org/name")
    record = two.layout.alias("chat")
    record.rename(tmp_path / "elsewhere.json")
    record.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(InvalidReference, match="point @chat anew"):
        two.lookup("@chat")


def run(store: ModelStore, *arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["alias", *arguments, "--root", str(store.layout.root)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.output


def test_the_command_sets_lists_and_rolls_back(two: ModelStore, env_of: dict[str, str]) -> None:
    first = json.loads(run(two, "set", "chat", "org/name", "--json"))
    assert first["changed"]
    assert first["before"] == {"alias": "chat"}
    assert "needs --yes" in run(two, "set", "chat", "org/other", code=8)
    assert "would point" in run(two, "set", "chat", "org/other", "--dry-run")
    assert key_of(two).repo_id == "org/name", "nothing has changed yet"
    assert "@chat points to org/other" in run(two, "set", "@chat", "org/other", "--yes")
    listed = json.loads(run(two, "ls", "--json"))
    assert [entry["repo_id"] for entry in listed[0]["history"]] == ["org/name", "org/other"]
    assert "@chat" in run(two, "ls")
    assert "org/name" in run(two, "rollback", "chat", "--yes")
    assert key_of(two).repo_id == "org/name"
    assert "is back at its first target" in run(two, "rollback", "chat", "--dry-run", code=3)
    assert "org/other" in run(two, "rollback", "chat", "--to", "org/other", "--dry-run")


def test_bad_names_and_unknown_models_change_nothing(two: ModelStore, env_of: dict[str, str]) -> None:
    assert "not an alias" in run(two, "set", "Chat!", "org/name", code=2)
    assert "org/gone" in run(two, "set", "chat", "org/gone", code=3)
    assert "no alias @chat" in run(two, "rollback", "chat", code=3)
    run(two, "set", "chat", "org/name")
    assert "pointed nowhere but to" in run(two, "rollback", "chat", "--yes", code=3)
    assert run(two, "ls", "--json")


def test_the_target_of_an_alias_is_not_evicted(two: ModelStore) -> None:
    snapshot = two.set_alias("chat", "org/name")
    (candidate,) = survey(two.layout, [snapshot.key])
    assert candidate.retained_by == "@chat points to it"
    assert not evict(two.layout, snapshot.key, sleep=lambda _s: None)
    two.set_alias("chat", "org/other")
    assert not survey(two.layout, [snapshot.key])[0].retained_by


def test_a_canary_goes_to_its_share_of_the_workers_and_then_to_all(hub: Hub, cli: Cli, store: ModelStore) -> None:
    for name in ("old", "new"):
        write_repo(hub.folder / "org" / name, random_tensors(2, seed=len(name) + ord(name[0])))
    assert "points nowhere yet" in cli("alias", "set", "chat", "org/new", "--percent", "10", code=2).stderr
    cli("alias", "set", "chat", "org/old")
    record = cli.json("alias", "set", "chat", "org/new", "--percent", "25", "--yes")
    assert record["percent"] == 25
    workers = [f"pod-{number}" for number in range(400)]

    def serving() -> list[str]:
        return [aliases.target(store.layout, "chat", worker=worker).repo_id for worker in workers]

    first = serving()
    assert 60 <= first.count("org/new") <= 140, "about a quarter of them"
    assert first == serving(), "always the same ones"
    assert aliases.target(store.layout, "chat").repo_id == "org/old", "whoever is no worker"
    assert set(aliases.targets(store.layout).known) == {snapshot.key for snapshot in store.snapshots()}, (
        "neither may be evicted"
    )
    assert "for 25 %" in cli("alias", "ls").stdout
    cli("alias", "set", "chat", "org/new", "--percent", "60", "--yes")
    wider = serving()
    assert all(now == "org/new" for before, now in zip(first, wider, strict=True) if before == "org/new")
    assert 180 <= wider.count("org/new") <= 300
    cli("alias", "rollback", "chat", "--yes")
    assert set(serving()) == {"org/old"}
    cli("alias", "set", "chat", "org/new", "--percent", "10", "--yes")
    cli("alias", "set", "chat", "org/new", "--yes")
    assert set(serving()) == {"org/new"}


def test_a_worker_of_the_share_starts_on_the_canary(hub: Hub, store: ModelStore) -> None:
    for name in ("old", "new"):
        write_repo(hub.folder / "org" / name, random_tensors(2, seed=len(name) + ord(name[0])))
        store.set_alias("chat", f"org/{name}", percent=100 if name == "old" else 30)
    inside = next(f"w{n}" for n in range(99) if aliases.share_of("chat", f"w{n}") < 30)
    outside = next(f"w{n}" for n in range(99) if aliases.share_of("chat", f"w{n}") >= 30)
    for worker, model in ((inside, "org/new"), (outside, "org/old")):
        pending = begin(replace(store.settings, model=parse_reference("@chat"), worker_id=worker))
        assert pending.snapshot.repo_id == model
        pending.reading.close()
        pending.in_use.end()


def test_a_share_that_is_none_is_refused(cli: Cli) -> None:
    for percent in ("0", "101", "x"):
        assert "--percent" in cli("alias", "set", "chat", "org/name", "--percent", percent, code=2).stderr


def test_a_hundred_canaries_do_not_lose_the_model_of_the_fleet(store: ModelStore) -> None:
    stable = SnapshotKey("org/stable", "a" * 40, "float16")
    aliases.point(store.layout, "chat", stable, "w")
    for number in range(150):
        aliases.point(store.layout, "chat", SnapshotKey("org/x", f"{number:040x}", "float16"), "w", percent=1)
    assert aliases.target(store.layout, "chat") == stable


def test_a_damaged_record_is_set_anew_by_the_command_and_hides_no_other(hub: Hub, cli: Cli, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name", random_tensors(2))
    cli("alias", "set", "good", "org/name")
    store.layout.alias("chat").write_text("{")
    assert [record["alias"] for record in cli.json("alias", "ls")] == ["good"]
    cli("alias", "set", "chat", "org/name", "--yes")
    assert aliases.target(store.layout, "chat").repo_id == "org/name"
