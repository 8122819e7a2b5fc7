"""Uploads to a volume over S3: whole or unseen, in parts, and on through RunPod's quirks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import zstandard

from modelstore.errors import (
    AccessDenied,
    FormatTooNew,
    IntegrityError,
    NoSpace,
    NotFound,
    UsageError,
    VolumeUnavailable,
)
from modelstore.fill import upload as s3_module
from modelstore.fill.bucket import Bucket, Target, parse_target
from modelstore.fill.upload import RemoteVolume
from modelstore.reference import parse_reference
from modelstore.store import ModelStore
from modelstore.volume import planes
from modelstore.volume.snapshots import Snapshot
from modelstore.volume.verify import verify_snapshot
from tests.conftest import Cli, MakeStore
from tests.support.checkpoints import random_tensors, write_repo
from tests.support.hub import Hub
from tests.support.s3_server import BUCKET, S3, Fault, running_s3

TARGET = f"s3://{BUCKET}@EU-RO-1"
MIB = 1 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with running_s3() as s3:
        yield s3


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The server, empty; parts of 5 MiB, the smallest that S3 takes."""
    server.faults, server.requests, server.slow_s = [], [], 0.0
    client = server.client()
    for key in server.listing():
        client.delete_object(Bucket=BUCKET, Key=key)
    for upload in client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []):
        client.abort_multipart_upload(Bucket=BUCKET, Key=upload["Key"], UploadId=upload["UploadId"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setattr(s3_module, "PART_BYTES", 5 * MIB)
    return server


@pytest.fixture
def snapshot(hub: Hub, store: ModelStore) -> Snapshot:
    """17 MB in fp16: four parts, and the small files."""
    write_repo(hub.folder / "org" / "name", random_tensors(8, (1024, 1024)))
    return store.ensure("org/name")


@pytest.fixture
def volume(s3: S3) -> RemoteVolume:
    return RemoteVolume(parse_target(TARGET), endpoint=s3.url, sleep=lambda _s: None)


def on_volume(s3: S3, folder: Path) -> ModelStore:
    """The volume as a pod would mount it."""
    shutil.rmtree(folder, ignore_errors=True)
    for key in s3.listing():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(s3.read(key))
    return ModelStore(folder / "modelstore")


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("s3://abc@EU-RO-1", Target("abc", "EU-RO-1")),
        ("s3://abc@US-KS-2/other/place", Target("abc", "US-KS-2", "other/place")),
    ],
)
def test_a_target_names_volume_datacenter_and_folder(text: str, target: Target) -> None:
    assert parse_target(text) == target
    assert target.endpoint == f"https://s3api-{target.datacenter.lower()}.runpod.io"


@pytest.mark.parametrize(
    "text", ["abc@EU", "s3://abc", "s3://@EU", "s3://a/b@c", "s3://a@b/../c", "s3://a b@c", "s3://[x@EU", "http://a@b"]
)
def test_a_text_that_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write it like s3://"):
        parse_target(text)


def test_an_upload_is_a_store_that_a_worker_finds(
    s3: S3, snapshot: Snapshot, volume: RemoteVolume, store: ModelStore, tmp_path: Path
) -> None:
    assert not volume.has(snapshot)
    sent = volume.upload(snapshot)
    volume.record_commit(store.layout, snapshot, parse_reference("org/name@main"))
    volume.verify(snapshot)
    assert volume.has(snapshot)
    assert sent == snapshot.size_bytes + (snapshot.path / "manifest.json").stat().st_size
    puts = [path for method, path in s3.requests if method in ("PUT", "POST")]
    manifest = next(i for i, path in enumerate(puts) if path.endswith("manifest.json"))
    assert all("/models/" not in path for path in puts[manifest + 1 :]), "the manifest goes last"
    there = on_volume(s3, tmp_path / "pod").lookup("org/name")
    assert there is not None
    assert verify_snapshot(there).ok
    assert there.manifest == snapshot.manifest


@pytest.mark.parametrize("at", [r"\?uploads", "partNumber=3", r"uploadId=.*$", "config.json", "manifest.json"])
def test_until_the_manifest_is_there_no_snapshot_is_seen(
    s3: S3, snapshot: Snapshot, volume: RemoteVolume, tmp_path: Path, at: str
) -> None:
    s3.faults = [Fault("PUT", at, 507), Fault("POST", at, 507)]
    with pytest.raises(NoSpace, match="is full"):
        volume.upload(snapshot)
    assert on_volume(s3, tmp_path / "pod").lookup(f"org/name@{snapshot.commit}") is None
    s3.faults = []
    volume.upload(snapshot)
    assert on_volume(s3, tmp_path / "pod").lookup(f"org/name@{snapshot.commit}") is not None


