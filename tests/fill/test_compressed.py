"""Compressed snapshots: made by a seed, served, found, verified and mended."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from safetensors.torch import load_file, save_file

from modelstore import ModelStore, load_tensors
from modelstore.errors import DigestMismatch, DoesNotFit, IntegrityError, NotFound, Refused
from modelstore.fill.hf_cache import export_to_hf_cache
from modelstore.fill.observer import Observer
from modelstore.load import memory
from modelstore.load.model_folder import ModelFolder
from modelstore.load.reader import start_reading
from modelstore.reference import parse_reference
from modelstore.volume import planes
from modelstore.volume.evict import evict
from modelstore.volume.snapshots import Snapshot
from modelstore.volume.unfinished import is_running
from modelstore.volume.verify import verify_snapshot
from modelstore.warmstart import begin
from tests.conftest import Cli, MakeStore, leave_unfinished
from tests.support.checkpoints import random_tensors, write_repo
from tests.support.compressed import are_those, born_in, compressed_file, flip
from tests.support.hub import Hub
from tests.support.records import WRITTEN, record


def test_a_seed_stores_fewer_bytes_and_every_start_gets_the_same_weights(
    make_store: MakeStore, tensors: dict[str, torch.Tensor]
) -> None:
    store = make_store(compress="always")
    snapshot = store.ensure("org/name")
    assert snapshot.key.compressed
    assert snapshot.status == "downloaded"
    assert snapshot.size_bytes <= 0.69 * snapshot.plain_bytes
    assert not list(snapshot.path.glob("*.safetensors"))
    assert verify_snapshot(snapshot).ok
    assert are_those(load_tensors(snapshot), tensors, torch.float16)
    start = begin(replace(store.settings, model=parse_reference("org/name")))
    start.reading.wait_all()
    assert start.timeline.outcome == "hit"
    span = start.reading.as_span(start.timeline).as_json()
    assert (span["bytes"], span["plain_bytes"]) == (snapshot.size_bytes, snapshot.plain_bytes)
    assert 0 < span["decoding_s"] < 60
    for file in snapshot.weights:
        assert len(start.reading.wait(file.path)) == file.size_bytes
    start.reading.close()
    start.in_use.end()


@pytest.mark.parametrize(
    ("born", "dtype", "limit"),
    [
        (torch.bfloat16, "float16", 0.69),
        (torch.float32, "float16", 0.87),
        (torch.bfloat16, "bfloat16", 0.69),
        (torch.float32, "float32", 0.87),
        (torch.bfloat16, "keep", 0.69),
        (torch.float16, "keep", 0.87),
    ],
)
def test_each_dtype_is_stored_within_its_share_and_comes_back_bit_for_bit(
    hub: Hub, make_store: MakeStore, born: torch.dtype, dtype: str, limit: float
) -> None:
    source = born_in(born, count=1)
    write_repo(hub.folder / "org" / "name", source, save=save_file)
    snapshot = make_store(compress="always").ensure("org/name", dtype=dtype)
    wanted = born if dtype == "keep" else getattr(torch, dtype)
    assert snapshot.size_bytes <= limit * snapshot.plain_bytes
    assert are_those(load_tensors(snapshot), source, wanted)


def test_the_same_bytes_as_plain_are_compressed(make_store: MakeStore, tensors: dict[str, torch.Tensor]) -> None:
    plain = make_store().ensure("org/name")
    compressed = make_store(compress="always", root=plain.path.parents[2].with_name("other")).ensure("org/name")
    contents = [replace(file, stored=None) for file in compressed.manifest.contents]
    assert contents == list(plain.manifest.files)


def test_a_start_takes_what_is_there_and_prefers_what_the_setting_says(
    make_store: MakeStore, cli: Cli, hub: Hub, tensors: dict[str, torch.Tensor]
) -> None:
    plain, compressing = make_store(), make_store(compress="always")
    assert not plain.ensure("org/name").key.compressed
    hub.served.bytes.clear()
    assert not compressing.ensure("org/name").key.compressed
    cli("compress", "org/name", "--keep")
    assert compressing.ensure("org/name").key.compressed
    assert not plain.ensure("org/name").key.compressed
    cli("compress", "org/name", "--yes")
    assert plain.ensure("org/name").key.compressed
    assert not any(name.endswith(".safetensors") for name in hub.served.bytes)


def test_no_program_gets_the_path_of_compressed_files(
    make_store: MakeStore, cli: Cli, tensors: dict[str, torch.Tensor]
) -> None:
    make_store(compress="always").ensure("org/name")
    error = cli("path", "org/name", code=8).stderr
    assert "modelstore expand org/name" in error
    assert "export" in error
    cli("expand", "org/name", "--keep")
    folder = Path(cli("path", "org/name").stdout.strip())
    assert sorted(path.name for path in folder.glob("*.safetensors"))
    assert are_those(load_file(folder / "model-00001-of-00002.safetensors"), {}, torch.float16)


def test_an_export_is_the_repos_own_files(
    make_store: MakeStore, cli: Cli, hub: Hub, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    make_store(compress="always").ensure("org/name", dtype="keep")
    folder = Path(cli("export", "org/name", "--hf-cache", str(tmp_path / "cache")).stdout.strip())
    for path in (hub.folder / "org" / "name").glob("*.safetensors"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    cli("export", "org/name", "--hf-cache", str(tmp_path / "cache"))
    for blob in (tmp_path / "cache").glob("*/blobs/*"):
        blob.unlink()
        blob.with_name(f"{blob.name}.incomplete").write_bytes(b"of huggingface_hub")
    cli("export", "org/name", "--hf-cache", str(tmp_path / "cache"))
    assert all(path.read_bytes() == b"of huggingface_hub" for path in folder.parents[1].glob("blobs/*.incomplete"))
    assert not list(folder.parents[1].glob("blobs/.*"))


def test_without_the_library_an_export_is_one_line(
    make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: dict[str, torch.Tensor]
) -> None:
    snapshot = make_store(compress="always").ensure("org/name", dtype="keep")
    monkeypatch.setattr("modelstore.volume.content.find_spec", lambda name: None)
    with pytest.raises(NotFound, match=r"runpod-modelstore\[compress\]"):
        export_to_hf_cache(snapshot, tmp_path / "cache", revision="main")
    assert not list((tmp_path / "cache").glob("*/blobs/.*"))


def test_rm_means_both_forms(make_store: MakeStore, cli: Cli, tensors: dict[str, torch.Tensor]) -> None:
    store = make_store()
    store.ensure("org/name")
    cli("compress", "org/name", "--keep")
    assert len(cli.json("rm", "org/name", "--yes")) == 2
    assert not list(store.catalog.keys())


def test_a_flipped_bit_anywhere_is_found_and_a_load_never_returns_it(
    make_store: MakeStore, tensors: dict[str, torch.Tensor]
) -> None:
    store = make_store(compress="always")
    snapshot = store.ensure("org/name")
    chance = random.Random(0)
    paths = [snapshot.path / file.path for file in snapshot.manifest.files]
    weights = [max(path.stat().st_size, 1) for path in paths]
    rounds, seen = (1000 if WRITTEN else 60), 0
    for _round in range(rounds):
        (path,) = chance.choices(paths, weights)
        place, bit = chance.randrange(path.stat().st_size), 1 << chance.randrange(8)
        flip(path, place, bit)
        seen += not verify_snapshot(snapshot).intact
        if path.suffix == ".compressed":
            with suppress(DigestMismatch):
                assert are_those(load_tensors(snapshot), tensors, torch.float16)  # a bit of the padding
        flip(path, place, bit)
    record(
        "No worker serves wrong weights",
        "one flipped bit, anywhere in a compressed snapshot: `verify` names the file, and no load returns it",
        tried=rounds,
        survived=seen,
    )
    assert seen == rounds
    assert verify_snapshot(snapshot).ok


def test_a_start_mends_what_is_damaged_and_stays_compressed(
    make_store: MakeStore, hub: Hub, tensors: dict[str, torch.Tensor]
) -> None:
    store = make_store(compress="always")
    snapshot = store.ensure("org/name")
    flip(compressed_file(snapshot), 100, 1)
    hub.served.bytes.clear()
    mended = store.ensure("org/name", damaged=snapshot)
    assert mended.key == snapshot.key
    assert mended.inode != snapshot.inode
    assert verify_snapshot(mended).ok
    assert are_those(load_tensors(mended), tensors, torch.float16)
    fetched = [name for name in hub.served.bytes if name.endswith(".safetensors")]
    assert len(fetched) == 1  # the intact shard was used again


def test_a_seed_that_was_cut_short_goes_on(make_store: MakeStore, hub: Hub, tensors: dict[str, torch.Tensor]) -> None:
    store = make_store(compress="always")
    leave_unfinished(hub, store)
    hub.served.bytes.clear()
    snapshot = store.ensure("org/name")
    assert snapshot.status == "resumed"
    assert verify_snapshot(snapshot).ok
    assert not hub.served.bytes["model-00001-of-00002.safetensors"]


def test_a_waiting_worker_reads_the_compressed_files_beside_the_one_that_makes_them(
    store_env: dict[str, str], make_store: MakeStore, tensors: dict[str, torch.Tensor]
) -> None:
    code = (
        "import sys; from modelstore.settings import Settings; from modelstore.warmstart import begin;"
        "start = begin(Settings.from_env()); start.reading.wait_all();"
        "print(start.timeline.outcome, start.reading.size_bytes); start.reading.close(); start.in_use.end()"
    )
    env = os.environ | store_env | {"MODEL_ID": "org/name", "MODELSTORE_COMPRESS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=env | {"RUNPOD_POD_ID": f"w{number}"}, stdout=subprocess.PIPE, text=True
        )
        for number in range(3)
    ]
    outcomes = sorted(worker.communicate(timeout=100)[0].split() for worker in workers)
    snapshot = make_store().lookup("org/name")
    assert snapshot is not None
    assert {int(size) for _outcome, size in outcomes} == {snapshot.plain_bytes}
    assert [outcome for outcome, _size in outcomes].count("downloaded") == 1


def test_a_list_says_which_models_are_compressed(
    hub: Hub, cli: Cli, tmp_path: Path, store: ModelStore, tensors: dict[str, torch.Tensor]
) -> None:
    write_repo(hub.folder / "org" / "other", born_in(torch.bfloat16, rows=64), save=save_file)
    listed = tmp_path / "models.toml"
    listed.write_text(
        '[[model]]\nreference = "org/name"\ncompress = true\n\n[[model]]\nreference = "org/other"\ncompress = false\n'
    )
    records: dict[str, Any] = {record["repo_id"]: record for record in cli.json("seed", "--from", str(listed))}
    assert records["org/name"]["compressed"] is True
    assert "compressed" not in records["org/other"]
    assert cli.json("seed", "--from", str(listed), "--dry-run")["models"][0]["status"] == "present"


def test_a_seed_takes_the_form_that_is_there_and_undoes_nothing(
    make_store: MakeStore, cli: Cli, hub: Hub, tensors: dict[str, torch.Tensor]
) -> None:
    store = make_store()
    store.ensure("org/name", refresh=True)
    cli("compress", "org/name", "--yes")
    hub.served.bytes.clear()
    again = store.ensure("org/name", refresh=True)
    assert again.key.compressed
    assert cli.json("seed", "org/name", "--compress")["status"] == "present"
    assert cli.json("seed", "org/name", "--plain")["status"] == "present"
    assert len(list(store.catalog.keys())) == 1
    assert not any(name.endswith(".safetensors") for name in hub.served.bytes)


def test_a_worker_without_the_setting_waits_for_the_form_that_is_being_made(
    make_store: MakeStore, hub: Hub, tensors: dict[str, torch.Tensor]
) -> None:
    compressing, plain = make_store(compress="always"), make_store()
    claimed = threading.Event()
    observer = Observer()
    observer.planned = lambda key, *, weights_bytes: claimed.set()  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lambda: compressing.ensure("org/name", observer=observer))
        assert claimed.wait(30)
        assert plain.ensure("org/name").key.compressed
        assert first.result().key.compressed
    assert len(list(plain.catalog.keys())) == 1


def test_a_form_that_holds_another_model_is_not_taken_for_it(
    store: ModelStore, cli: Cli, tensors: dict[str, torch.Tensor]
) -> None:
    """One was stored with the repo's code, the other one without."""
    plain = store.ensure("org/name")
    cli("compress", "org/name", "--keep")
    (plain.path / "manifest.json").write_bytes(replace(plain.manifest, remote_code=True).encode())
    assert "were seeded with different settings" in cli("compress", "org/name", "--yes", code=8).stderr
    assert len(list(store.catalog.keys())) == 2


