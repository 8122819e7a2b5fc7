"""What a volume can do, and the mode that follows: by kind, by trial, and as it is set."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelstore import ModelStore
from modelstore.errors import NoSpace, ReadOnlyVolume
from modelstore.mount import Mount, kind_of
from modelstore.settings import Settings
from modelstore.volume import capabilities, durable
from modelstore.volume.capabilities import Capabilities, decided_by, may_change, probe, use_of
from modelstore.volume.layout import Layout
from tests.conftest import Cli
from tests.support.checkpoints import write_repo
from tests.support.hub import Hub

PROVEN = Capabilities("yes", "yes", "yes", "yes", "yes", "yes", "yes")


@pytest.mark.parametrize(
    ("device", "kind", "name", "place"),
    [
        ("mfs#10.0.0.1:9421", "fuse", "MooseFS", "network"),
        ("mfsmaster:9421", "fuse.mfs", "MooseFS", "network"),
        ("JuiceFS:volume", "fuse.juicefs", "JuiceFS", "network"),
        ("host:/export", "nfs4", "NFS", "network"),
        ("host:/export", "nfs", "NFS", "network"),
        ("mon:6789:/", "ceph", "CephFS", "network"),
        ("mgs@tcp:/fs", "lustre", "Lustre", "network"),
        ("weka", "wekafs", "WekaFS", "network"),
        ("host:/vol", "fuse.glusterfs", "GlusterFS", "network"),
        ("//host/share", "cifs", "SMB", "network"),
        ("s3fs", "fuse.s3fs", "a bucket through s3fs", "bucket"),
        (":s3{P55li}:vol123", "fuse.rclone", "a bucket through rclone", "bucket"),
        ("mountpoint-s3", "fuse", "a bucket through Mountpoint for S3", "bucket"),
        ("bucket", "fuse.goofys", "a bucket through goofys", "bucket"),
        ("bucket", "fuse.gcsfuse", "a bucket through gcsfuse", "bucket"),
        ("gcsfuse", "fuse", "a bucket through gcsfuse", "bucket"),
        ("blobfuse2", "fuse", "a container of blobs through blobfuse", "bucket"),
        ("/data", "fuse", "another folder through FUSE", "unknown"),
        ("/dev/sdb1", "fuseblk", "a disk through FUSE", "host"),
        ("/dev/sdb1", "exfat", "exfat", "host"),
        ("/data", "fuse.bindfs", "another folder through bindfs", "unknown"),
        ("/a:/b", "fuse.mergerfs", "several folders through mergerfs", "unknown"),
        ("unionfs", "fuse.unionfs", "several folders through unionfs", "unknown"),
        ("user@host:", "fuse.sshfs", "a folder of another host through sshfs", "unknown"),
        ("tag", "virtiofs", "a folder of the host through virtiofs", "unknown"),
        ("none", "9p", "a folder of the host through 9p", "unknown"),
        ("fast-volume", "fuse", "a file system of an unknown kind (fuse)", "unknown"),
        ("fast", "fuse.fastfs", "a file system of an unknown kind (fuse.fastfs)", "unknown"),
        ("/dev/sda1", "ext4", "ext4", "host"),
        ("overlay", "overlay", "overlay, the container's own layers", "host"),
        ("tmpfs", "tmpfs", "tmpfs, in memory", "host"),
    ],
)
def test_a_mount_is_named_by_what_it_is(device: str, kind: str, name: str, place: str) -> None:
    assert kind_of(Mount(device, Path("/x"), kind, ())) == (name, place)


@pytest.fixture
def as_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], None]:
    """The test's folder is a mount of this device and kind, which this host has not tried yet."""
    (tmp_path / "tmp").mkdir(exist_ok=True)

    def pretend(device: str, kind: str) -> None:
        capabilities._known.cache_clear()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
        monkeypatch.setattr(capabilities, "read_mounts", lambda: f"{device} {tmp_path} {kind} rw 0 0\n")

    return pretend


