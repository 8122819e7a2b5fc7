"""The sources of a model: a folder, an HF cache on the volume, the Hub; and the trust in each."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from modelstore.errors import (
    DigestMismatch,
    SnapshotNotFound,
)
from modelstore.store import ModelStore
from modelstore.volume.verify import verify_snapshot
from tests.conftest import Cli, MakeStore
from tests.support.checkpoints import published, random_tensors, weights_bytes, write_repo
from tests.support.hub import Hub


def test_a_folder_becomes_a_snapshot_without_a_network(hub: Hub, store: ModelStore, tmp_path: Path) -> None:
    folder = write_repo(tmp_path / "my model")
    snapshot = store.ensure(f"file://{tmp_path}/my%20model")
    assert snapshot.repo_id == "local/my-model"
    assert hub.served.requests == []
    assert store.ensure(f"file://{tmp_path}/my%20model").status == "present"
    write_repo(folder, random_tensors(4, seed=5))
    again = store.ensure(f"file://{tmp_path}/my%20model", refresh=True)
    assert again.commit != snapshot.commit


def hf_cache(root: Path, hub: Hub, name: str) -> Path:
    """An HF cache as the real library lays it out, beside the store's root."""
    from huggingface_hub import snapshot_download

    cache = root.parent / "huggingface-cache" / "hub"
    snapshot_download(name, cache_dir=cache, endpoint=hub.url)
    return cache


def test_an_hf_cache_on_the_volume_costs_one_listing(hub: Hub, store: ModelStore) -> None:
    tensors = random_tensors(5)
    repo = write_repo(hub.folder / "org" / "name", tensors, shards=2)
    hf_cache(store.settings.root, hub, "org/name")
    hub.served.reset()
    snapshot = store.ensure("org/name")
    assert hub.served.total_bytes == 0
    assert len(hub.served.requests) == 1, "what the cache holds is compared with the Hub's listing"
    assert snapshot.manifest.source.compared_with == "hub"
    assert snapshot.commit == hub.commit(repo)
    assert snapshot.downloaded_bytes == 0
    assert verify_snapshot(snapshot).ok
    assert not any(path.is_symlink() for path in snapshot.path.rglob("*"))


