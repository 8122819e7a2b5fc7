"""A snapshot on the volume that is made compressed, or plain again, without its source."""

from __future__ import annotations

import torch

from modelstore import ModelStore
from modelstore.fill.observer import Observer
from modelstore.fill.recode import Recoding
from modelstore.volume import aliases, pins
from modelstore.volume.evict import evict
from modelstore.volume.manifest import BLOCK_BYTES
from modelstore.volume.verify import verify_snapshot
from tests.conftest import Cli, MakeStore, leave_unfinished
from tests.support.checkpoints import random_tensors, write_repo
from tests.support.compressed import compressed_file, flip
from tests.support.hub import Hub


def test_compress_and_expand_carry_aliases_pins_and_answers_over(
    store: ModelStore, cli: Cli, tensors: dict[str, torch.Tensor]
) -> None:
    before = store.set_alias("chat", "org/name")
    plain_bytes = {path.name: path.read_bytes() for path in before.path.iterdir()}
    cli("pin", "org/name")
    (record,) = cli.json("compress", "@chat", "--yes")
    assert record["status"] == "converted"
    assert record["bytes"] < 0.69 * record["plain_bytes"]
    compressed = store.lookup("@chat")
    assert compressed is not None
    assert compressed.key.compressed
    assert not before.path.exists()
    assert pins.pinned(store.layout) == {before.key}, "a pin holds for both forms"
    (listed,) = cli.json("ls")
    assert listed["compressed"] is True
    assert listed["aliases"] == ["chat"]
    assert aliases.target(store.layout, "chat") == before.key, "a worker that follows the alias sees no other target"
    assert store.set_alias("chat", "org/name").key.compressed
    assert len(aliases.history(store.layout, "chat")) == 1
    assert listed["pinned"] is True
    assert "float16 compressed" in cli("ls").stdout
    assert cli.json("compress", "org/name", "--yes")[0]["status"] == "present"
    (record,) = cli.json("expand", "org/name", "--yes")
    assert record["status"] == "converted"
    after = store.lookup("@chat")
    assert after is not None
    assert after.key == before.key
    assert pins.pinned(store.layout) == {before.key}
    assert not compressed.path.exists()
    files = {path.name: path.read_bytes() for path in after.path.iterdir() if path.name != "manifest.json"}
    assert files == {name: data for name, data in plain_bytes.items() if name != "manifest.json"}
    assert after.manifest.files == before.manifest.files
    assert verify_snapshot(after).ok


def test_a_form_that_is_in_use_stays(store: ModelStore, cli: Cli, tensors: dict[str, torch.Tensor]) -> None:
    snapshot = store.ensure("org/name")
    mark = pins.UsageMark(store.layout, snapshot.key, "worker-1")
    assert "the plain form stays: it is in use" in cli("compress", "org/name", "--yes").stdout
    assert snapshot.path.exists()
    mark.end()
    cli("compress", "org/name", "--yes")
    assert not snapshot.path.exists()


def test_damage_is_found_before_a_conversion_publishes_it(
    store: ModelStore, cli: Cli, tensors: dict[str, torch.Tensor]
) -> None:
    snapshot = store.ensure("org/name")
    flip(snapshot.path / "model-00002-of-00002.safetensors", BLOCK_BYTES + 5, 1)
    assert "differs from the published bytes" in cli("compress", "org/name", "--yes", code=5).stderr
    assert list(store.catalog.keys()) == [snapshot.key]


