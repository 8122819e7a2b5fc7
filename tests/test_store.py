"""The store from outside: what a seed publishes, what a hit costs, and what a bad repo leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from modelstore.errors import (
    AccessDenied,
    BadSafetensors,
    DigestMismatch,
    FormatTooNew,
    HubUnavailable,
    ModelStoreError,
    NoSpace,
    NotFound,
    NoWeights,
    PickleRefused,
    Refused,
    RepoNotFound,
    RootUnusable,
    SnapshotNotFound,
    UnsafeName,
    WaitTimeout,
    WeightOverflow,
)
from modelstore.fill.footprint import DiskBudget
from modelstore.fill.observer import Observer
from modelstore.fill.progress import Progress
from modelstore.store import ModelStore
from modelstore.timeline import Timeline
from modelstore.volume.durable import tree_blocks
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.manifest import parse_manifest
from modelstore.volume.verify import verify_snapshot
from tests.conftest import Cli
from tests.support.checkpoints import random_tensors, weights_bytes, write_repo
from tests.support.hub import Hub

MakeStore = Callable[..., ModelStore]


def published(store: ModelStore) -> list[Path]:
    """Everything below models/, whatever it is."""
    return sorted(store.layout.models.rglob("*")) if store.layout.models.exists() else []


def test_a_seed_publishes_the_models_files_in_fp16_with_a_manifest(hub: Hub, store: ModelStore) -> None:
    tensors = random_tensors(6)
    leftovers = {"pytorch_model.bin": b"x", "model.gguf": b"x", "tf_model.h5": b"x", "flax_model.msgpack": b"x",
                 "onnx/model.onnx": b"x", "modeling_x.py": b"x", "training_args.bin": b"x"}  # fmt: skip
    kept = {"LICENSE": b"free", "chat_template.jinja": b"{}", "generation_config.json": b"{}", "vocab.txt": b"a"}
    repo = write_repo(hub.folder / "org" / "name", tensors, extra=leftovers | kept)
    snapshot = store.ensure("org/name")
    files = {str(path.relative_to(snapshot.path)) for path in snapshot.path.rglob("*") if path.is_file()}
    assert files == {*kept, "config.json", "tokenizer.json", "model.safetensors", "manifest.json"}
    assert not any(path.is_symlink() for path in snapshot.path.rglob("*"))
    assert snapshot.path == store.settings.root / "models" / "org--name" / f"{hub.commit(repo)}.float16"
    stored = load_file(snapshot.path / "model.safetensors")
    assert all(np.array_equal(stored[name], tensor.astype(np.float16)) for name, tensor in tensors.items())
    assert json.loads((snapshot.path / "config.json").read_bytes())["torch_dtype"] == "float16"
    assert verify_snapshot(snapshot).ok
    assert not list((store.settings.root / "staging").rglob("*.safetensors"))
    assert snapshot.status == "downloaded"
    assert snapshot.downloaded_bytes == hub.served.total_bytes


def test_a_second_seed_makes_one_metadata_call_and_downloads_nothing(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name")
    store.ensure("org/name", refresh=True)
    hub.served.reset()
    snapshot = store.ensure("org/name", refresh=True)
    assert (snapshot.status, snapshot.downloaded_bytes) == ("present", 0)
    assert len(hub.served.requests) == 1
    assert hub.served.total_bytes == 0


def test_a_hit_asks_nobody_and_takes_under_5_ms(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name", shards=4)
    store.ensure("org/name")
    hub.served.reset()
    times = []
    for _ in range(50):
        began = time.perf_counter()
        assert store.ensure("org/name").status == "present"
        times.append(time.perf_counter() - began)
    assert hub.served.requests == []
    assert statistics.median(times) < 0.005


def test_a_fleet_serves_one_commit_until_somebody_seeds_again(hub: Hub, store: ModelStore) -> None:
    repo = write_repo(hub.folder / "org" / "name")
    first = store.ensure("org/name")
    write_repo(repo, random_tensors(4, seed=1))
    assert store.ensure("org/name").commit == first.commit
    second = store.ensure("org/name", refresh=True)
    assert second.commit != first.commit
    assert store.ensure("org/name").commit == second.commit
    assert store.ensure(f"org/name@{first.commit}").path == first.path
    assert len(list(store.snapshots())) == 2


def test_a_snapshot_that_is_gone_is_made_again_at_the_commit_the_fleet_uses(hub: Hub, store: ModelStore) -> None:
    repo = write_repo(hub.folder / "org" / "name")
    first = store.ensure("org/name")
    old = shutil.copytree(repo, hub.folder.parent / "old")
    hub.revisions["org/name", "old"] = old
    write_repo(repo, random_tensors(4, seed=1))
    shutil.rmtree(first.path)
    assert store.ensure("org/name").commit == first.commit
    assert store.ensure("org/name").status == "present"


def test_a_worker_that_finishes_late_does_not_turn_the_fleet_back(hub: Hub, make_store: MakeStore) -> None:
    repo = write_repo(hub.folder / "org" / "name")
    store = make_store()
    old = hub.commit(repo)
    hub.revisions["org/name", "old"] = shutil.copytree(repo, hub.folder.parent / "old")

    class SeedMeanwhile(Observer):
        """While the first worker downloads, somebody moves the branch and seeds."""

        done = False

        def filling(self, key: SnapshotKey, progress: Progress) -> None:
            if not self.done:
                self.done = True
                write_repo(repo, random_tensors(4, seed=1))
                make_store().ensure("org/name", refresh=True)

    assert store.ensure("org/name", observer=SeedMeanwhile()).commit == old
    assert store.ensure("org/name").commit == hub.commit(repo) != old


@pytest.mark.parametrize("trouble", ["down", "slow", "429"])
def test_a_hub_in_trouble_changes_nothing_for_a_hit(hub: Hub, store: ModelStore, trouble: str) -> None:
    write_repo(hub.folder / "org" / "name")
    store.ensure("org/name")
    match trouble:
        case "down":
            hub.stop()
        case "slow":
            hub.faults.metadata_delay_s = 60
        case "429":
            hub.faults.status["metadata"] = [(429, {"Retry-After": "60"})] * 10
    began = time.monotonic()
    assert store.ensure("org/name").status == "present"
    assert time.monotonic() - began < 10


def test_shards_are_converted_one_by_one_and_the_index_says_the_new_size(hub: Hub, store: ModelStore) -> None:
    tensors = random_tensors(7)
    write_repo(hub.folder / "org" / "name", tensors, shards=3)
    snapshot = store.ensure("org/name")
    index = json.loads((snapshot.path / "model.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes // 2 for tensor in tensors.values())
    for name, shard in index["weight_map"].items():
        assert np.array_equal(load_file(snapshot.path / shard)[name], tensors[name].astype(np.float16))
    assert verify_snapshot(snapshot).ok


def test_a_shard_is_converted_while_the_next_one_is_downloaded(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name", random_tensors(6, (512, 512)), shards=3)
    hub.faults.bytes_per_s = 10e6
    timeline = Timeline()
    store.ensure("org/name", timeline=timeline)
    spans = {span.name: span for span in timeline.spans}
    assert spans["convert"].start < spans["download"].end - 0.1
    assert spans["convert"].end < spans["download"].end + 0.1


def test_a_download_takes_at_most_one_original_more_than_what_is_stored(hub: Hub, store: ModelStore) -> None:
    tensors = random_tensors(24, (512, 512))
    folder = write_repo(hub.folder / "org" / "name", tensors, shards=8)
    shard = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    stored = sum(tensor.nbytes // 2 for tensor in tensors.values())
    taken: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            with suppress(FileNotFoundError):  # it changes while we look
                taken.append(tree_blocks(store.layout.root))

    watching = threading.Thread(target=watch)
    watching.start()
    store.ensure("org/name")
    over.set()
    watching.join()
    assert max(taken) > shard, "it was seen at work"
    assert max(taken) <= stored + shard + 500_000, "and the small files, records and journals"


def test_many_shards_may_be_in_work_at_first_and_one_at_the_end() -> None:
    peak = DiskBudget(dict.fromkeys("abcde", (2, 4)))
    assert peak.limit == 14
    assert [peak.begin(name) for name in "abc"] == [True, True, False]
    peak.end("a")
    assert peak.begin("c")
    assert not peak.begin("d")
    peak.end("b")
    assert not peak.begin("d")
    peak.end("c")
    assert peak.begin("d")
    assert not peak.begin("e")
    peak.end("d")
    assert peak.begin("e")
    unchanged = DiskBudget(dict.fromkeys("abc", (5, 0)))
    assert all(unchanged.begin(name) for name in "abc"), "what is stored as it comes waits for nothing"


def test_a_conversion_that_fails_ends_the_download_of_those_that_wait_for_it(hub: Hub, store: ModelStore) -> None:
    tensors = random_tensors(8) | {"layers.0.weight": np.full((256, 256), 1e6, np.float32)}
    write_repo(hub.folder / "org" / "name", tensors, shards=8)
    began = time.monotonic()
    with pytest.raises(WeightOverflow):
        store.ensure("org/name")
    assert time.monotonic() - began < 10


def test_a_16_bit_checkpoint_is_stored_byte_for_byte(hub: Hub, store: ModelStore) -> None:
    tensors = {name: tensor.astype(np.float16) for name, tensor in random_tensors(3).items()}
    repo = write_repo(hub.folder / "org" / "name", tensors)
    snapshot = store.ensure("org/name")
    assert (snapshot.path / "model.safetensors").read_bytes() == (repo / "model.safetensors").read_bytes()
    record = snapshot.manifest.file("model.safetensors")
    assert record is not None
    assert record.origin is None


def test_keep_stores_every_byte_as_it_came(hub: Hub, store: ModelStore) -> None:
    repo = write_repo(hub.folder / "org" / "name", shards=2)
    snapshot = store.ensure("org/name", dtype="keep")
    for file in snapshot.manifest.files:
        assert (snapshot.path / file.path).read_bytes() == (repo / file.path).read_bytes()


def test_variants_of_one_commit_lie_side_by_side(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name")
    paths = {store.ensure("org/name", dtype=dtype).path for dtype in ("float16", "bfloat16", "float32", "keep")}
    assert len(paths) == 4
    assert len(list(store.snapshots())) == 4


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


def test_a_damaged_blob_of_an_hf_cache_is_never_published(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name")
    cache = hf_cache(store.settings.root, hub, "org/name")
    blob = next((cache / "models--org--name" / "snapshots").rglob("model.safetensors")).resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(DigestMismatch):
        store.ensure("org/name")
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


def test_a_done_record_of_another_file_counts_for_nothing(hub: Hub, make_store: MakeStore) -> None:
    write_repo(hub.folder / "org" / "name", shards=2)
    store = make_store(sleep=lambda _seconds: None)
    hub.faults.status["model-00002-of-00002.safetensors"] = [(404, {})] * 1000
    with pytest.raises(HubUnavailable):
        store.ensure("org/name")
    hub.faults.status.clear()
    record = next(store.settings.root.rglob("done/tokenizer.json.json"))
    record.write_text(record.read_text().replace("tokenizer.json", "tokenizen.json"))
    assert verify_snapshot(store.ensure("org/name")).ok


def test_a_seed_takes_from_the_hf_cache_what_the_hub_names(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name")
    hf_cache(store.settings.root, hub, "org/name")
    hub.served.reset()
    assert store.ensure("org/name", refresh=True).downloaded_bytes == 0
    assert len(hub.served.requests) == 2, "which commit main is, and what that holds"


def test_offline_serves_what_is_there_and_says_what_is_not(hub: Hub, make_store: MakeStore) -> None:
    write_repo(hub.folder / "org" / "name")
    with pytest.raises(SnapshotNotFound, match="MODELSTORE_OFFLINE") as caught:
        make_store(offline=True).ensure("org/name")
    assert caught.value.exit_code == 3
    make_store().ensure("org/name")
    hub.served.reset()
    assert make_store(offline=True).ensure("org/name", refresh=True).status == "present"
    assert hub.served.requests == []


def test_weights_that_float16_cannot_hold_stop_the_seed_or_are_stored_as_bfloat16(hub: Hub, store: ModelStore) -> None:
    tensors = random_tensors(2) | {"huge": np.array([1e6, 1.0], np.float32)}
    write_repo(hub.folder / "org" / "name", tensors)
    with pytest.raises(WeightOverflow, match="huge"):
        store.ensure("org/name")
    assert published(store) == []
    snapshot = store.ensure("org/name", overflow="bfloat16")
    assert snapshot.dtype == "bfloat16"
    assert store.ensure("org/name", overflow="bfloat16").status == "present"


def bad_repo(hub: Hub, kind: str) -> str:
    """A repo that must not be published; returns the reference to ask for."""
    folder = write_repo(hub.folder / "org" / "name", shards=2 if "index" in kind or "weight_map" in kind else 1)
    index = folder / "model.safetensors.index.json"
    weights = folder / "model.safetensors"
    match kind:
        case "unknown repo":
            return "org/unknown"
        case "unknown revision":
            return "org/name@v9"
        case "gated":
            hub.gated.add("org/name")
        case "only pickles":
            weights.rename(folder / "pytorch_model.bin")
        case "only gguf":
            weights.rename(folder / "model.gguf")
        case "name that leaves":
            hub.faults.extra_names.append("../evil.json")
        case "absolute name":
            hub.faults.extra_names.append("/etc/evil.json")
        case "manifest of its own":
            (folder / "manifest.json").write_text("{}")
        case "names that differ in case":
            (folder / "Config.json").write_text("{}")
        case "header that lies":
            weights.write_bytes((2**40).to_bytes(8, "little") + weights.read_bytes()[8:])
        case "truncated weights":
            weights.write_bytes(weights.read_bytes()[:-4])
        case "config that is no JSON":
            (folder / "config.json").write_text("{nonsense")
        case "index that is no JSON":
            index.write_text("[")
        case "weight_map that leaves":
            index.write_text(json.dumps({"weight_map": {"x": "../../x.safetensors"}}))
        case "weight_map of a missing file":
            index.write_text(json.dumps({"weight_map": {"x": "model-00009-of-00009.safetensors"}}))
        case "weight_map of a missing tensor":
            record = json.loads(index.read_text())
            record["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
            index.write_text(json.dumps(record))
        case "weight_map into a folder":
            index.write_text(json.dumps({"weight_map": {"x": "sub/model.safetensors"}}))
        case "a surrogate in a name":
            header = b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
            weights.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
        case "wrong bytes":
            hub.faults.flip_byte.add("model.safetensors")
        case "wrong size":
            hub.faults.stated_size["model.safetensors"] = weights.stat().st_size - 8
    return "org/name"


BAD: dict[str, tuple[type[ModelStoreError], int]] = {
    "unknown repo": (RepoNotFound, 3),
    "unknown revision": (NotFound, 3),
    "gated": (AccessDenied, 4),
    "only pickles": (PickleRefused, 8),
    "only gguf": (NoWeights, 3),
    "name that leaves": (UnsafeName, 8),
    "absolute name": (UnsafeName, 8),
    "manifest of its own": (UnsafeName, 8),
    "names that differ in case": (UnsafeName, 8),
    "header that lies": (BadSafetensors, 5),
    "truncated weights": (BadSafetensors, 5),
    "config that is no JSON": (BadSafetensors, 5),
    "index that is no JSON": (BadSafetensors, 5),
    "weight_map that leaves": (UnsafeName, 8),
    "weight_map of a missing file": (BadSafetensors, 5),
    "weight_map of a missing tensor": (BadSafetensors, 5),
    "weight_map into a folder": (BadSafetensors, 5),
    "a surrogate in a name": (BadSafetensors, 5),
    "wrong bytes": (DigestMismatch, 5),
    "wrong size": (DigestMismatch, 5),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_repo_ends_in_one_line_and_publishes_nothing(hub: Hub, store: ModelStore, kind: str) -> None:
    reference = bad_repo(hub, kind)
    error, code = BAD[kind]
    with pytest.raises(error) as caught:
        store.ensure(reference)
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)
    assert published(store) == []
    assert store.lookup(reference) is None
    assert not list(store.settings.root.rglob("*.safetensors"))


def test_a_bad_repo_that_was_mended_is_seeded(hub: Hub, store: ModelStore) -> None:
    bad_repo(hub, "wrong bytes")
    with pytest.raises(DigestMismatch):
        store.ensure("org/name")
    hub.faults.flip_byte.clear()
    assert store.ensure("org/name").status == "downloaded"


def test_a_store_of_a_newer_format_is_left_alone(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name")
    store.settings.root.mkdir(parents=True)
    store.layout.format_file.write_text("2\n")
    for call in (lambda: store.ensure("org/name"), lambda: store.lookup("org/name"), lambda: list(store.snapshots())):
        with pytest.raises(FormatTooNew, match="upgrade") as caught:
            call()
        assert caught.value.exit_code == 8
    assert [path.name for path in store.settings.root.iterdir()] == ["FORMAT"]


def test_a_root_that_is_a_file_is_named(hub: Hub, make_store: MakeStore, tmp_path: Path) -> None:
    write_repo(hub.folder / "org" / "name")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RootUnusable, match="MODELSTORE_ROOT"):
        make_store(root=tmp_path / "file" / "modelstore").ensure("org/name")


def test_too_little_space_is_said_before_the_download(
    hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = write_repo(hub.folder / "org" / "name")
    real = os.statvfs

    def nearly_full(path: Any) -> Any:
        state = real(path)
        return os.statvfs_result((*state[:4], 1, *state[5:]))

    monkeypatch.setattr(os, "statvfs", nearly_full)
    with pytest.raises(NoSpace, match=r"needs 1\.54 MB more .* has 4\.1 kB free") as caught:
        store.ensure("org/name")
    assert caught.value.exit_code == 6
    assert hub.served.bytes["model.safetensors"] == 0 < weights_bytes(repo)
    assert published(store) == []


def test_a_model_that_is_not_allowed_is_refused_before_anything_is_asked(hub: Hub, make_store: MakeStore) -> None:
    from modelstore.reference import parse_reference

    store = make_store(allowed_models=(parse_reference("org/other"),))
    with pytest.raises(Refused, match="MODELSTORE_ALLOWED_MODELS"):
        store.ensure("org/name")
    assert hub.served.requests == []


def test_a_snapshot_that_lost_a_file_is_put_aside_and_made_again(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name")
    first = store.ensure("org/name")
    (first.path / "model.safetensors").unlink()
    assert store.lookup("org/name") is None
    again = store.ensure("org/name")
    assert again.path == first.path
    assert verify_snapshot(again).ok
    assert len(list((store.settings.root / "quarantine").iterdir())) == 1


def test_a_snapshot_copied_under_another_name_is_passed_over(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name")
    first = store.ensure("org/name")
    shutil.copytree(first.path, first.path.with_name(f"{'0' * 40}.float16"))
    assert store.lookup(f"org/name@{'0' * 40}") is None


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_a_link_in_the_place_of_a_file_is_not_followed(hub: Hub, store: ModelStore, name: str) -> None:
    write_repo(hub.folder / "org" / "name")
    first = store.ensure("org/name")
    (first.path / name).rename(first.path.parent.parent / "elsewhere")
    (first.path / name).symlink_to(first.path.parent.parent / "elsewhere")
    assert store.lookup("org/name") is None


def test_an_alias_that_does_not_exist_is_not_found(store: ModelStore) -> None:
    with pytest.raises(SnapshotNotFound, match="alias"):
        store.ensure("@chat")


def test_weights_alone_are_a_model_too(hub: Hub, store: ModelStore) -> None:
    folder = hub.folder / "org" / "bare"
    folder.mkdir(parents=True)
    save_file(random_tensors(1), folder / "model.safetensors")
    assert [file.path for file in store.ensure("org/bare").manifest.files] == ["model.safetensors"]


def test_a_surrogate_in_a_config_is_kept(hub: Hub, store: ModelStore) -> None:
    folder = write_repo(hub.folder / "org" / "name")
    (folder / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float32", "note": "\\ud800"}')
    config = json.loads((store.ensure("org/name").path / "config.json").read_bytes())
    assert config["note"] == "\ud800"
    assert config["torch_dtype"] == "float16"


def test_the_manifest_tells_where_each_file_came_from(hub: Hub, store: ModelStore) -> None:
    repo = write_repo(hub.folder / "org" / "name")
    snapshot = store.ensure("org/name@main")
    manifest = parse_manifest((snapshot.path / "manifest.json").read_bytes(), where="x")
    assert manifest == snapshot.manifest
    assert (manifest.source.kind, manifest.source.location, manifest.source.revision) == ("hub", hub.url, "main")
    record = manifest.file("model.safetensors")
    assert record is not None
    assert record.origin is not None
    assert record.origin.size_bytes == (repo / "model.safetensors").stat().st_size


def test_a_wait_that_is_too_long_says_for_whom_and_what_to_do(hub: Hub, make_store: MakeStore) -> None:
    from modelstore.volume.claim import Claim, Contender

    repo = write_repo(hub.folder / "org" / "name")
    store = make_store(worker_id="b")
    key = SnapshotKey("org/name", hub.commit(repo), "float16")
    claim = Contender(store.layout.claims(key), worker="worker-a", lease_s=30).try_claim()
    assert isinstance(claim, Claim)
    with claim, pytest.raises(WaitTimeout, match=r"worker-a.*MODELSTORE_WAIT_S") as caught:
        store.ensure("org/name", wait_s=0.6)
    assert caught.value.exit_code == 7


def test_a_first_run_records_its_spans(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name")
    timeline = Timeline()
    store.ensure("org/name", timeline=timeline)
    assert [span.name for span in timeline.spans if span.end > span.start] != []
    assert {"lookup", "download", "convert", "publish"} <= {span.name for span in timeline.spans}


def test_a_sharded_pipeline_keeps_its_folders(hub: Hub, store: ModelStore) -> None:
    folder = hub.folder / "org" / "pipe"
    (folder / "unet").mkdir(parents=True)
    (folder / "text_encoder").mkdir()
    (folder / "unused").mkdir()
    pipeline = {"_class_name": "Pipe", "unet": ["diffusers", "UNet"], "text_encoder": ["transformers", "CLIP"]}
    (folder / "model_index.json").write_text(json.dumps(pipeline))
    save_file(random_tensors(1), folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "unet" / "config.json").write_text("{}")
    save_file(random_tensors(1), folder / "text_encoder" / "model.safetensors")
    save_file(random_tensors(1), folder / "unused" / "model.safetensors")
    snapshot = store.ensure("org/pipe")
    paths = {file.path for file in snapshot.manifest.files}
    assert paths == {
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    assert verify_snapshot(snapshot).ok


def test_the_hub_may_go_away_in_the_middle_and_the_rest_is_fetched_later(hub: Hub, make_store: MakeStore) -> None:
    repo = write_repo(hub.folder / "org" / "name", random_tensors(8, (1024, 512)), shards=4)
    store = make_store(sleep=lambda _seconds: None)
    hub.faults.status["model-00003-of-00004.safetensors"] = [(404, {})] * 1000
    with pytest.raises(HubUnavailable):
        store.ensure("org/name")
    assert published(store) == []
    first = hub.served.total_bytes
    hub.faults.status.clear()
    snapshot = store.ensure("org/name")
    assert snapshot.status == "resumed"
    assert verify_snapshot(snapshot).ok
    assert hub.served.total_bytes < weights_bytes(repo) * 1.02
    assert 0 < first < weights_bytes(repo)


def test_verify_finds_a_flipped_bit_a_lost_byte_a_missing_and_a_foreign_file(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name", shards=3)
    snapshot = store.ensure("org/name")
    shards = sorted(snapshot.path.glob("*.safetensors"))
    data = bytearray(shards[0].read_bytes())
    data[len(data) // 2] ^= 1
    shards[0].write_bytes(data)
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    shards[2].unlink()
    (snapshot.path / "stray").symlink_to("/etc/passwd")
    found = {finding.path for finding in verify_snapshot(replace(snapshot)).findings}
    assert found == {*(shard.name for shard in shards), "stray"}
