"""Adapters on the volume: stored as they come, compared, and only for the model that they were made for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelstore.adapters import Adapter, find_or_make
from modelstore.errors import InvalidSetting, ModelStoreError, NotServable
from modelstore.reference import parse_reference
from modelstore.settings import Settings
from modelstore.store import ModelStore
from modelstore.timeline import Timeline
from modelstore.volume import pins
from modelstore.volume.evict import evict
from modelstore.volume.layout import SnapshotKey
from tests.support.adapters import change_config, write_adapter
from tests.support.hub import Hub
from tests.support.models import write_model

BASE = SnapshotKey("org/name", "a" * 40, "float16")


@pytest.fixture
def adapter(hub: Hub) -> Path:
    """An adapter on the hub, org/style."""
    write_model(hub.folder / "org" / "name", seed=1)
    write_adapter(hub.folder / "org" / "style", hub.folder / "org" / "name", seed=2)
    return hub.folder / "org" / "style"


def obtained(store: ModelStore, reference: str = "org/style", base: SnapshotKey = BASE) -> Adapter:
    settings = replace(store.settings, adapters={"style": parse_reference(reference)})
    return find_or_make(settings, "style", base, Timeline())


def test_it_is_stored_as_it_came_and_in_use(adapter: Path, store: ModelStore, hub: Hub) -> None:
    taken = obtained(store)
    assert taken.snapshot.key.dtype == "keep"
    assert taken.rank == 4
    name = "adapter_model.safetensors"
    assert (taken.snapshot.path / name).read_bytes() == (adapter / name).read_bytes()
    assert pins.users(store.layout, taken.snapshot.key, pins.volume_time(store.layout))
    hub.served.reset()
    assert obtained(store).snapshot.key == taken.snapshot.key
    assert hub.served.requests == []


def test_an_alias_leads_to_it(adapter: Path, store: ModelStore) -> None:
    snapshot = store.set_alias("style", "org/style", dtype="keep")
    assert obtained(store, "@style").snapshot.key == snapshot.key


def test_it_is_opened_as_plain_files(adapter: Path, store: ModelStore) -> None:
    compressing = ModelStore(store.settings.root, settings=replace(store.settings, compress="always"))
    assert not obtained(compressing).snapshot.key.compressed
    evict(store.layout, obtained(store).snapshot.key, force=True)
    assert compressing.ensure("org/style", dtype="keep").key.compressed
    assert (obtained(store).snapshot.path / "adapter_model.safetensors").is_file()


def test_damage_is_mended(adapter: Path, store: ModelStore) -> None:
    path = obtained(store).snapshot.path / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    taken = obtained(store)
    name = "adapter_model.safetensors"
    assert (taken.snapshot.path / name).read_bytes() == (adapter / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "base", "problem"),
    [
        ({"base_model_name_or_path": "org/other"}, "org/name", "is an adapter of org/other, and the model is org/name"),
        ({"base_model_name_or_path": "ORG/Name"}, "org/name", ""),
        ({"base_model_name_or_path": "org/name"}, "local/name", ""),
        ({"base_model_name_or_path": "org/name"}, "local/other", "is an adapter of org/name"),
        ({"base_model_name_or_path": "/training/checkpoint-100"}, "org/name", ""),
        ({"base_model_name_or_path": None}, "org/name", ""),
        ({"peft_type": "IA3"}, "org/name", "of type 'IA3': only LoRA adapters are served"),
        ({"peft_type": None}, "org/name", "only LoRA adapters"),
        ({"r": 0}, "org/name", "only LoRA adapters"),
        ({"r": 513}, "org/name", "has rank 513"),
        ({"r": "many"}, "org/name", "only LoRA adapters"),
    ],
    ids=str,
)
def test_it_has_to_be_one_for_the_model(
    adapter: Path, store: ModelStore, changes: dict[str, Any], base: str, problem: str
) -> None:
    change_config(adapter, **changes)
    key = replace(BASE, repo_id=base)
    if problem:
        with pytest.raises(NotServable, match=problem):
            obtained(store, base=key)
    else:
        assert obtained(store, base=key).rank == 4


def test_the_rank_is_the_largest(adapter: Path, store: ModelStore) -> None:
    change_config(adapter, rank_pattern={"q_proj": 32, "v_proj": 8})
    assert obtained(store).rank == 32


def test_a_model_is_no_adapter(adapter: Path, store: ModelStore) -> None:
    with pytest.raises(NotServable, match=r"MODEL_ADAPTERS names repos with adapter_config\.json"):
        obtained(store, "org/name")


def test_an_adapter_is_no_model(adapter: Path, store: ModelStore) -> None:
    with pytest.raises(ModelStoreError, match="with this in MODEL_ADAPTERS"):
        store.ensure("org/style")
    assert store.ensure("org/style", dtype="keep").manifest.stored_unchanged


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("org/style", "is not NAME=org/adapter"),
        ("style=", "write org/name"),
        ("a style=org/style", "is not NAME=org/adapter"),
        ("=org/style", "is not NAME=org/adapter"),
        ("style=org/style,style=org/other", "two adapters the name style"),
        ("style=not a reference", "MODEL_ADAPTERS"),
    ],
)
def test_a_setting_that_names_none_says_so(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(InvalidSetting, match=problem):
        Settings.from_env({"MODEL_ADAPTERS": text}, root=tmp_path)


@pytest.mark.parametrize("name", ["org/name", "chat", "org/other"])
def test_a_name_that_a_model_has_is_refused(tmp_path: Path, name: str) -> None:
    env = {
        "MODEL_ID": "org/name@v1",
        "SERVED_MODEL_NAME": "chat",
        "MODELSTORE_ALLOWED_MODELS": "org/name,org/other",
        "MODEL_ADAPTERS": f"{name}=org/style",
    }
    with pytest.raises(InvalidSetting, match="which a model has"):
        Settings.from_env(env, root=tmp_path)


def test_the_setting_names_them(tmp_path: Path) -> None:
    settings = Settings.from_env({"MODEL_ADAPTERS": " style=org/style@v1, b/c.d=@other ,x=file:///a=b "}, root=tmp_path)
    assert {name: str(each) for name, each in settings.adapters.items()} == {
        "style": "org/style@v1",
        "b/c.d": "@other",
        "x": "file:///a=b",
    }