def test_parts_that_are_there_are_not_sent_again(s3: S3, snapshot: Snapshot, volume: RemoteVolume) -> None:
    s3.faults = [Fault("PUT", "partNumber=4", 507)]
    with pytest.raises(NoSpace):
        volume.upload(snapshot)
    there = len([1 for method, path in s3.requests if method == "PUT" and "partNumber" in path]) - 1
    s3.requests.clear()
    sent = volume.upload(snapshot)
    again = [path for method, path in s3.requests if method == "PUT" and "partNumber" in path]
    assert len(again) == 4 - there
    assert sent < snapshot.size_bytes
    volume.verify(snapshot)


@pytest.mark.parametrize("status", [500, 503, 524, 429, 0])
def test_a_passing_failure_is_tried_again(s3: S3, snapshot: Snapshot, volume: RemoteVolume, status: int) -> None:
    s3.faults = [
        Fault("PUT", "partNumber=2", status, times=2), Fault("HEAD", "safetensors", status),
        Fault("POST", "uploads", status), Fault("PUT", "manifest.json", status),
    ]  # fmt: skip
    volume.upload(snapshot)
    volume.verify(snapshot)


def test_a_completion_that_times_out_though_it_is_done(s3: S3, snapshot: Snapshot, volume: RemoteVolume) -> None:
    s3.faults = [Fault("POST", "uploadId=", 524, after=True)]
    volume.upload(snapshot)
    assert len([1 for method, path in s3.requests if method == "POST" and "uploadId=" in path]) == 1
    volume.verify(snapshot)


def test_a_completion_that_times_out_and_is_not_done(s3: S3, snapshot: Snapshot, volume: RemoteVolume) -> None:
    s3.faults = [Fault("POST", "uploadId=", 524, times=3)]
    volume.upload(snapshot)
    assert len([1 for method, path in s3.requests if method == "POST" and "uploadId=" in path]) == 4
    volume.verify(snapshot)


def test_a_server_that_stays_away_is_one_error_and_the_upload_goes_on_later(
    s3: S3, snapshot: Snapshot, volume: RemoteVolume
) -> None:
    s3.faults = [Fault("PUT", "partNumber=3", 503, times=100)]
    with pytest.raises(VolumeUnavailable, match="try again later"):
        volume.upload(snapshot)
    s3.faults = []
    volume.upload(snapshot)
    volume.verify(snapshot)


def test_bytes_that_were_changed_on_the_volume_are_found(s3: S3, snapshot: Snapshot, volume: RemoteVolume) -> None:
    volume.upload(snapshot)
    key = next(key for key in s3.listing() if key.endswith("model.safetensors"))
    data = bytearray(s3.read(key))
    data[-1] ^= 1
    s3.client().put_object(Bucket=BUCKET, Key=key, Body=bytes(data))
    with pytest.raises(Exception, match="differs from the uploaded file"):
        volume.verify(snapshot)


def test_a_volume_that_does_not_exist(s3: S3, snapshot: Snapshot) -> None:
    with pytest.raises(NotFound, match="no such volume"):
        RemoteVolume(parse_target("s3://other@EU-RO-1"), endpoint=s3.url).upload(snapshot)


