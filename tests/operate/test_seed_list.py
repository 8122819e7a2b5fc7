"""Lists of models, and seeding from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelstore.errors import UsageError
from modelstore.operate.seed_list import read_list
from modelstore.store import ModelStore
from modelstore.volume import aliases, pins
from tests.conftest import Cli
from tests.support.checkpoints import random_tensors, write_repo
from tests.support.hub import Hub

LIST = """
[[model]]
reference = "org/one@main"
aliases = ["chat", "@small"]
pin = true

[[model]]
reference = "org/two"
dtype = "bf16"
overflow = "bfloat16"
"""


def test_a_list_gives_each_model_its_names(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(LIST)
    one, two = read_list(tmp_path / "models.toml")
    assert (str(one.reference), one.aliases, one.pin, one.dtype) == ("org/one", ("chat", "small"), True, None)
    assert (str(two.reference), two.dtype, two.overflow, two.pin) == ("org/two", "bfloat16", "bfloat16", False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must hold tables"),
        ("[model]\nreference = 'a/b'", "must hold tables"),
        ("models = 1\n[[model]]\nreference='a/b'", "not models"),
        ("[[model]]\ndtype = 'keep'", "model 1: it has no reference"),
        ("[[model]]\nreference = 'a/b'\n[[model]]\nreference = '../x'", "model 2: "),
        ("[[model]]\nreference = 'a/b'\ndtyp = 'keep'", "dtyp is not known: use reference, dtype"),
        ("[[model]]\nreference = 'a/b'\npin = 'yes'", "pin must be true or false, not 'yes'"),
        ("[[model]]\nreference = 'a/b'\ndtype = 'int3'", "dtype"),
        ("[[model]]\nreference = 'a/b'\noverflow = 'x'", "overflow must be stop or bfloat16"),
        ("[[model]]\nreference = 'a/b'\naliases = ['Ä']", "is not an alias"),
        ("[[model]]\nreference = '@chat'", "is an alias: name the model itself"),
        ("[[model]]\nreference='a/b'\naliases=['x']\n[[model]]\nreference='a/c'\naliases=['x']", "given to two"),
        ("[[model]", "is no TOML file"),
    ],
)
def test_a_wrong_list_names_the_entry(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "models.toml").write_text(text)
    with pytest.raises(UsageError, match=words):
        read_list(tmp_path / "models.toml")


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_list(tmp_path / "models.toml")


@pytest.fixture
def two_models(hub: Hub, tmp_path: Path) -> Path:
    write_repo(hub.folder / "org" / "one")
    write_repo(hub.folder / "org" / "two", random_tensors(2, seed=1))
    write_repo(hub.folder / "org" / "old", random_tensors(3, seed=2))
    path = tmp_path / "models.toml"
    path.write_text(LIST)
    return path


def test_a_dry_run_tells_sizes_and_states_and_leaves_the_volume_alone(
    cli: Cli, two_models: Path, store: ModelStore
) -> None:
    store.ensure("org/one")
    before = {path: path.stat().st_mtime_ns for path in store.layout.models.rglob("*")}
    plan = cli.json("seed", "--from", str(two_models), "--dry-run")
    assert [model["status"] for model in plan["models"]] == ["present", "missing"]
    assert {path: path.stat().st_mtime_ns for path in store.layout.models.rglob("*")} == before
    seeded: list[dict[str, Any]] = cli.json("seed", "--from", str(two_models))
    told = plan["models"][1]
    assert abs(seeded[1]["bytes"] - told["bytes"]) < 4096 < told["bytes"]
    assert abs(seeded[1]["downloaded_bytes"] - told["downloaded_bytes"]) < 4096
    assert abs(cli.json("du")["taken"] - plan["taken_after"]) < 16384


def test_a_list_is_made_true_and_pruned(cli: Cli, two_models: Path, store: ModelStore) -> None:
    old = store.ensure("org/old")
    assert "needs --yes" in cli("seed", "--from", str(two_models), "--prune", code=8).stderr
    records = cli.json("seed", "--from", str(two_models), "--prune", "--yes")
    assert [record["status"] for record in records] == ["downloaded", "downloaded", "removed"]
    assert not old.path.exists()
    one = store.lookup("org/one")
    assert one is not None
    assert aliases.target(store.layout, "chat") == aliases.target(store.layout, "small") == one.key
    assert pins.is_pinned(store.layout, one.key)
    assert len(aliases.history(store.layout, "chat")) == 1
    again = cli.json("seed", "--from", str(two_models), "--prune", "--yes")
    assert [record["status"] for record in again] == ["present", "present"]
    assert len(aliases.history(store.layout, "chat")) == 1, "an alias that is right is left alone"


def test_a_dry_run_names_removals_once_the_aliases_are_moved(cli: Cli, two_models: Path, store: ModelStore) -> None:
    old = store.set_alias("chat", "org/old")
    two_models.write_text(f'{LIST}\n[[model]]\nreference = "org/one@main"\n')  # which is there already
    plan = cli.json("seed", "--from", str(two_models), "--prune", "--dry-run")
    assert [one["repo_id"] for one in plan["removed"]] == ["org/old"]
    alone = cli.json("seed", "org/one", "org/two", "--dry-run")
    assert plan["download_bytes"] == alone["download_bytes"]
    cli("seed", "--from", str(two_models), "--prune", "--yes")
    assert not old.path.exists()
    assert abs(cli.json("du")["taken"] - plan["taken_after"]) < 16384


def test_used_models_stay_and_a_failed_list_removes_nothing(cli: Cli, two_models: Path, store: ModelStore) -> None:
    old = store.ensure("org/old")
    use = pins.UsageMark(store.layout, old.key, "w1")
    records = cli.json("seed", "--from", str(two_models), "--prune", "--yes")
    assert records[-1]["status"] == "kept"
    use.end()
    two_models.write_text(LIST + '\n[[model]]\nreference = "org/nowhere"\n')
    records = cli.json("seed", "--from", str(two_models), "--prune", "--yes", code=3)
    assert old.path.exists()
    assert [record.get("status", "failed") for record in records] == ["present", "present", "failed"]


def test_prune_needs_a_list_and_seed_needs_a_model(cli: Cli) -> None:
    for arguments, words in ((["org/one", "--prune"], "name it with --from"), ([], "REF is missing: name a model")):
        assert words in cli("seed", *arguments, code=2).stderr


def test_the_whole_list_may_be_wanted_at_once(cli: Cli, hub: Hub) -> None:
    names = [f"org/m{number}" for number in range(5)]
    for number, name in enumerate(names):
        write_repo(hub.folder / name, random_tensors(2, seed=number))
    assert [record["repo_id"] for record in cli.json("seed", *names, "--parallel", "4")] == names


def test_an_alias_that_serves_something_else_is_moved_only_when_told(
    cli: Cli, two_models: Path, store: ModelStore
) -> None:
    store.set_alias("chat", "org/old")
    plan = cli.json("seed", "--from", str(two_models), "--dry-run")
    assert plan["aliases_moved"] == ["chat"]
    assert "point @chat" in cli("seed", "--from", str(two_models), code=8).stderr
    assert aliases.target(store.layout, "chat").repo_id == "org/old"
    cli("seed", "--from", str(two_models), "--yes")
    assert aliases.target(store.layout, "chat").repo_id == "org/one"
    cli("seed", "--from", str(two_models))


def test_options_for_single_models_do_not_silently_miss_a_list(cli: Cli, two_models: Path) -> None:
    assert "write them into the list" in cli("seed", "--from", str(two_models), "--dtype", "keep", code=2).stderr


def test_a_model_stored_as_bfloat16_is_not_fetched_again(hub: Hub, cli: Cli, tmp_path: Path) -> None:
    write_repo(hub.folder / "org" / "huge", {"layers.0.weight": np.full((512, 512), 1e30, np.float32)})
    path = tmp_path / "models.toml"
    path.write_text('[[model]]\nreference = "org/huge"\noverflow = "bfloat16"\n')
    assert cli.json("seed", "--from", str(path))[0]["dtype"] == "bfloat16"
    hub.served.bytes.clear()
    plan = cli.json("seed", "--from", str(path), "--prune", "--dry-run")
    assert [model["status"] for model in plan["models"]] == ["present"]
    assert plan["removed"] == []
    again = cli.json("seed", "--from", str(path))[0]
    assert (again["status"], again["downloaded_bytes"]) == ("present", 0)
    assert not [name for name in hub.served.bytes if name.endswith(".safetensors")]
