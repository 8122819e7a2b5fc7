"""The form in which new weights are stored, and which is read if both are there: MODELSTORE_COMPRESS."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from modelstore.errors import ModelStoreError
from modelstore.fill.observer import SILENT
from modelstore.fill.recode import Recoding
from modelstore.reference import parse_reference
from modelstore.store import ModelStore
from modelstore.volume import preferred_form
from modelstore.volume.layout import Layout
from modelstore.volume.preferred_form import prefers_compressed, record_rate, recorded_rate
from modelstore.volume.snapshots import Catalog
from tests.support.checkpoints import write_repo
from tests.support.hub import Hub

MIB_PER_S = 1 << 20


@pytest.fixture
def auto(store: ModelStore) -> ModelStore:
    return ModelStore(store.settings.root, settings=replace(store.settings, compress="auto"))


@pytest.mark.parametrize(
    ("rate", "count", "compressed"),
    [
        (300 * MIB_PER_S, 2, True),
        (1000 * MIB_PER_S, 2, False),  # measured: a start takes longer, for two processors also import
        (1000 * MIB_PER_S, 16, True),
        (300 * MIB_PER_S, 1, True),
        (10_000 * MIB_PER_S, 4, False),
    ],
)
def test_auto_weighs_bytes_against_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: float, count: int, compressed: bool
) -> None:
    monkeypatch.setattr(preferred_form, "processors", lambda: count)
    layout = Layout(tmp_path)
    record_rate(layout, rate)
    assert prefers_compressed(layout, "auto") is compressed
    assert prefers_compressed(layout, "always")
    assert not prefers_compressed(layout, "never")


def test_auto_is_plain_without_a_measured_rate_or_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(tmp_path)
    assert not prefers_compressed(layout, "auto")
    record_rate(layout, 1e6)
    assert prefers_compressed(layout, "auto")
    monkeypatch.setattr(preferred_form, "has_decoder", lambda: False)
    assert not prefers_compressed(layout, "auto")


@pytest.mark.parametrize(
    "record",
    [
        b"", b"[]", b"{}", b'{"bytes_per_s": "fast"}', b'{"bytes_per_s": null}', b'{"bytes_per_s": NaN}',
        b'{"bytes_per_s": 0}', b'{"bytes_per_s": -1e9}', b"\xff", b"[" * 100_000, b'{"bytes_per_s": 1' + b"0" * 4000,
        b'{"bytes_per_s": 1' + b"0" * 400 + b"}",
    ],
)  # fmt: skip
def test_a_record_that_is_none_counts_as_no_measurement(tmp_path: Path, record: bytes) -> None:
    layout = Layout(tmp_path)
    layout.read_rate.write_bytes(record)
    assert recorded_rate(layout) is None
    assert not prefers_compressed(layout, "auto")
    record_rate(layout, 2.5e8)
    assert recorded_rate(layout) == 2.5e8


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    layout, elsewhere = Layout(tmp_path / "store"), tmp_path / "elsewhere"
    layout.root.mkdir()
    elsewhere.write_text('{"bytes_per_s": 1}')
    layout.read_rate.symlink_to(elsewhere)
    assert recorded_rate(layout) is None
    with pytest.raises(ModelStoreError, match="is a link"):
        record_rate(layout, 1e8)
    assert elsewhere.read_text() == '{"bytes_per_s": 1}'


def test_a_fill_stores_the_form_that_auto_chooses(hub: Hub, auto: ModelStore, caplog: pytest.LogCaptureFixture) -> None:
    write_repo(hub.folder / "org" / "first")
    write_repo(hub.folder / "org" / "second")
    caplog.set_level(logging.INFO)
    assert not auto.ensure("org/first").key.compressed
    assert "stored plain, until `modelstore doctor` has measured the read rate" in caplog.text
    record_rate(auto.layout, 50e6)
    later = ModelStore(auto.settings.root, settings=auto.settings)
    assert later.ensure("org/second").key.compressed
    assert later.preview("org/second")["status"] == "present"
    assert not later.ensure("org/first").key.compressed, "what is there is taken"


def test_a_lookup_finds_the_form_that_auto_chooses_of_two(hub: Hub, auto: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name")
    plain = auto.ensure("org/name")
    Recoding(auto.layout, auto.settings, plain, observer=SILENT).run()
    for rate, compressed in ((50e6, True), (50e9, False)):
        record_rate(auto.layout, rate)
        found = Catalog.of(auto.settings).find(parse_reference("org/name"), None)
        assert found is not None
        assert found.key.compressed is compressed
