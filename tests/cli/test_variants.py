"""Which variant of a model answers if nobody asks for one: the seeded one, or the only one on the volume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from modelstore.settings import Settings
from modelstore.store import ModelStore
from modelstore.warmstart import begin
from tests.conftest import Cli, MakeStore
from tests.support.checkpoints import write_repo
from tests.support.hub import Hub
from tests.support.models import write_model

pytestmark = pytest.mark.slow


@pytest.fixture
def overflowing(hub: Hub) -> Path:
    """A model with a weight that float16 cannot hold."""
    folder = hub.folder / "org" / "overflowing"
    write_model(folder, seed=0)
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    weights[name][0, 0] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_start_takes_the_variant_that_an_overflow_left(hub: Hub, cli: Cli, overflowing: Path, tmp_path: Path) -> None:
    listed = tmp_path / "models.toml"
    listed.write_text('[[model]]\nreference = "org/overflowing"\noverflow = "bfloat16"\n')
    seeded = cli("seed", "--from", str(listed)).stderr
    assert "as allowed" in seeded
    assert "nothing was published" not in seeded
    hub.stop()
    record = cli.json("warm", "org/overflowing", "--device", "cpu")
    assert (record["outcome"], record["dtype"]) == ("hit", "bfloat16")
    for command in ("show", "path", "verify", "pin", "unpin"):
        cli(command, "org/overflowing")
    assert "is published" in cli("doctor", "org/overflowing").stdout
    assert cli.json("alias", "set", "chat", "org/overflowing")["dtype"] == "bfloat16"
    pinned = json.loads(cli("path", "org/overflowing", "--json").stdout)["path"].rpartition("/")[2].partition(".")[0]
    assert cli("path", f"org/overflowing@{pinned}").stdout.endswith(".bfloat16\n")
    assert cli("path", f"org/overflowing@{pinned[:10]}").stdout.endswith(".bfloat16\n")


@pytest.mark.parametrize(
    ("seeds", "answer"),
    [
        (("float16", "bfloat16"), "bfloat16"),
        (("bfloat16", "float16"), "float16"),
        (("float16", "keep"), "float16"),  # made for an export
        (("keep",), "keep"),
        (("keep", "float16"), "float16"),
        (("float32",), "float32"),
    ],
)
def test_the_last_seed_decides(hub: Hub, cli: Cli, seeds: tuple[str, ...], answer: str) -> None:
    write_repo(hub.folder / "org" / "name")
    for dtype in seeds:
        told = cli("seed", "org/name", "--dtype", dtype).stderr
    changes = len(seeds) > 1 and answer == seeds[-1]
    assert ("MODEL_DTYPE asks for another variant" in told) == changes
    assert cli("path", "org/name").stdout.endswith(f".{answer}\n")
    cli.env = cli.env | {"MODEL_DTYPE": seeds[0]}
    assert cli("path", "org/name").stdout.endswith(f".{seeds[0]}\n")


def test_the_only_variant_answers_and_two_are_named(hub: Hub, cli: Cli, make_store: MakeStore) -> None:
    write_repo(hub.folder / "org" / "name")
    store = make_store()
    only = store.ensure("org/name", dtype="bfloat16")
    assert key_of(store) == only.key
    assert begin_key(store) == only.key
    store.ensure("org/name", dtype="float32")
    assert store.lookup("org/name") is None
    told = cli("path", "org/name", code=3).stderr
    assert "--dtype bfloat16" in told
    assert "--dtype float32" in told
    assert store.ensure("org/name").dtype == "float16"


def test_a_damaged_variant_is_not_passed_over_for_another(hub: Hub, make_store: MakeStore) -> None:
    write_repo(hub.folder / "org" / "name")
    store = make_store()
    store.ensure("org/name", dtype="bfloat16")
    damaged = store.ensure("org/name", dtype="float16")
    (damaged.path / "model.safetensors").unlink()
    assert store.lookup("org/name") is None
    assert store.ensure("org/name").dtype == "float16"


def test_a_record_of_another_version_is_understood(hub: Hub, make_store: MakeStore) -> None:
    write_repo(hub.folder / "org" / "name")
    store = make_store()
    snapshot = store.ensure("org/name", dtype="bfloat16", refresh=True)
    path = store.layout.ref("org/name", snapshot.commit)
    record: Mapping[str, object] = json.loads(path.read_text())
    assert record["dtype"] == "bfloat16"
    path.write_text(json.dumps({name: value for name, value in record.items() if name != "dtype"}))
    assert key_of(store) == snapshot.key
    path.write_text(json.dumps({**record, "dtype": "../float16"}))
    assert key_of(store) == snapshot.key, "a damaged record decides nothing, and the only variant answers"


@pytest.mark.parametrize("order", [("float16", "bfloat16"), ("bfloat16", "float16")])
def test_every_name_of_a_commit_means_the_variant_of_its_last_seed(hub: Hub, cli: Cli, order: tuple[str, str]) -> None:
    write_repo(hub.folder / "org" / "name")
    commit = cli.json("seed", "org/name", "--dtype", order[0])["commit"]
    cli("seed", f"org/name@{commit}", "--dtype", order[1])
    names = ("org/name", f"org/name@{commit}", f"org/name@{commit[:12]}")
    assert {cli("path", name).stdout.rpartition(".")[2].strip() for name in names} == {order[1]}
    cli("rm", f"org/name@{commit[:12]}", "--yes")
    cli("rm", f"org/name@{commit[:12]}", "--yes", code=3)
    assert cli("path", "org/name").stdout.endswith(f".{order[0]}\n"), "the only one that is left"
    assert cli.json("alias", "set", "chat", "org/name", "--dry-run")["dtype"] == order[0]
    assert cli.json("alias", "set", "chat", f"org/name@{commit}")["dtype"] == order[0]
    cli("pin", f"org/name@{commit}")


def test_a_pinned_commit_that_overflows_is_found_by_an_alias(hub: Hub, cli: Cli, overflowing: Path) -> None:
    commit = hub.commit(overflowing)
    cli("seed", f"org/overflowing@{commit}", "--overflow", "bfloat16")
    hub.stop()
    assert cli.json("alias", "set", "chat", f"org/overflowing@{commit}")["dtype"] == "bfloat16"
    assert cli.json("warm", f"org/overflowing@{commit}", "--device", "cpu")["outcome"] == "hit"


def test_the_order_of_a_list_decides_and_no_race(hub: Hub, cli: Cli, tmp_path: Path) -> None:
    write_repo(hub.folder / "org" / "name")
    dtypes = ("bfloat16", "float32", "float16", "keep")
    listed = tmp_path / "models.toml"
    listed.write_text("".join(f'[[model]]\nreference = "org/name"\ndtype = "{dtype}"\n' for dtype in dtypes))
    cli("seed", "--from", str(listed), "--parallel", "4")
    assert cli("path", "org/name").stdout.endswith(".float16\n")


def test_no_change_is_told_if_nothing_changes(hub: Hub, cli: Cli, make_store: MakeStore) -> None:
    write_repo(hub.folder / "org" / "name")
    make_store().ensure("org/name", dtype="bfloat16")  # as a worker makes it
    assert "from now on" not in cli("seed", "org/name", "--dtype", "bfloat16").stderr
    cli("seed", "org/name", "--dtype", "keep")
    assert cli("path", "org/name").stdout.endswith(".bfloat16\n")


def begin_key(store: ModelStore) -> object:
    settings = Settings.from_env(
        {"MODEL_ID": "org/name", "HF_ENDPOINT": store.settings.hf_endpoint}, root=store.settings.root
    )
    pending = begin(settings)
    pending.reading.close()
    pending.in_use.end()
    return pending.snapshot.key


def key_of(store: ModelStore) -> object:
    snapshot = store.lookup("org/name")
    return snapshot.key if snapshot is not None else None
