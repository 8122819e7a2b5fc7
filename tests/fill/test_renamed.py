"""A repo that is asked for under an old name, or in other capitals, is the snapshot of the id that the Hub gives."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import snapshot_download

from modelstore.errors import CodeRefused, IntegrityError
from modelstore.load.model import load_model
from modelstore.store import ModelStore
from tests.conftest import Cli, MakeStore
from tests.support.checkpoints import write_repo
from tests.support.hub import Hub

OLD = "org/old-name"
NAMES = [OLD, "org/Name", "org/NAME"]


@pytest.fixture(autouse=True)
def renamed(hub: Hub) -> None:
    write_repo(hub.folder / "org" / "name")
    hub.renamed[OLD] = "org/name"


@pytest.mark.parametrize("revision", ["main", "a commit"])
def test_all_names_of_a_repo_are_one_snapshot(
    hub: Hub, store: ModelStore, caplog: pytest.LogCaptureFixture, revision: str
) -> None:
    commit = hub.commit(hub.folder / "org" / "name")
    suffix = f"@{commit}" if revision != "main" else ""
    snapshot = store.ensure(f"org/name{suffix}")
    hub.served.reset()
    for name in NAMES:
        assert store.ensure(f"{name}{suffix}").key == snapshot.key
        assert f"{name} is called org/name on the Hub" in caplog.text
    assert hub.served.total_bytes == 0
    assert [path.name for path in store.layout.models.iterdir()] == ["org--name"]
    hub.stop()
    assert all(store.ensure(f"{name}{suffix}").key == snapshot.key for name in NAMES)
    assert caplog.text.count("is called") == len(NAMES), "it is said once, when the Hub is asked"


def test_a_name_that_was_asked_for_first_leads_to_the_id(hub: Hub, store: ModelStore, cli: Cli) -> None:
    assert "is called org/name on the Hub" in cli("seed", OLD).stderr
    (listed,) = cli.json("ls")
    assert listed["repo_id"] == "org/name"
    assert cli("path", OLD).stdout == cli("path", "org/name").stdout
    assert cli.json("show", OLD)["repo_id"] == "org/name"
    assert cli.json("seed", "org/name")["status"] == "present"
    cli("rm", OLD, "--yes")
    assert store.lookup("org/name") is None


def test_an_hf_cache_under_an_old_name_is_the_same_snapshot(hub: Hub, store: ModelStore) -> None:
    cache = store.settings.root.parent / "huggingface-cache" / "hub"
    snapshot_download("org/name", cache_dir=cache, endpoint=hub.url)
    (cache / "models--org--name").rename(cache / "models--org--old-name")
    hub.served.reset()
    snapshot = store.ensure(OLD)
    assert (snapshot.repo_id, snapshot.manifest.source.kind) == ("org/name", "hf-cache")
    assert hub.served.total_bytes == 0
    assert store.ensure("org/name").key == snapshot.key


def test_a_new_commit_is_served_under_every_name(hub: Hub, store: ModelStore) -> None:
    first = store.ensure(OLD)
    write_repo(hub.folder / "org" / "name", extra={"merges.txt": b"a b\n"})
    second = store.ensure(OLD, refresh=True)
    assert second.commit != first.commit
    assert {store.ensure(name).commit for name in ("org/name", OLD)} == {second.commit}


def test_a_name_that_another_repo_takes_over_is_that_repos(hub: Hub, store: ModelStore) -> None:
    store.ensure(OLD)
    write_repo(hub.folder / "org" / "old-name", extra={"merges.txt": b"a b\n"})
    assert store.ensure(OLD).repo_id == "org/name", "the fleet keeps its commit until the next seed"
    assert store.ensure(OLD, refresh=True).repo_id == OLD
    assert store.ensure(OLD).repo_id == OLD


def test_a_record_that_names_no_repo_is_passed_over(hub: Hub, store: ModelStore) -> None:
    store.ensure(OLD)
    path = store.layout.ref(OLD, "main")
    for forged in ("../../etc", "a", 7, None, "local/x\n"):
        path.write_text(json.dumps({"revision": "main", "commit": "a" * 40, "repo_id": forged}))
        with pytest.raises(IntegrityError, match="is damaged"):
            store.lookup(OLD)


def test_code_of_a_commit_that_is_pinned_under_an_old_name_may_run(hub: Hub, make_store: MakeStore) -> None:
    folder = write_repo(
        hub.folder / "org" / "name",
        config={"model_type": "own", "auto_map": {"AutoModel": "m.Own"}},
        extra={"m.py": b"import os\n"},
    )
    pinned = f"{OLD}@{hub.commit(folder)}"
    with pytest.raises(CodeRefused):
        make_store().ensure(pinned)
    snapshot = make_store(trust_remote_code=True).ensure(pinned)
    assert snapshot.manifest.remote_code
    with pytest.raises(CodeRefused):
        load_model(snapshot, "cpu")