def test_a_dead_worker_does_not_say_how_weights_are_stored(
    make_store: MakeStore, hub: Hub, tensors: dict[str, torch.Tensor]
) -> None:
    compressing, plain = make_store(compress="always"), make_store()
    compressing.ensure("org/name")
    key = next(iter(plain.catalog.keys()))
    (claim,) = plain.layout.claims(key).iterdir()
    record = json.loads(claim.read_bytes())
    claim.write_bytes(json.dumps(record | {"state": "held"}).encode().ljust(1024))
    assert is_running(plain.layout, key)
    os.utime(claim, (time.time() - 60, time.time() - 60))
    assert not is_running(plain.layout, key)
    evict(plain.layout, key, force=True)
    assert not plain.ensure("org/name").key.compressed


def test_an_intact_form_serves_if_the_other_one_cannot_be_mended(
    make_store: MakeStore, hub: Hub, cli: Cli, tensors: dict[str, torch.Tensor]
) -> None:
    store = make_store()
    plain = store.ensure("org/name")
    cli("compress", "org/name", "--keep")
    flip(plain.path / "model-00002-of-00002.safetensors", 5000, 1)
    offline = make_store(offline=True)
    other = offline.ensure("org/name", damaged=plain)
    assert other.key == plain.key.twin
    assert are_those(load_tensors(other), tensors, torch.float16)