@pytest.mark.parametrize(
    ("device", "kind", "mode"),
    [
        *(("mfs#h:1", "fuse", "full"), ("/d", "ext4", "full"), ("JuiceFS:v", "fuse.juicefs", "full")),
        *(("s3fs", "fuse.s3fs", "read-only"), ("fast", "fuse", "read-only"), ("/data", "fuse.bindfs", "read-only")),
    ],
)
def test_what_one_mount_cannot_show_counts_only_for_a_known_kind(
    store: ModelStore, as_kind: Callable[[str, str], None], device: str, kind: str, mode: str
) -> None:
    as_kind(device, kind)
    use = use_of(store.layout, store.settings)
    assert use.mode == mode
    assert may_change(store.layout, store.settings) == (mode == "full")
    assert use.capabilities.exclusive_create == ("yes" if mode == "full" else "unproven")
    assert store.layout.root.exists() == (mode == "full"), "what no trial could prove is not written to"
    shown = probe(store.layout)
    assert shown.refused_rename == shown.random_writes == shown.hard_links == "yes", "one mount shows these"
    assert shown.exclusive_create == shown.fresh_names == ("yes" if mode == "full" else "unproven")


@pytest.mark.parametrize("name", [name for name, meaning in capabilities.MEANINGS.items() if meaning.is_needed])
@pytest.mark.parametrize("answer", ["no", "unproven"])
def test_one_thing_that_is_needed_and_lacking_makes_it_read_only(name: str, answer: Any) -> None:
    kind = kind_of(Mount("mfs#h:1", Path("/x"), "fuse", ()))
    use = decided_by(kind, replace(PROVEN, **{name: answer, "notes": {name: "as seen"}}))
    assert (use.mode, decided_by(kind, PROVEN).mode) == ("read-only", "full")
    assert capabilities.MEANINGS[name].text in use.reason
    assert "as seen" in use.reason


def test_locks_and_links_are_not_needed() -> None:
    kind = kind_of(Mount("mfs#h:1", Path("/x"), "fuse", ()))
    assert decided_by(kind, replace(PROVEN, locks="no", hard_links="no")).mode == "full"


def test_it_is_tried_once_for_a_host_and_never_for_a_hit(
    hub: Hub, store: ModelStore, as_kind: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Layout] = []

    def counted(layout: Layout) -> Capabilities:
        tried.append(layout)
        return probe(layout)

    as_kind("mfs#h:1", "fuse")
    monkeypatch.setattr(capabilities, "probe", counted)
    write_repo(hub.folder / "org" / "name")
    write_repo(hub.folder / "org" / "other")
    store.ensure("org/name")
    capabilities._known.cache_clear()  # as in another process
    store.ensure("org/other")
    assert len(tried) == 1
    as_kind("mfs#h:2", "fuse")
    store.ensure("org/name")
    assert len(tried) == 1
    store.set_alias("chat", "org/name")
    assert len(tried) == 2, "another mount"
    assert not list(store.layout.trash.iterdir())


def test_a_record_of_the_host_that_is_damaged_is_made_again(
    store: ModelStore, as_kind: Callable[[str, str], None], tmp_path: Path
) -> None:
    as_kind("mfs#h:1", "fuse")
    assert use_of(store.layout, store.settings).mode == "full"
    (record,) = (tmp_path / "tmp").glob("modelstore-*/volumes/*.json")
    before = json.loads(record.read_text())
    for damage in ("", "{", "[]", '{"other": 1}'):
        record.write_text(damage)
        capabilities._known.cache_clear()
        assert use_of(store.layout, store.settings).mode == "full"
        assert json.loads(record.read_text()) == before


