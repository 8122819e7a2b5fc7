"""The plan of a fill: a dry run tells the files that the fill then stores."""

from __future__ import annotations

import pytest

from modelstore.errors import ModelStoreError
from modelstore.fill.footprint import stored_ratio
from modelstore.fill.storage_policy import storage_policy
from modelstore.operate.seed_list import ListedModel
from modelstore.operate.seed_plan import SeedPlan
from modelstore.reference import parse_reference
from modelstore.store import ModelStore
from tests.conftest import MakeStore
from tests.support.checkpoints import random_tensors, write_repo
from tests.support.hub import Hub


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "keep"])
@pytest.mark.parametrize("original", ["float32", "float16"])
def test_a_dry_run_tells_the_files_and_bytes_that_are_stored(
    hub: Hub, store: ModelStore, dtype: str, original: str
) -> None:
    tensors = {name: tensor.astype(original) for name, tensor in random_tensors(4, seed=1).items()}
    write_repo(hub.folder / "org" / "name", tensors, config={"model_type": "llama", "torch_dtype": original})
    told = store.preview("org/name", dtype=dtype)
    assert told["status"] == "missing"
    snapshot = store.ensure("org/name", dtype=dtype)
    assert told["files"] == len(snapshot.manifest.files)
    assert abs(told["bytes"] - snapshot.size_bytes) < 4096, "but for headers and the rewritten config"
    assert store.preview("org/name", dtype=dtype)["status"] == "present"


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("pinned", [False, True])
def test_a_dry_run_counts_python_files_exactly_if_they_will_be_stored(
    hub: Hub, make_store: MakeStore, trusted: bool, pinned: bool
) -> None:
    write_repo(hub.folder / "org" / "name", random_tensors(4, seed=1))
    (hub.folder / "org" / "name" / "modeling_own.py").write_text("print('code')\n")
    store = make_store(trust_remote_code=trusted)
    commit = store.preview("org/name")["commit"]
    reference = f"org/name@{commit}" if pinned else "org/name"
    told = store.preview(reference)
    stored = {file.path for file in store.ensure(reference).manifest.files}
    assert ("modeling_own.py" in stored) == (trusted and pinned)
    assert told["files"] == len(stored)


def test_a_config_that_is_no_json_fails_the_dry_run_as_it_fails_the_fill(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name", random_tensors(4, seed=1))
    (hub.folder / "org" / "name" / "config.json").write_text("{")
    for call in (store.preview, store.ensure):
        with pytest.raises(ModelStoreError, match=r"config\.json is not JSON"):
            call("org/name")


def test_weights_of_an_unknown_width_are_counted_as_16_bits() -> None:
    policy = storage_policy("float32", {})
    assert stored_ratio({}, policy) == 2.0
    assert stored_ratio({"dtype": "float64"}, policy) == 2.0
    assert stored_ratio({"torch_dtype": "torch.float32"}, policy) == 0.0, "stored as they come"


def test_a_list_is_previewed_run_and_pruned_from_python(hub: Hub, store: ModelStore) -> None:
    for number, name in enumerate(("one", "two", "three")):
        write_repo(hub.folder / "org" / name, random_tensors(4, seed=number))
    store.ensure("org/three")
    models = [ListedModel(parse_reference(f"org/{name}"), aliases=(name,)) for name in ("one", "two")]
    plan = SeedPlan(store, models, prune=True)
    preview = plan.preview()
    assert [record["status"] for record in preview.models] == ["missing", "missing"]
    assert [candidate.key.repo_id for candidate in preview.removed] == ["org/three"]
    assert not list(store.catalog.keys("org/one")), "a preview changes nothing"
    result = plan.run()
    assert result.exit_code == 0
    assert {record["status"] for record in result.records} == {"downloaded", "removed"}
    assert {key.repo_id for key in list(store.catalog.keys())} == {"org/one", "org/two"}
    assert store.lookup("@one") is not None
    assert plan.preview().download_bytes == 0


def test_one_model_that_fails_leaves_the_others_and_prunes_nothing(hub: Hub, store: ModelStore) -> None:
    for number, name in enumerate(("one", "kept")):
        write_repo(hub.folder / "org" / name, random_tensors(4, seed=number))
    store.ensure("org/kept")
    models = [ListedModel(parse_reference(f"org/{name}")) for name in ("one", "missing")]
    errors: list[ModelStoreError] = []
    result = SeedPlan(store, models, prune=True).run(on_error=errors.append)
    assert result.exit_code == 3
    assert [error.exit_code for error in errors] == [3]
    assert {key.repo_id for key in list(store.catalog.keys())} == {"org/one", "org/kept"}
