"""From one store to others, in folders and over S3: the same bytes and names, nothing twice, and on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelstore import ModelStore
from modelstore.settings import Settings
from modelstore.volume import aliases, pins, refs
from modelstore.volume.snapshots import Snapshot
from modelstore.volume.verify import verify_snapshot
from tests.conftest import Cli
from tests.support.checkpoints import random_tensors, write_repo
from tests.support.hub import Hub
from tests.support.s3_server import S3, running_s3

BUCKET = "s3://vol123@EU-RO-1"


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with running_s3() as s3:
        yield s3


@pytest.fixture
def s3(server: S3, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3]:
    """The server with an empty volume, which the command may use."""
    (tmp_path / "tmp").mkdir()
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "MODELSTORE_S3_ENDPOINT": server.url}
    cli.env |= keys | {"TMPDIR": str(tmp_path / "tmp")}
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    yield server
    client = server.client()
    for key in server.listing():
        client.delete_object(Bucket="vol123", Key=key)
    server.requests.clear()


@pytest.fixture
def filled(hub: Hub, store: ModelStore) -> ModelStore:
    """A store with two models, a pin, an alias with a history, and a canary."""
    write_repo(hub.folder / "org" / "name", random_tensors(4, (64, 64)), shards=2)
    write_repo(hub.folder / "org" / "other")
    first, second = store.ensure("org/name"), store.ensure("org/other", refresh=True)
    store.ensure("org/name", dtype="bfloat16", refresh=True)
    pins.pin(store.layout, first.key, "alice")
    store.set_alias("chat", "org/other")
    store.set_alias("chat", "org/name", dtype="float16")
    store.set_alias("next", "org/name", dtype="float16")
    aliases.point(store.layout, "next", second.key, "bob", percent=10)
    return store


def other(tmp_path: Path, name: str = "elsewhere") -> ModelStore:
    root = tmp_path / name / "modelstore"
    root.parent.mkdir(exist_ok=True)
    return ModelStore(root, settings=Settings(root=root, offline=True))


def assert_same(source: ModelStore, target: ModelStore) -> None:
    expected = {snapshot.key: snapshot.manifest for snapshot in source.snapshots()}
    assert {snapshot.key: snapshot.manifest for snapshot in target.snapshots()} == expected
    assert all(verify_snapshot(snapshot).ok for snapshot in target.snapshots())
    for text in ("org/name", "org/other", "@chat", "@next"):
        ours, theirs = source.lookup(text), target.lookup(text)
        assert isinstance(ours, Snapshot)
        assert isinstance(theirs, Snapshot)
        assert theirs.key == ours.key, text
    assert pins.pinned(target.layout) == pins.pinned(source.layout)
    now = [(entry.key, entry.percent) for entry in aliases.history(target.layout, "next")]
    assert now == [(entry.key, entry.percent) for entry in aliases.history(source.layout, "next")]


def test_from_folder_to_folder_and_nothing_twice(filled: ModelStore, cli: Cli, tmp_path: Path) -> None:
    target = other(tmp_path)
    planned = cli.json("sync", "--to", str(target.layout.root), "--dry-run")
    assert {record["status"] for record in planned} == {"missing"}
    assert not target.layout.root.exists()
    done = cli.json("sync", "--to", str(target.layout.root))
    assert [record["copied_bytes"] for record in done] == [record["copied_bytes"] for record in planned]
    assert_same(filled, target)
    assert not list((target.layout.root / "staging").rglob("*.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in target.layout.root.rglob("*.json")}
    again = cli.json("sync", "--to", str(target.layout.root))
    assert {(record["status"], record["copied_bytes"]) for record in again} == {("present", 0)}
    assert {path: path.stat().st_mtime_ns for path in target.layout.root.rglob("*.json")} == before


def test_to_a_bucket_and_from_there_to_a_folder_and_another_bucket(
    filled: ModelStore, cli: Cli, s3: S3, tmp_path: Path
) -> None:
    elsewhere = other(tmp_path)
    cli("sync", "--to", BUCKET, "--to", str(elsewhere.layout.root))
    assert_same(filled, elsewhere)
    puts = len([1 for method, _path in s3.requests if method in ("PUT", "POST")])
    assert {record["status"] for record in cli.json("sync", "--to", BUCKET)} == {"present"}
    assert len([1 for method, _path in s3.requests if method in ("PUT", "POST")]) == puts, "nothing is sent twice"
    back = other(tmp_path, "back")
    cli("sync", "--from", BUCKET, "--to", str(back.layout.root))
    assert_same(filled, back)
    second = f"{BUCKET}/second"
    cli("sync", "--from", BUCKET, "--to", second)
    again = other(tmp_path, "again")
    cli("sync", "--from", second, "--to", str(again.layout.root))
    assert_same(filled, again)
    assert not list((tmp_path / "tmp").rglob("*.safetensors")), "what went through this machine is gone"


def test_the_models_that_are_named_go_and_no_others(filled: ModelStore, cli: Cli, tmp_path: Path) -> None:
    target = other(tmp_path)
    cli("sync", "org/other", "--to", str(target.layout.root))
    assert {snapshot.repo_id for snapshot in target.snapshots()} == {"org/other"}
    assert not list(aliases.names(target.layout)), "none whose snapshots did not go"
    cli("sync", "@chat", "--to", str(target.layout.root))
    assert {snapshot.key.dtype for snapshot in target.snapshots() if snapshot.repo_id == "org/name"} == {"float16"}
    assert target.lookup("@chat") is not None
    assert "org/nope" in cli("sync", "org/nope", "--to", str(target.layout.root), code=3).stderr
    assert "full path" in cli("sync", "--to", "elsewhere", code=2).stderr
    assert "--to is missing" in cli("sync", code=2).stderr
    assert "copied from" in cli("sync", "--to", str(filled.layout.root), code=2).stderr
    assert "there is no folder" in cli("sync", "--to", str(tmp_path / "no" / "where"), code=1).stderr


def test_a_file_that_is_missing_at_the_source_spares_the_others(filled: ModelStore, cli: Cli, tmp_path: Path) -> None:
    snapshot = filled.lookup("org/name", dtype="bfloat16")
    assert snapshot is not None
    (snapshot.path / snapshot.weights[0].path).unlink()
    target, second = other(tmp_path), other(tmp_path, "second")
    done = cli("sync", "--to", str(target.layout.root), "--to", str(second.layout.root), code=1)
    assert done.stderr.count("error: ") == 2, "one for each target"
    for store in (target, second):
        assert {(each.repo_id, each.dtype) for each in store.snapshots()} == {
            ("org/name", "float16"),
            ("org/other", "float16"),
        }
        assert store.lookup("@chat") is not None
        assert pins.pinned(store.layout)


def test_nothing_that_was_copied_makes_room_for_the_next(filled: ModelStore, cli: Cli, tmp_path: Path) -> None:
    largest = max(snapshot.size_bytes for snapshot in filled.snapshots())
    cli.env |= {"MODELSTORE_QUOTA": str(largest + 20_000), "MODELSTORE_EVICT": "1"}
    target = other(tmp_path)
    done = cli("sync", "--to", str(target.layout.root), code=6)
    assert "MODELSTORE_QUOTA" in done.stderr
    for name in aliases.names(target.layout):
        assert target.lookup(f"@{name}") is not None


def test_a_link_on_the_way_leads_nothing_out_of_the_target(filled: ModelStore, cli: Cli, tmp_path: Path) -> None:
    snapshot = filled.lookup("org/name")
    assert snapshot is not None
    target = other(tmp_path)
    planted = target.layout.snapshot(snapshot.key)
    planted.mkdir(parents=True)
    (tmp_path / "victim").mkdir()
    (planted / "config.json").symlink_to(tmp_path / "victim" / "file")
    cli("sync", "org/name", "--to", str(target.layout.root), code=8)
    assert not list((tmp_path / "victim").iterdir())


def test_the_old_name_of_a_repo_leads_to_it_there_too(filled: ModelStore, cli: Cli, tmp_path: Path) -> None:
    snapshot = filled.lookup("org/name")
    assert snapshot is not None
    to = refs.Recorded("org/name", snapshot.commit)
    path = filled.layout.ref("old/name", "main")
    path.parent.mkdir(parents=True)
    path.write_bytes(refs.encode_record("main", to, "old/name"))
    (path.parent / "damaged.json").write_bytes(b"{")
    target = other(tmp_path)
    cli("sync", "old/name", "--to", str(target.layout.root))
    found = target.lookup("old/name")
    assert found is not None
    assert found.repo_id == "org/name"


@pytest.mark.parametrize("source", ["folder", "bucket"])
def test_a_place_without_a_store_is_no_success(cli: Cli, s3: S3, tmp_path: Path, source: str) -> None:
    (tmp_path / "empty").mkdir()
    done = cli(
        "sync",
        "--from",
        str(tmp_path / "empty") if source == "folder" else BUCKET,
        "--to",
        str(tmp_path / "to"),
        code=1,
    )
    assert "no store at" in done.stderr


def test_a_target_of_a_newer_version_is_left_alone(filled: ModelStore, cli: Cli, tmp_path: Path) -> None:
    target = other(tmp_path)
    target.layout.root.mkdir()
    target.layout.format_file.write_text("2\n")
    assert "upgrade" in cli("sync", "--to", str(target.layout.root), code=8).stderr
    assert [path.name for path in target.layout.root.iterdir()] == ["FORMAT"]


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_a_damaged_model_is_not_spread_and_the_others_go(
    filled: ModelStore, cli: Cli, s3: S3, tmp_path: Path, place: str
) -> None:
    snapshot = filled.lookup("org/other")
    assert snapshot is not None
    path = snapshot.path / snapshot.weights[0].path
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    target = other(tmp_path)
    done = cli("sync", "--to", str(target.layout.root) if place == "folder" else BUCKET, code=5)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "org/other" in line
    if place == "bucket":
        cli("sync", "--from", BUCKET, "--to", str(target.layout.root))
    assert {snapshot.repo_id for snapshot in target.snapshots()} == {"org/name"}
    assert target.lookup("org/other") is None


def test_a_copy_that_was_killed_goes_on(hub: Hub, store: ModelStore, cli: Cli, s3: S3, tmp_path: Path) -> None:
    """Over S3 with a slow server, and killed with some blocks there."""
    write_repo(hub.folder / "org" / "name", random_tensors(6, (1024, 1024)), shards=6)
    store.ensure("org/name")
    cli("sync", "--to", BUCKET)
    target = other(tmp_path)
    command = [sys.executable, "-m", "modelstore", "sync", "--from", BUCKET, "--to", str(target.layout.root), "-q"]
    staged = target.layout.root / "staging"
    with subprocess.Popen(command, env=os.environ | cli.env) as process:
        until = time.monotonic() + 60
        while time.monotonic() < until and not any(
            path.stat().st_blocks for path in staged.rglob("model-00002*.safetensors")
        ):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert not (target.layout.root / "models").exists() or not list(target.snapshots())
    s3.requests.clear()
    record = json.loads(cli("sync", "--from", BUCKET, "--to", str(target.layout.root), "--json").stdout)[0]
    snapshot = target.lookup("org/name")
    assert snapshot is not None
    assert verify_snapshot(snapshot).ok
    assert 0 < record["copied_bytes"] < snapshot.size_bytes
    assert not any("model-00001" in path and method == "GET" for method, path in s3.requests)


def test_a_target_that_is_used_read_only_gets_nothing(filled: ModelStore, cli: Cli, tmp_path: Path) -> None:
    target = other(tmp_path)
    cli.env["MODELSTORE_VOLUME"] = "read-only"
    assert "read-only" in cli("sync", "--to", str(target.layout.root), code=1).stderr
    assert not target.layout.root.exists()