def test_one_command_fills_several_volumes_each_with_its_own_line(s3: S3, hub: Hub, cli: Cli, tmp_path: Path) -> None:
    write_repo(hub.folder / "org" / "one")
    write_repo(hub.folder / "org" / "two", random_tensors(2, seed=3))
    cli.env |= {"MODELSTORE_S3_ENDPOINT": s3.url, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    records = cli.json("seed", "org/one", "org/two", "--to", TARGET, "--to", "s3://nope@US-KS-2", "--verify", code=3)
    told = [(record["repo_id"], record["to"], record["status"]) for record in records]
    assert told == [
        ("org/one", TARGET, "uploaded"), ("org/one", "s3://nope@US-KS-2", "failed"),
        ("org/two", TARGET, "uploaded"), ("org/two", "s3://nope@US-KS-2", "failed"),
    ]  # fmt: skip
    assert on_volume(s3, tmp_path / "pod").lookup("org/one") is not None
    again = cli.json("seed", "org/one", "--to", TARGET)
    assert (again["status"], again["uploaded_bytes"]) == ("present", 0)
    assert "present: org/one" in cli("seed", "org/one", "--to", TARGET).stdout


def test_a_folder_of_the_laptop_is_found_by_its_name(s3: S3, hub: Hub, cli: Cli, tmp_path: Path) -> None:
    write_repo(tmp_path / "my-model")
    cli.env["MODELSTORE_S3_ENDPOINT"] = s3.url
    cli("seed", f"file://{tmp_path}/my-model", "--to", TARGET)
    there = on_volume(s3, tmp_path / "pod")
    assert there.lookup("local/my-model") is not None
    assert there.lookup(f"file://{tmp_path}/my-model") is not None


def test_keys_are_never_in_a_record_or_a_line(s3: S3, hub: Hub, cli: Cli) -> None:
    write_repo(hub.folder / "org" / "name")
    cli.env |= {"MODELSTORE_S3_ENDPOINT": s3.url, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "verysecret"}
    s3.faults = [Fault("PUT", "", 403, times=99)]
    done = cli("seed", "org/name", "--to", TARGET, code=4)
    assert "verysecret" not in done.stdout + done.stderr
    assert "refuses these S3 keys" in done.stderr


def test_without_keys_it_says_how_to_get_them(hub: Hub, cli: Cli) -> None:
    write_repo(hub.folder / "org" / "name")
    cli.env |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": "/nowhere"}
    assert "set AWS_ACCESS_KEY_ID" in cli("seed", "org/name", "--to", TARGET, code=4).stderr


def test_a_process_that_is_killed_leaves_nothing_to_see_and_goes_on(
    s3: S3, hub: Hub, cli: Cli, store: ModelStore, tmp_path: Path
) -> None:
    write_repo(hub.folder / "org" / "name", random_tensors(24, (1024, 1024)))
    snapshot = store.ensure("org/name")
    code = (
        "import sys; from modelstore.fill import upload; upload.PART_BYTES = 5 << 20; from modelstore.__main__ import main; "
        "sys.argv = ['modelstore', 'seed', 'org/name', '--to', sys.argv[1]]; main()"
    )
    env = os.environ | cli.env | {"MODELSTORE_S3_ENDPOINT": s3.url}
    process = subprocess.Popen([sys.executable, "-c", code, TARGET], env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not [1 for _m, path in s3.requests if "partNumber=4" in path] and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert on_volume(s3, tmp_path / "pod").lookup(f"org/name@{snapshot.commit}") is None
    subprocess.run([sys.executable, "-c", code, TARGET], env=env, check=True, capture_output=True)
    there = on_volume(s3, tmp_path / "pod").lookup("org/name")
    assert there is not None
    assert verify_snapshot(there).ok


def test_ctrl_c_does_not_wait_for_the_parts_that_are_on_their_way(
    s3: S3, hub: Hub, cli: Cli, store: ModelStore
) -> None:
    write_repo(hub.folder / "org" / "name", random_tensors(24, (1024, 1024)))
    store.ensure("org/name")
    s3.slow_s = 30.0
    command = ["env", "--default-signal=INT", sys.executable, "-m", "modelstore", "seed", "org/name", "--to", TARGET]
    env = os.environ | cli.env | {"MODELSTORE_S3_ENDPOINT": s3.url}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not [1 for _m, path in s3.requests if "partNumber" in path] and time.monotonic() < deadline:
        time.sleep(0.05)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    _out, err = process.communicate(timeout=240)
    assert time.monotonic() - sent < 10.0
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err


def test_the_target_is_read_before_anything_is_downloaded(hub: Hub, cli: Cli) -> None:
    write_repo(hub.folder / "org" / "name")
    assert "write it like s3://" in cli("seed", "org/name", "--to", "s3://x", code=2).stderr
    assert "use one of them" in cli("seed", "--from", "x.toml", "--prune", "--to", TARGET, code=2).stderr
    assert hub.served.total_bytes == 0


def test_a_stale_object_of_the_right_size_is_not_published(s3: S3, snapshot: Snapshot, volume: RemoteVolume) -> None:
    key = volume.key_of(snapshot, "model.safetensors")
    s3.client().put_object(Bucket=BUCKET, Key=key, Body=bytes(snapshot.weights[0].size_bytes))
    volume.upload(snapshot)
    volume.verify(snapshot)


def test_a_damaged_upload_is_unpublished_and_can_be_made_again(
    s3: S3, snapshot: Snapshot, volume: RemoteVolume
) -> None:
    volume.upload(snapshot)
    key = volume.key_of(snapshot, "model.safetensors")
    s3.client().put_object(Bucket=BUCKET, Key=key, Body=bytes(snapshot.weights[0].size_bytes))
    assert volume.has(snapshot), "its sizes are right"
    with pytest.raises(IntegrityError, match="upload it again"):
        volume.verify(snapshot)
    assert not volume.has(snapshot)
    volume.upload(snapshot)
    volume.verify(snapshot)


@pytest.mark.parametrize("env", [{"AWS_ACCESS_KEY_ID": "k"}, {"AWS_PROFILE": "nowhere"}])
def test_keys_that_cannot_be_used_are_one_line(hub: Hub, cli: Cli, env: dict[str, str]) -> None:
    write_repo(hub.folder / "org" / "name")
    cli.env |= env | {"AWS_EC2_METADATA_DISABLED": "true", "HOME": "/nowhere"}
    assert "keys" in cli("seed", "org/name", "--to", TARGET, code=4).stderr


@pytest.mark.parametrize(("text", "is_newer"), [(b"0\n", False), (b"1\n", False), (b"2\n", True), (b"x", True)])
def test_only_a_store_of_a_newer_format_is_refused(
    snapshot: Snapshot, volume: RemoteVolume, text: bytes, is_newer: bool
) -> None:
    volume.bucket.call("put_object", Key="modelstore/FORMAT", Body=text)
    with pytest.raises(FormatTooNew, match="upgrade modelstore") if is_newer else nullcontext():
        volume.upload(snapshot)
    assert volume.has(snapshot) is not is_newer


def test_a_commit_is_recorded_as_the_store_records_it(
    s3: S3, snapshot: Snapshot, volume: RemoteVolume, store: ModelStore, tmp_path: Path
) -> None:
    volume.upload(snapshot)
    volume.record_commit(store.layout, snapshot, parse_reference(f"org/name@{snapshot.commit}"))
    assert not [key for key in s3.listing() if "/refs/" in key], "a full commit needs no record"
    volume.record_commit(store.layout, snapshot, parse_reference("org/name@v1"))
    assert on_volume(s3, tmp_path / "pod").lookup("org/name@v1") is not None


@pytest.mark.parametrize("obeys", [True, False])
def test_a_record_that_is_there_is_not_replaced(s3: S3, obeys: bool) -> None:
    """By the server's word, if a trial shows that it refuses; else by a look before."""
    s3.ignores_conditions = not obeys
    try:
        bucket = Bucket(parse_target("s3://vol123@EU-RO-1"), endpoint=s3.url)
        assert bucket.put_if_new("modelstore/records/one.json", b"first")
        assert not bucket.put_if_new("modelstore/records/one.json", b"second")
    finally:
        s3.ignores_conditions = False
    assert s3.read("modelstore/records/one.json") == b"first"
    looked = any(method == "GET" and path.endswith("one.json") for method, path in s3.requests[:-1])
    assert looked == (not obeys)
    assert not any("trash" in key for key in s3.listing())


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_a_key_with_a_line_break_is_named_and_not_shown(s3: S3, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "s3cr3t\n")
    with pytest.raises(AccessDenied, match="line break") as raised:
        Bucket(parse_target("s3://vol123@EU-RO-1"), endpoint=s3.url)
    assert "s3cr3t" not in str(raised.value)


def test_a_compressed_snapshot_is_as_its_own_manifest_says(
    hub: Hub, make_store: MakeStore, s3: S3, volume: RemoteVolume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two encoders write two forms of one model: the form that is there is compared with the manifest there."""
    write_repo(hub.folder / "org" / "name", random_tensors(2, (1024, 1024)))
    source = make_store(compress="always")
    first = source.ensure("org/name")
    assert volume.upload(first) > 0
    volume.record_commit(source.layout, first, parse_reference("org/name"))
    store = on_volume(s3, tmp_path / "pod")
    mounted = store.lookup("org/name")
    assert mounted is not None
    assert verify_snapshot(mounted).ok
    monkeypatch.setattr(planes, "_PARAMETERS", zstandard.ZstdCompressionParameters(compression_level=3))
    monkeypatch.setattr(planes, "_codecs", threading.local())
    second = make_store(compress="always", root=tmp_path / "second").ensure("org/name")
    assert second.manifest.files != first.manifest.files
    assert volume.has(second)
    volume.verify(second)
    assert volume.has(first), "it is still published"
    path = volume.key_of(first, "model.safetensors.compressed")
    data = bytearray(s3.read(path))
    data[100] ^= 1
    s3.client().put_object(Bucket=BUCKET, Key=path, Body=bytes(data))
    with pytest.raises(IntegrityError, match="unpublished"):
        volume.verify(second)
    assert not volume.has(first)
