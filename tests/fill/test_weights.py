"""Weights are stored while they arrive: what a conversion reads is verified last, and only then counts."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from modelstore import load_tensors
from modelstore.errors import NoSpace, WeightOverflow
from modelstore.fill.stored_file import StoredFile
from modelstore.timeline import Timeline
from modelstore.volume.verify import verify_snapshot
from tests.conftest import MakeStore
from tests.support.checkpoints import published, write_repo
from tests.support.hub import Hub

SHAPE = (512, 512)
WEIGHTS = "model.safetensors"
FORMS = {"converted": (np.float32, "never"), "compressed": (np.float16, "always"), "both": (np.float32, "always")}
WRONG = ("no safetensors", "a weight too large", "other weights", "other names")


def wrong_file(right: Path, folder: Path, kind: str) -> Path:
    """A file of the same size with other bytes."""
    folder.mkdir()
    path = folder / right.name
    tensors = load_file(right)
    match kind:
        case "no safetensors":
            path.write_bytes(bytes(right.stat().st_size))
            return path
        case "a weight too large":
            tensors["layers.0.weight"][0, 0] = np.finfo(tensors["layers.0.weight"].dtype).max
        case "other weights":
            tensors["layers.0.weight"][0, 0] += 1
        case "other names":
            tensors = {f"other{name[5:]}": tensor for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    assert path.stat().st_size == right.stat().st_size
    assert path.read_bytes() != right.read_bytes()
    return path


def sources(dtype: type, layers: int = 6) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {f"layers.{number}.weight": generator.standard_normal(SHAPE).astype(dtype) for number in range(layers)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", WRONG)
def test_of_wrong_bytes_nothing_counts_not_even_an_error(
    hub: Hub, make_store: MakeStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str, kind: str
) -> None:
    dtype, compress = FORMS[form]
    tensors = sources(dtype)
    repo = write_repo(hub.folder / "org" / "name", tensors)
    hub.faults.wrong_first[WEIGHTS] = wrong_file(repo / WEIGHTS, tmp_path / "wrong", kind)
    with caplog.at_level(logging.WARNING):
        snapshot = make_store(compress=compress).ensure("org/name")
    assert "fetching it once more" in caplog.text
    assert "overflow" not in caplog.text
    assert verify_snapshot(snapshot).ok
    loaded = load_tensors(snapshot)
    assert loaded.keys() == tensors.keys()
    assert all(np.array_equal(loaded[name].numpy(), tensors[name].astype(np.float16)) for name in tensors)


def test_an_error_of_right_bytes_counts(hub: Hub, make_store: MakeStore) -> None:
    tensors = sources(np.float32)
    tensors["layers.5.weight"][-1, -1] = 1e6
    write_repo(hub.folder / "org" / "name", tensors)
    store = make_store()
    with pytest.raises(WeightOverflow, match=r"layers\.5\.weight"):
        store.ensure("org/name")
    assert published(store) == []


@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_stored_while_its_own_bytes_arrive(hub: Hub, make_store: MakeStore, form: str) -> None:
    dtype, compress = FORMS[form]
    write_repo(hub.folder / "org" / "name", sources(dtype))
    hub.faults.bytes_per_s = 4e6
    timeline = Timeline()
    make_store(compress=compress).ensure("org/name", timeline=timeline)
    spans = {span.name: span for span in timeline.spans}
    download, convert = spans["download"], spans["convert"]
    assert convert.start < (download.start + download.end) / 2
    assert convert.end < download.end + 0.1


@pytest.mark.parametrize("shards", [1, 3])
def test_a_conversion_that_fails_stops_the_download(
    hub: Hub, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    repo = write_repo(hub.folder / "org" / "name", sources(np.float32, layers=30), shards=shards)

    def full(_file: StoredFile, _data: object) -> None:
        raise NoSpace("the volume is full", free_bytes=0)

    monkeypatch.setattr(StoredFile, "write", full)
    hub.faults.bytes_per_s = 8e6  # so that connections hold few bytes that were sent ahead
    with pytest.raises(NoSpace, match="the volume is full"):
        make_store().ensure("org/name")
    assert hub.served.total_bytes < sum(path.stat().st_size for path in repo.glob("*.safetensors")) / 2