def test_a_pruning_seed_keeps_both_forms_of_a_listed_model(
    make_store: MakeStore, cli: Cli, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    make_store().ensure("org/name")
    cli("compress", "org/name", "--keep")
    listed = tmp_path / "models.toml"
    listed.write_text('[[model]]\nreference = "org/name"\naliases = ["chat"]\n')
    assert cli.json("seed", "--from", str(listed), "--prune", "--dry-run")["removed"] == []
    cli("seed", "--from", str(listed), "--prune", "--yes")
    assert len(cli.json("ls")) == 2


def test_adapters_stay_plain(make_store: MakeStore, hub: Hub, cli: Cli) -> None:
    folder = write_repo(hub.folder / "org" / "style", random_tensors(1, (64, 64)))
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").rename(folder / "adapter_config.json")
    snapshot = make_store(compress="always").ensure("org/style", dtype="keep")
    assert not snapshot.has_compressed_files
    assert load_file(snapshot.path / "adapter_model.safetensors")
    assert cli("path", "org/style").stdout.strip() == str(snapshot.path)
    other = make_store(root=tmp_root(snapshot)).ensure("org/style", dtype="keep")
    cli.env |= {"MODELSTORE_ROOT": str(tmp_root(snapshot))}
    assert "adapters are always stored as they are" in cli("compress", "org/style", code=8).stderr
    assert other.path.is_dir()


def tmp_root(snapshot: Snapshot) -> Path:
    """The root of another store beside that of a snapshot."""
    return snapshot.path.parents[2].with_name("other")


def test_a_server_gets_the_weights_of_modules_plain(
    hub: Hub, make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No reading has them, and vLLM would leave out a module without a file in silence."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    repo = write_repo(hub.folder / "org" / "name", born_in(torch.bfloat16, rows=64), save=save_file)
    (repo / "2_Dense").mkdir()
    save_file(
        {"linear.weight": born_in(torch.bfloat16, rows=64)["layers.0.weight"]}, repo / "2_Dense/model.safetensors"
    )
    (repo / "2_Dense" / "config.json").write_text("{}")
    kinds = {"": "Transformer", "2_Dense": "Dense"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (repo / "modules.json").write_text(json.dumps(modules))
    plain, compressed = (
        make_store().ensure("org/name"),
        make_store(compress="always", root=tmp_path / "c").ensure("org/name"),
    )
    assert compressed.has_compressed_files
    reading = start_reading(compressed, beside=True)
    folder = ModelFolder(compressed, reading)
    stored = (folder.path / "2_Dense" / "model.safetensors").read_bytes()
    assert stored == (plain.path / "2_Dense" / "model.safetensors").read_bytes()
    with pytest.raises(Refused, match="modelstore expand"):
        folder.check_plain()
    folder.link_to_memory(reading)
    assert (folder.path / "2_Dense" / "model.safetensors").read_bytes() == stored
    folder.close()
    reading.close()


def test_a_server_without_memory_for_the_weights_gets_plain_files_or_a_hint(
    make_store: MakeStore, cli: Cli, monkeypatch: pytest.MonkeyPatch, tensors: dict[str, torch.Tensor]
) -> None:
    store = make_store(compress="always")
    compressed = store.ensure("org/name")
    settings = replace(store.settings, model=parse_reference("org/name"))
    monkeypatch.setattr(
        "modelstore.warmstart.memory.free_host_memory", lambda: memory.FreeMemory(1 << 20, "the host", "use another")
    )
    with pytest.raises(DoesNotFit, match="modelstore expand org/name@"):
        begin(settings, target="shared")
    cli("expand", "org/name", "--keep")
    pending = begin(settings, target="shared")
    assert pending.snapshot.key == compressed.key.plain
    pending.reading.close()
    pending.in_use.end()


def test_a_snapshot_that_was_mended_in_other_bytes_is_the_same_one(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, tensors: dict[str, torch.Tensor]
) -> None:
    """Encoders may differ in the frames that they write."""
    store = make_store(compress="always")
    first = store.ensure("org/name")
    monkeypatch.setattr(planes, "_PARAMETERS", zstandard.ZstdCompressionParameters(compression_level=3))
    monkeypatch.setattr(planes, "_codecs", threading.local())
    second = make_store(compress="always", root=tmp_root(first)).ensure("org/name")
    assert first.manifest.files != second.manifest.files
    assert second.manifest.has_contents_of(first.manifest)
    store.catalog.check_unchanged(replace(first, manifest=replace(first.manifest, files=second.manifest.files)))
    with pytest.raises(IntegrityError):
        store.catalog.check_unchanged(replace(first, manifest=replace(first.manifest, remote_code=True)))


def test_an_adoption_takes_the_compressed_form_that_is_there(
    store: ModelStore, cli: Cli, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    store.ensure("org/name", dtype="keep")
    cli("export", "org/name", "--hf-cache", str(tmp_path / "volume" / "cache"))
    cli("compress", "org/name", "--dtype", "keep", "--yes")
    (record,) = cli.json("adopt", str(tmp_path / "volume" / "cache"), "--dtype", "keep")
    assert (record["status"], record["compressed"]) == ("present", True)
    assert len(list(store.catalog.keys())) == 1


def test_a_table_that_does_not_fit_its_bytes_is_found_and_mended(
    make_store: MakeStore, hub: Hub, tensors: dict[str, torch.Tensor]
) -> None:
    """All stored checksums are right: only decoding shows it."""
    store = make_store(compress="always")
    snapshot = store.ensure("org/name")
    files = []
    for file in snapshot.manifest.files:
        if file.plain is not None:
            turned = tuple((0, *entry[1:]) if len(entry) == 3 else entry for entry in file.plain.table)
            file = replace(file, plain=replace(file.plain, table=turned))
        files.append(file)
    manifest = snapshot.path / "manifest.json"
    manifest.write_bytes(replace(snapshot.manifest, files=tuple(files)).encode())
    wrong = store.lookup("org/name")
    assert wrong is not None
    with pytest.raises(DigestMismatch):
        load_tensors(wrong)
    mended = store.ensure("org/name", damaged=wrong)
    assert are_those(load_tensors(mended), tensors, torch.float16)


def test_without_the_library_the_line_names_the_extra(
    make_store: MakeStore, hub: Hub, monkeypatch: pytest.MonkeyPatch, tensors: dict[str, torch.Tensor]
) -> None:
    monkeypatch.setattr("modelstore.volume.content.find_spec", lambda name: None)
    with pytest.raises(NotFound, match=r"runpod-modelstore\[compress\]"):
        make_store(compress="always").ensure("org/name")
    assert not hub.served.bytes["model-00001-of-00002.safetensors"]


def test_an_older_version_refuses_the_manifest_in_one_line(
    make_store: MakeStore, tensors: dict[str, torch.Tensor]
) -> None:
    snapshot = make_store(compress="always").ensure("org/name")
    assert json.loads((snapshot.path / "manifest.json").read_bytes())["format_version"] == 2
    assert snapshot.path.name.endswith(".float16.compressed")  # and does not take the folder for a variant