def damage(cache: Path, kind: str) -> None:
    """Damage the weights in an HF cache, as a copy of it that ended early, or a disk, may leave them."""
    link = next((cache / "models--org--name" / "snapshots").rglob("model.safetensors"))
    blob = link.resolve()
    data = bytearray(blob.read_bytes())
    match kind:
        case "a flipped byte":
            data[-1] ^= 1
            blob.write_bytes(data)
        case "zeros where the copy ended":
            blob.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
        case "half a blob":
            blob.write_bytes(data[: len(data) // 2])
        case "links to a place that was left":
            for each in link.parent.iterdir():
                target = each.resolve()
                each.unlink()
                each.symlink_to(Path("/root/.cache/huggingface/hub/models--org--name/blobs") / target.name)


DAMAGES = ["a flipped byte", "zeros where the copy ended", "half a blob", "links to a place that was left"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_hf_cache_is_named_and_the_hub_is_used(
    hub: Hub, store: ModelStore, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    write_repo(hub.folder / "org" / "name")
    cache = hf_cache(store.settings.root, hub, "org/name")
    damage(cache, kind)
    snapshot = store.ensure("org/name")
    assert snapshot.manifest.source.kind == "hub"
    assert verify_snapshot(snapshot).ok
    assert "org/name" in caplog.text or "models--org--name" in caplog.text
    assert "huggingface-cache" in caplog.text or "HF cache" in caplog.text


@pytest.mark.parametrize("name", ["tokenizer.json", "modules.json", "2_Dense/config.json"])
def test_an_hf_cache_of_a_program_that_needed_less_is_passed_over(
    hub: Hub, store: ModelStore, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    repo = write_repo(hub.folder / "org" / "name")
    save_file(random_tensors(1), repo / "2.safetensors")
    (repo / "2_Dense").mkdir()
    (repo / "2.safetensors").rename(repo / "2_Dense" / "model.safetensors")
    (repo / "2_Dense" / "config.json").write_text("{}")
    kinds = {"": "Transformer", "2_Dense": "Dense"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (repo / "modules.json").write_text(json.dumps(modules))
    cache = hf_cache(store.settings.root, hub, "org/name")
    next((cache / "models--org--name" / "snapshots").glob(f"*/{name}")).unlink()
    snapshot = store.ensure("org/name")
    assert snapshot.manifest.source.kind == "hub"
    assert {
        "tokenizer.json",
        "modules.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
    } <= snapshot.manifest.paths
    assert f"lacks {name}" in caplog.text


def test_a_loop_of_links_in_an_hf_cache_is_passed_over(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name")
    cache = hf_cache(store.settings.root, hub, "org/name")
    link = next((cache / "models--org--name" / "snapshots").glob("*/config.json"))
    link.unlink()
    link.symlink_to(link)
    assert store.ensure("org/name").manifest.source.kind == "hub"


def test_a_damaged_hf_cache_is_never_published(hub: Hub, store: ModelStore, make_store: MakeStore) -> None:
    write_repo(hub.folder / "org" / "name")
    cache = hf_cache(store.settings.root, hub, "org/name")
    damage(cache, "a flipped byte")
    with pytest.raises(
        DigestMismatch, match=r"models--org--name is damaged .* MODELSTORE_OFFLINE .* remove that cache"
    ):
        make_store(offline=True).ensure("org/name")
    assert published(store) == []


def forge(cache: Path, name: str, data: bytes) -> None:
    """Put other bytes under a file's name, as a neighbour on the volume can: the blob is named by their own digest."""
    link = next((cache / "models--org--name" / "snapshots").rglob(name))
    large = link.name.endswith(".safetensors")
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    blob = link.resolve().with_name(hashlib.sha256(data).hexdigest() if large else oid)
    blob.write_bytes(data)
    link.unlink()
    link.symlink_to(os.path.relpath(blob, link.parent))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_other_bytes_under_the_hubs_commit_in_an_hf_cache_are_never_taken(
    hub: Hub, store: ModelStore, cli: Cli, name: str
) -> None:
    repo = write_repo(hub.folder / "org" / "name", random_tensors(2))
    cache = hf_cache(store.settings.root, hub, "org/name")
    other = write_repo(hub.folder / "org" / "other", random_tensors(2, seed=9), config={"model_type": "gpt2"})
    forge(cache, name, (other / name).read_bytes())
    assert "differs from the Hub" in cli("adopt", str(cache), code=5).stderr
    assert published(store) == []
    snapshot = store.ensure("org/name")
    assert snapshot.downloaded_bytes >= weights_bytes(repo), "it was fetched from the Hub"
    assert snapshot.manifest.source.kind == "hub"


def test_a_commit_that_the_hub_does_not_know_is_not_taken_from_an_hf_cache(hub: Hub, store: ModelStore) -> None:
    repo = write_repo(hub.folder / "org" / "name")
    cache = hf_cache(store.settings.root, hub, "org/name") / "models--org--name"
    (cache / "snapshots" / hub.commit(repo)).rename(cache / "snapshots" / ("f" * 40))
    (cache / "refs" / "main").write_text("f" * 40)
    assert store.ensure("org/name").commit == hub.commit(repo)


@pytest.mark.slow
def test_without_the_hub_an_hf_cache_is_taken_by_its_names_and_the_manifest_says_so(
    hub: Hub, make_store: MakeStore, cli: Cli
) -> None:
    write_repo(hub.folder / "org" / "name", random_tensors(2))
    hf_cache(make_store().settings.root, hub, "org/name")
    hub.faults.status["metadata"] = [(503, {})] * 1000
    began = time.monotonic()
    snapshot = make_store().ensure("org/name")
    assert time.monotonic() - began < 20
    assert snapshot.manifest.source.compared_with == "cache"
    assert cli.json("show", "org/name")["source"]["compared_with"] == "cache"
    assert "compared with the names in that cache alone" in cli("show", "org/name").stdout


def test_code_is_never_taken_from_an_hf_cache(hub: Hub, make_store: MakeStore) -> None:
    repo = write_repo(hub.folder / "org" / "name", extra={"modeling_own.py": b"mine = 1\n"})
    (repo / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_own.Own"}, "model_type": "own"}')
    commit = hub.commit(repo)
    cache = hf_cache(make_store().settings.root, hub, "org/name")
    forge(cache, "modeling_own.py", b"import os\n")
    store = make_store(trust_remote_code=True)
    offline = make_store(trust_remote_code=True, offline=True)
    with pytest.raises(SnapshotNotFound):
        offline.ensure(f"org/name@{commit}")
    snapshot = store.ensure(f"org/name@{commit}")
    assert (snapshot.path / "modeling_own.py").read_bytes() == b"mine = 1\n"
    assert snapshot.manifest.source.kind == "hub"


def test_an_hf_cache_without_all_shards_is_passed_over(hub: Hub, store: ModelStore) -> None:
    repo = write_repo(hub.folder / "org" / "name", shards=2)
    cache = hf_cache(store.settings.root, hub, "org/name")
    next((cache / "models--org--name" / "snapshots").rglob("model-00002*")).unlink()
    hub.served.reset()
    assert store.ensure("org/name").downloaded_bytes >= weights_bytes(repo)


@pytest.mark.parametrize("damage", ["no index", "no config", "files instead of links", "a download that was cut"])
def test_an_hf_cache_that_cannot_be_trusted_is_passed_over(hub: Hub, store: ModelStore, damage: str) -> None:
    repo = write_repo(hub.folder / "org" / "name", shards=2)
    cache = hf_cache(store.settings.root, hub, "org/name") / "models--org--name"
    folder = cache / "snapshots" / hub.commit(repo)
    match damage:
        case "no index":
            (folder / "model.safetensors.index.json").unlink()
        case "no config":
            (folder / "config.json").unlink()
        case "files instead of links":
            path = next(folder.glob("*.safetensors"))
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data[:-1] + b"\xff")
        case "a download that was cut":
            (cache / "blobs" / "abc.incomplete").touch()
    hub.served.reset()
    snapshot = store.ensure("org/name")
    assert snapshot.downloaded_bytes >= weights_bytes(repo)
    assert verify_snapshot(snapshot).ok


def test_a_folder_that_changes_while_it_is_seeded_is_refused(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelstore.fill.folder import FolderSource

    folder = write_repo(tmp_path / "model")
    resolve = FolderSource.resolve

    def resolve_then_change(self: FolderSource) -> Any:
        resolved = resolve(self)
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)
        return resolved

    monkeypatch.setattr(FolderSource, "resolve", resolve_then_change)
    with pytest.raises(DigestMismatch):
        store.ensure(f"file://{folder}")
    assert published(store) == []


def test_a_seed_takes_from_the_hf_cache_the_files_that_the_hub_names(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name")
    hf_cache(store.settings.root, hub, "org/name")
    hub.served.reset()
    assert store.ensure("org/name", refresh=True).downloaded_bytes == 0
    assert len(hub.served.requests) == 2, "which commit main is, and what that holds"


def test_offline_serves_present_models_and_names_missing_ones(hub: Hub, make_store: MakeStore) -> None:
    write_repo(hub.folder / "org" / "name")
    with pytest.raises(SnapshotNotFound, match="MODELSTORE_OFFLINE") as caught:
        make_store(offline=True).ensure("org/name")
    assert caught.value.exit_code == 3
    make_store().ensure("org/name")
    hub.served.reset()
    assert make_store(offline=True).ensure("org/name", refresh=True).status == "present"
    assert hub.served.requests == []
