"""The snapshot that a fill publishes, and the traces of a bad repo."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from modelstore.errors import (
    AccessDenied,
    BadSafetensors,
    DigestMismatch,
    HubUnavailable,
    ModelStoreError,
    NoSpace,
    NotFound,
    NoWeights,
    PickleRefused,
    RepoNotFound,
    UnsafeName,
    WeightOverflow,
)
from modelstore.fill.footprint import DiskBudget
from modelstore.store import ModelStore
from modelstore.timeline import Timeline
from modelstore.volume.manifest import parse_manifest
from modelstore.volume.tree import tree_blocks
from modelstore.volume.verify import verify_snapshot
from tests.conftest import MakeStore, leave_unfinished
from tests.support.checkpoints import published, random_tensors, weights_bytes, write_repo
from tests.support.hub import Hub


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


def test_a_download_takes_at_most_one_original_beside_the_stored_files(hub: Hub, store: ModelStore) -> None:
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


def test_a_done_record_of_another_file_counts_for_nothing(hub: Hub, make_store: MakeStore) -> None:
    write_repo(hub.folder / "org" / "name", shards=2)
    store = make_store(sleep=lambda _seconds: None)
    leave_unfinished(hub, store)
    record = next(store.settings.root.rglob("done/tokenizer.json.json"))
    record.write_text(record.read_text().replace("tokenizer.json", "tokenizen.json"))
    assert verify_snapshot(store.ensure("org/name")).ok


def test_weights_that_float16_cannot_hold_stop_the_seed_or_are_stored_as_bfloat16(hub: Hub, store: ModelStore) -> None:
    tensors = random_tensors(2) | {"layers.9.weight": np.array([1e6, 1.0], np.float32)}
    write_repo(hub.folder / "org" / "name", tensors)
    with pytest.raises(WeightOverflow, match=r"layers\.9\.weight"):
        store.ensure("org/name")
    assert published(store) == []
    snapshot = store.ensure("org/name", overflow="bfloat16")
    assert snapshot.dtype == "bfloat16"
    assert store.ensure("org/name", overflow="bfloat16").status == "present"


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


def test_too_little_space_is_said_before_the_download(
    hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = write_repo(hub.folder / "org" / "name")
    real = os.statvfs

    def nearly_full(path: Any) -> Any:
        state = real(path)
        return os.statvfs_result((*state[:4], 1, *state[5:]))

    monkeypatch.setattr(os, "statvfs", nearly_full)
    with pytest.raises(NoSpace, match=r"needs 1\.56 MB more .* has 4\.1 kB free") as caught:
        store.ensure("org/name")
    assert caught.value.exit_code == 6
    assert hub.served.bytes["model.safetensors"] == 0 < weights_bytes(repo)
    assert published(store) == []


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


def test_the_manifest_tells_the_origin_of_each_file(hub: Hub, store: ModelStore) -> None:
    repo = write_repo(hub.folder / "org" / "name")
    snapshot = store.ensure("org/name@main")
    manifest = parse_manifest((snapshot.path / "manifest.json").read_bytes(), where="x")
    assert manifest == snapshot.manifest
    assert (manifest.source.kind, manifest.source.location, manifest.source.revision) == ("hub", hub.url, "main")
    record = manifest.file("model.safetensors")
    assert record is not None
    assert record.origin is not None
    assert record.origin.size_bytes == (repo / "model.safetensors").stat().st_size


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
