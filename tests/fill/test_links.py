"""Links in a folder: followed inside an HF cache, named elsewhere, never passed over in silence."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from modelstore.errors import UnsafeName
from modelstore.store import ModelStore
from modelstore.volume.verify import verify_snapshot
from tests.conftest import Cli
from tests.support.checkpoints import write_repo

COMMIT = "a" * 40


def cached(folder: Path, *, absolute: bool = False) -> Path:
    """The folder of a snapshot in an HF cache, as `snapshot_download` returns it."""
    plain = write_repo(folder / "plain", shards=2)
    repo = folder / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / COMMIT
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for path in plain.iterdir():
        blob = repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(blob if absolute else Path("../../blobs") / blob.name)
    return snapshot


@pytest.mark.parametrize("absolute", [False, True])
def test_links_inside_an_hf_cache_are_followed(store: ModelStore, cli: Cli, tmp_path: Path, absolute: bool) -> None:
    folder = cached(tmp_path, absolute=absolute)
    snapshot = store.ensure(f"file://{folder}")
    assert len(snapshot.weights) == 2
    assert verify_snapshot(snapshot).ok
    (adopted,) = cli.json("adopt", str(folder))
    assert (adopted["repo_id"], adopted["commit"]) == ("org/name", COMMIT)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "LICENSE"])
def test_a_link_that_leaves_is_named_with_what_to_give_instead(store: ModelStore, tmp_path: Path, name: str) -> None:
    folder = write_repo(tmp_path / "model", extra={"LICENSE": b"free"})
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeName, match=rf"{folder}/{name} is a link, and links are not followed: give .*cp -rL"):
        store.ensure(f"file://{folder}")


def test_a_link_out_of_an_hf_cache_is_named(store: ModelStore, tmp_path: Path) -> None:
    folder = cached(tmp_path)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(UnsafeName, match="is a link"):
        store.ensure(f"file://{folder}")


def test_a_part_of_a_pipeline_that_is_a_link_is_named(store: ModelStore, tmp_path: Path) -> None:
    folder = write_repo(tmp_path / "model" / "unet").parent
    (folder / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    (folder / "unet").rename(tmp_path / "unet")
    (folder / "unet").symlink_to(tmp_path / "unet")
    with pytest.raises(UnsafeName, match="unet is a link"):
        store.ensure(f"file://{folder}")


def test_other_links_are_left_out(store: ModelStore, tmp_path: Path) -> None:
    folder = write_repo(tmp_path / "model")
    (folder / "latest").symlink_to(tmp_path)
    (folder / "notes.md").symlink_to(tmp_path / "gone")
    assert store.ensure(f"file://{folder}").manifest.paths == {"config.json", "model.safetensors", "tokenizer.json"}