def test_a_conversion_needs_room_for_what_it_makes_and_evicts_nothing(
    make_store: MakeStore, hub: Hub, cli: Cli, tensors: dict[str, torch.Tensor]
) -> None:
    write_repo(hub.folder / "org" / "other", random_tensors(1, (64, 64)))
    store = make_store()
    other, snapshot = store.ensure("org/other"), store.ensure("org/name")
    taken = other.size_bytes + snapshot.size_bytes
    cli.env |= {"MODELSTORE_EVICT": "1", "MODELSTORE_QUOTA": str(taken + snapshot.size_bytes // 2)}
    assert "MODELSTORE_QUOTA" in cli("compress", "org/name", "--yes", code=6).stderr
    assert len(list(store.catalog.keys())) == 2
    cli.env |= {"MODELSTORE_QUOTA": str(taken + int(0.8 * snapshot.size_bytes))}
    cli("compress", "org/name", "--yes")
    assert {model["repo_id"] for model in cli.json("ls")} == {"org/name", "org/other"}


def test_an_intact_form_is_not_removed_for_a_damaged_one(
    store: ModelStore, cli: Cli, tensors: dict[str, torch.Tensor]
) -> None:
    plain = store.ensure("org/name")
    cli("compress", "org/name", "--keep")
    compressed = store.catalog.published(plain.key.twin)
    assert compressed is not None
    flip(compressed_file(compressed), 5000, 1)
    told = cli("compress", "org/name", "--yes", code=5).stderr
    assert "is damaged, and its plain form stays" in told
    assert verify_snapshot(plain).ok
    for name, word in (("expand", "present"), ("compress", "converted")):  # as the line says
        assert f"modelstore {name} org/name@" in told
        assert cli.json(name, "org/name", "--yes")[0]["status"] == word
    mended = store.catalog.published(plain.key.twin)
    assert mended is not None
    assert verify_snapshot(mended).ok


def test_two_conversions_at_once_leave_one_form(store: ModelStore, cli: Cli, tensors: dict[str, torch.Tensor]) -> None:
    plain = store.ensure("org/name").key
    cli("compress", "org/name", "--keep")
    for key in (plain, plain.twin):
        with pins.evicting(store.layout, key.twin):
            assert not evict(store.layout, key, replaced_by_twin=True), "the other one goes"
    assert evict(store.layout, plain, replaced_by_twin=True)
    assert not evict(store.layout, plain.twin, replaced_by_twin=True), "it is the only one"


def test_an_eviction_takes_nothing_that_is_being_converted(
    make_store: MakeStore, tensors: dict[str, torch.Tensor]
) -> None:
    store = make_store()
    snapshot = store.ensure("org/name")
    evicted = []
    observer = Observer()
    observer.filling = lambda key, progress: evicted.append(evict(store.layout, snapshot.key))  # type: ignore[method-assign]
    assert Recoding(store.layout, store.settings, snapshot, observer=observer).run()
    assert evicted
    assert not any(evicted)


def test_a_conversion_takes_nothing_that_a_download_left(
    make_store: MakeStore, hub: Hub, cli: Cli, tensors: dict[str, torch.Tensor]
) -> None:
    """Its config still names the dtype of the source."""
    compressing, store = make_store(compress="always"), make_store()
    leave_unfinished(hub, compressing)
    (left,) = compressing.layout.root.glob("staging/*/*.compressed")
    aside = left.rename(left.with_name("aside"))
    config = store.ensure("org/name").config()
    aside.rename(left)
    cli("compress", "org/name", "--yes")
    compressed = store.lookup("org/name")
    assert compressed is not None
    assert compressed.key.compressed
    assert compressed.config() == config


def test_small_files_are_compared_before_they_are_published_again(
    store: ModelStore, cli: Cli, tensors: dict[str, torch.Tensor]
) -> None:
    snapshot = store.ensure("org/name")
    flip(snapshot.path / "tokenizer.json", 3, 1)
    assert "differs from the published bytes" in cli("compress", "org/name", "--yes", code=5).stderr
    assert list(store.catalog.keys()) == [snapshot.key]


def test_it_asks_before_it_removes_a_form_and_a_dry_run_says_so(
    store: ModelStore, cli: Cli, tensors: dict[str, torch.Tensor]
) -> None:
    snapshot = store.ensure("org/name")
    assert "--yes" in cli("compress", "org/name", code=8).stderr
    assert "would remove the plain form" in cli("compress", "org/name", "--dry-run").stdout
    assert list(store.catalog.keys()) == [snapshot.key]