def test_a_full_volume_is_not_a_read_only_one(
    store: ModelStore, as_kind: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    as_kind("mfs#h:1", "fuse")

    def full(path: Path, **_options: Any) -> int:
        raise NoSpace(f"no space for {path}")

    with monkeypatch.context() as patch:
        patch.setattr(durable, "open_for_write", full)
        assert use_of(store.layout, store.settings).mode == "full", "a removal must go on"
    assert not list(tmp_path.glob("tmp/modelstore-*/volumes/*.json")), "nothing was kept of it"


def test_a_fault_that_passes_is_not_kept(
    store: ModelStore, as_kind: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An error of the moment, or a trash that another worker has emptied: tried twice, and again by the next one."""
    as_kind("mfs#h:1", "fuse")
    tried: list[int] = []
    real = durable.rename

    def failing(source: Path, target: Path) -> None:
        if source.name == "staged":
            tried.append(1)
            if len(tried) in fails:
                raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(durable, "rename", failing)
    fails = {1}
    assert use_of(store.layout, store.settings).mode == "full"
    as_kind("mfs#h:2", "fuse")
    tried.clear()
    fails = {1, 2}
    assert use_of(store.layout, store.settings).mode == "read-only"
    capabilities._known.cache_clear()
    assert use_of(store.layout, store.settings).mode == "full"


def test_the_setting_decides(store: ModelStore, as_kind: Callable[[str, str], None]) -> None:
    as_kind("s3fs", "fuse.s3fs")
    assert use_of(store.layout, replace(store.settings, volume_mode="full")).mode == "full"
    as_kind("mfs#h:1", "fuse")
    assert use_of(store.layout, replace(store.settings, volume_mode="read-only")).mode == "read-only"
    assert Settings.from_env({"MODELSTORE_VOLUME": "Read_Only", "MODELSTORE_ROOT": "/x"}).volume_mode == "read-only"


CHANGES = [
    ["seed", "org/other"],
    ["rm", "org/name", "--yes"],
    ["rm", "--unfinished", "--yes"],
    ["gc", "--to", "0B", "--yes"],
    ["pin", "org/name"],
    ["unpin", "org/name"],
    ["alias", "set", "chat", "org/name", "--yes"],
    ["alias", "set", "new", "org/name", "--yes"],
    ["alias", "rm", "chat", "--yes"],
    ["alias", "rollback", "chat", "--yes"],
    ["adopt", "FOLDER"],
    ["seed", "--from", "LIST"],
    ["seed", "org/name", "--dtype", "bfloat16"],
]


def tree_of(root: Path) -> dict[str, tuple[int, int]]:
    """All files but the records of starts and uses, which are left on a read-only volume, too."""
    paths = (path for path in root.rglob("*") if not path.is_dir())
    kept = (path for path in paths if path.relative_to(root).parts[0] not in ("used", "starts"))
    return {str(path.relative_to(root)): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in kept}


def test_no_command_changes_a_read_only_volume(hub: Hub, store: ModelStore, cli: Cli, tmp_path: Path) -> None:
    for name in ("name", "other", "before"):
        write_repo(hub.folder / "org" / name)
    store.set_alias("chat", "org/before")
    store.set_alias("chat", "org/name")
    write_repo(tmp_path / "models" / "org" / "third")
    (tmp_path / "list.toml").write_text('[[model]]\nreference = "org/name"\naliases = ["new"]\n')
    before = tree_of(store.layout.root)
    places = {"FOLDER": str(tmp_path / "models" / "org" / "third"), "LIST": str(tmp_path / "list.toml")}
    cli.env["MODELSTORE_VOLUME"] = "read-only"
    for command in CHANGES:
        words = [places.get(word, word) for word in command]
        done = cli(*words, *(["--as", "org/third"] if words[0] == "adopt" else []), code=1)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, (command, done.stderr)
        assert "MODELSTORE_VOLUME=read-only" in lines[0], command
        assert tree_of(store.layout.root) == before, command
    for command in (["path", "org/name"], ["ls"], ["verify"], ["show", "org/name"], ["seed", "org/name"], ["du"]):
        cli(*command)
        assert tree_of(store.layout.root) == before, command


def test_a_verification_leaves_no_note_on_a_read_only_volume(hub: Hub, store: ModelStore, cli: Cli) -> None:
    write_repo(hub.folder / "org" / "name")
    snapshot = store.ensure("org/name")
    with (snapshot.path / snapshot.weights[0].path).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    cli.env["MODELSTORE_VOLUME"] = "read-only"
    before = tree_of(store.layout.root)
    assert "not noted" in cli("verify", code=5).stderr
    assert tree_of(store.layout.root) == before


def test_a_miss_says_before_the_first_byte_what_the_volume_lacks(
    hub: Hub, store: ModelStore, as_kind: Callable[[str, str], None]
) -> None:
    write_repo(hub.folder / "org" / "name")
    as_kind("s3fs", "fuse.s3fs")
    with pytest.raises(ReadOnlyVolume) as raised:
        store.ensure("org/name")
    text = str(raised.value)
    for words in (
        "a bucket through s3fs",
        "read-only",
        "not proven",
        "seed REF --to s3://",
        "MODELSTORE_ROOT name a network volume",
    ):
        assert words in text
    assert not hub.served.bytes["model.safetensors"]
    assert not (store.layout.root / "claims").exists()
