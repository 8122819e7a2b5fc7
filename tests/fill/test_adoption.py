"""Models that lie on the volume in another layout become snapshots, and the other way round."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelstore.fill.adoption import find
from modelstore.fill.storage_policy import StoragePolicy
from modelstore.store import ModelStore
from modelstore.volume.snapshots import Snapshot
from modelstore.volume.verify import verify_snapshot
from tests.conftest import Cli
from tests.support.checkpoints import random_tensors, write_repo
from tests.support.hub import Hub, sha256_of

HALF = {name: tensor.astype(np.float16) for name, tensor in random_tensors(3, (512, 512)).items()}
HALF_CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16"}


def downloaded(hub: Hub, cache: Path, *, links: bool = True) -> None:
    """What huggingface_hub itself leaves in a cache."""
    code = "import sys, huggingface_hub; huggingface_hub.snapshot_download('org/name', cache_dir=sys.argv[1])"
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    subprocess.run([sys.executable, "-c", code, str(cache)], env=env, check=True, capture_output=True)


def is_sound(store: ModelStore, reference: str, dtype: str | None = None) -> Snapshot:
    snapshot = store.lookup(reference, dtype=dtype)
    assert snapshot is not None
    assert verify_snapshot(snapshot).ok
    return snapshot


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    return tmp_path / "volume"


def test_an_hf_cache_becomes_a_snapshot_by_links(hub: Hub, cli: Cli, store: ModelStore, volume: Path) -> None:
    repo = write_repo(hub.folder / "org" / "name", HALF, shards=2, config=HALF_CONFIG)
    cache = volume / "huggingface-cache" / "hub"
    downloaded(hub, cache)
    hub.served.bytes.clear()
    (record,) = cli.json("adopt", str(cache))
    assert (record["repo_id"], record["commit"]) == ("org/name", hub.commit(repo))
    assert record["linked_files"] == 2
    assert not hub.served.bytes, "nothing is downloaded"
    snapshot = is_sound(store, "org/name")
    blob = cache / "models--org--name" / "blobs" / sha256_of(repo / snapshot.weights[0].path)
    assert os.path.samefile(blob, snapshot.path / snapshot.weights[0].path)
    assert cli.json("adopt", str(cache / "models--org--name"))[0]["status"] == "present"


def test_files_are_converted_and_the_cache_stays_as_it_was(hub: Hub, cli: Cli, store: ModelStore, volume: Path) -> None:
    repo = write_repo(hub.folder / "org" / "name")
    cache = volume / "cache"
    downloaded(hub, cache)
    (record,) = cli.json("adopt", str(cache))
    assert record["linked_files"] == 0
    blob = cache / "models--org--name" / "blobs" / sha256_of(repo / "model.safetensors")
    assert sha256_of(blob) == blob.name
    assert is_sound(store, "org/name").size_bytes < blob.stat().st_size


def test_a_damaged_blob_is_refused_and_nothing_is_published(
    hub: Hub, cli: Cli, store: ModelStore, volume: Path
) -> None:
    repo = write_repo(hub.folder / "org" / "name", HALF, config=HALF_CONFIG)
    downloaded(hub, volume / "cache")
    blob = volume / "cache" / "models--org--name" / "blobs" / sha256_of(repo / "model.safetensors")
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    assert "does not match its name" in cli("adopt", str(volume / "cache"), code=5).stderr
    assert store.lookup("org/name") is None
    assert blob.read_bytes() == data, "the owner's file is left alone"


def test_a_folder_of_save_pretrained_gets_a_name(cli: Cli, store: ModelStore, volume: Path) -> None:
    folder = write_repo(volume / "my-model", HALF, config=HALF_CONFIG)
    (record,) = cli.json("adopt", str(folder), "--as", "me/chat")
    assert (record["repo_id"], record["linked_files"]) == ("me/chat", 1)
    snapshot = is_sound(store, "me/chat")
    assert os.path.samefile(folder / "model.safetensors", snapshot.path / "model.safetensors")
    (again,) = cli.json("adopt", str(folder))
    assert again["repo_id"] == "local/my-model"
    assert cli.json("path", f"file://{folder}")["path"] == again["path"]


def test_a_folder_that_changed_is_adopted_again_under_its_name(cli: Cli, store: ModelStore, volume: Path) -> None:
    for seed, name in ((1, "me/chat"), (2, "me/chat"), (3, None), (4, None)):
        write_repo(volume / "mine", random_tensors(2, seed=seed))
        (record,) = cli.json("adopt", str(volume / "mine"), *(["--as", name] if name else []))
        assert is_sound(store, name or "local/mine").commit == record["commit"]


def test_a_mirror_of_the_sdk_with_a_folder_in_it(cli: Cli, store: ModelStore, volume: Path, tmp_path: Path) -> None:
    from runpod.serverless.utils.rp_volume_cache import VolumeCache

    folder = write_repo(tmp_path / "models" / "chat", HALF, config=HALF_CONFIG, extra={"vocab.txt": b"a\n"})
    cache = VolumeCache([str(tmp_path / "models")], namespace="ep", volume_path=str(volume), best_effort=False)
    cache.sync(background=False)
    (record,) = cli.json("adopt", str(volume / ".cache" / "ep"), "--as", "me/chat")
    assert record["linked_files"] == 1
    snapshot = is_sound(store, "me/chat")
    assert {file.path for file in snapshot.manifest.files} >= {"config.json", "model.safetensors", "vocab.txt"}
    assert folder.exists()


def test_a_mirror_of_the_sdk_with_an_hf_cache_in_it(
    hub: Hub, cli: Cli, store: ModelStore, volume: Path, tmp_path: Path
) -> None:
    from runpod.serverless.utils.rp_volume_cache import VolumeCache

    repo = write_repo(hub.folder / "org" / "name", HALF, config=HALF_CONFIG)
    downloaded(hub, tmp_path / "home" / "hub")
    cache = VolumeCache([str(tmp_path / "home")], namespace="ep", volume_path=str(volume), best_effort=False)
    cache.sync(background=False)
    hub.served.bytes.clear()
    (record,) = cli.json("adopt", str(volume / ".cache" / "ep"))
    assert (record["repo_id"], record["commit"], record["linked_files"]) == ("org/name", hub.commit(repo), 1)
    assert not hub.served.bytes, "the Hub is asked for names alone"
    is_sound(store, "org/name")


@pytest.mark.parametrize(
    ("make", "arguments", "code", "words"),
    [
        (lambda _path: None, [], 3, "is not a folder"),
        (lambda path: path.mkdir(parents=True), [], 3, "holds no model"),
        (lambda path: (path / "models--org--name" / "refs").mkdir(parents=True), [], 3, "holds no whole model"),
        (lambda path: write_repo(path), ["--as", "name"], 2, "write it like org/name"),
        (lambda path: (path / "models--a--b").mkdir(parents=True), ["--as", "a/b"], 2, "leave out --as"),
    ],
)
def test_a_folder_that_cannot_be_adopted_is_one_line(
    cli: Cli, volume: Path, make: Any, arguments: list[str], code: int, words: str
) -> None:
    make(volume / "x")
    assert words in cli("adopt", str(volume / "x"), *arguments, code=code).stderr


def test_a_snapshot_is_found_by_huggingface_hub_after_an_export(hub: Hub, cli: Cli, volume: Path) -> None:
    repo = write_repo(hub.folder / "org" / "name", shards=2)
    cli("seed", "org/name")
    cache = volume / "huggingface-cache" / "hub"
    refused = cli("export", "org/name", "--hf-cache", str(cache), code=3)
    assert "--dtype keep" in refused.stderr
    cli("seed", "org/name", "--dtype", "keep")
    record = cli.json("export", "org/name", "--hf-cache", str(cache))
    code = (
        "import sys, huggingface_hub as h; print(h.snapshot_download('org/name', cache_dir=sys.argv[1], "
        "local_files_only=True)); print(h.hf_hub_download('org/name', 'config.json', cache_dir=sys.argv[1]))"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(cache)], env=env, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [record["path"], f"{record['path']}/config.json"]
    for path in Path(record["path"]).iterdir():
        assert path.read_bytes() == (repo / path.name).read_bytes()
    assert cli.json("export", "org/name", "--hf-cache", str(cache)) == record, "a second time changes nothing"
    assert cli.json("adopt", str(cache), "--root", str(volume / "other"))[0]["commit"] == hub.commit(repo)


def test_a_folder_is_not_exported_as_if_it_came_from_the_hub(cli: Cli, volume: Path) -> None:
    folder = write_repo(volume / "mine")
    cli("seed", f"file://{folder}", "--dtype", "keep")
    assert "it came from a folder" in cli("export", f"file://{folder}", "--hf-cache", str(volume / "c"), code=8).stderr


def test_a_link_that_was_left_behind_is_never_written_to(
    cli: Cli, store: ModelStore, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it compares; the next run converts, as a version does that knows the model's type."""
    folder = write_repo(volume / "mine", config={"model_type": "not-known-yet", "torch_dtype": "float32"})
    before = (folder / "model.safetensors").read_bytes()
    (found,) = find(folder, store.settings, repo_id="me/mine")

    def killed(*_arguments: Any, **_more: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr("modelstore.fill.weights.digests_of_file", killed)
        with pytest.raises(SystemExit):
            store.adopt(found.source, found.resolved)
    assert [path for path in store.layout.root.rglob("*.linked") if path.samefile(folder / "model.safetensors")]
    with monkeypatch.context() as patch:
        patch.setattr("modelstore.fill.plan.storage_policy", lambda dtype, *_configs: StoragePolicy(dtype))
        store.adopt(found.source, found.resolved)
    assert (folder / "model.safetensors").read_bytes() == before
    assert is_sound(store, "me/mine").size_bytes < len(before)


def test_one_model_that_cannot_be_had_does_not_keep_the_others_out(
    hub: Hub, cli: Cli, store: ModelStore, volume: Path
) -> None:
    write_repo(hub.folder / "org" / "name", HALF, config=HALF_CONFIG)
    downloaded(hub, volume / "cache")
    huge = {"layers.0.weight": np.full((64, 64), 1e30, np.float32)}
    repo = write_repo(hub.folder / "org" / "a-huge", huge)
    code = "import sys, huggingface_hub; huggingface_hub.snapshot_download('org/a-huge', cache_dir=sys.argv[1])"
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    subprocess.run([sys.executable, "-c", code, str(volume / "cache")], env=env, check=True, capture_output=True)
    (volume / "cache" / "models--org--name" / "refs" / "odd").write_bytes(b"\xff\xfe")
    records = cli.json("adopt", str(volume / "cache"), code=8)
    assert [record.get("repo_id", "failed") for record in records] == ["failed", "org/name"]
    assert repo.exists()


def test_a_store_of_a_newer_format_and_a_model_that_is_not_allowed_are_left_alone(
    cli: Cli, store: ModelStore, volume: Path
) -> None:
    folder = write_repo(volume / "mine", HALF, config=HALF_CONFIG)
    cli.env["MODELSTORE_ALLOWED_MODELS"] = "org/only"
    cli("adopt", str(folder), "--as", "me/mine", code=8)
    del cli.env["MODELSTORE_ALLOWED_MODELS"]
    store.layout.root.mkdir(parents=True, exist_ok=True)
    store.layout.format_file.write_text("2\n")
    cli("adopt", str(folder), "--as", "me/mine", code=8)
    assert not store.layout.models.exists()


def test_linking_needs_no_room(store: ModelStore, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_repo(volume / "mine", HALF, config=HALF_CONFIG)
    (found,) = find(folder, store.settings, repo_id="me/mine")
    real = os.statvfs

    def nearly_full(path: Any) -> Any:
        values = list(real(path))
        values[3] = values[4] = 100_000 // values[1]
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", nearly_full)
    assert store.adopt(found.source, found.resolved).size_bytes > 1_000_000
