"""An operator with ten models: what commands print, and what they ask before they change something."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelstore.store import ModelStore
from modelstore.timeline import Timeline
from modelstore.volume import history
from modelstore.volume.claim import Claim, Contender
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.unfinished import unfinished
from tests.conftest import Cli, MakeStore, leave_unfinished
from tests.support.checkpoints import random_tensors, write_repo
from tests.support.hub import Hub
from tests.support.models import write_model
from tests.support.screens import on_terminal

pytestmark = pytest.mark.slow
LONG = "a-long-name-for-a-model-7B-It"
NAMES = ("chat-small", "chat-next", "embedding")


@pytest.fixture
def volume(hub: Hub, make_store: MakeStore) -> ModelStore:
    """A store with three models, and an alias for the first."""
    store = make_store()
    for seed, name in enumerate(NAMES):
        write_repo(hub.folder / "org" / name, random_tensors(2, seed=seed))
        store.ensure(f"org/{name}", refresh=True)
    store.set_alias("chat", "org/chat-small")
    return store


# Questions: what goes, or what changes, is shown before it is asked for.


def test_gc_shows_the_plan_before_it_asks(volume: ModelStore, cli: Cli, store_env: dict[str, str]) -> None:
    shown = on_terminal(["gc", "--to", "0B"], store_env, answer="n")
    assert "would remove org/chat-next" in shown
    assert "would remove org/embedding" in shown
    assert re.search(r"Remove these 2 models \([0-9.]+ kB\)\? \[y/N\]", shown)
    assert "nothing was changed" in shown
    told = cli("gc", "--to", "0B", code=8).stderr
    assert "would remove org/embedding" in told
    assert re.search(r"the store takes [0-9.]+ kB then, more than 0B", told)
    assert re.search(r"error: not done: remove these 2 models \(.+\) needs --yes", told)
    assert len(list(volume.catalog.keys())) == 3


def test_a_pruning_seed_names_the_models_before_it_asks(
    volume: ModelStore, cli: Cli, store_env: dict[str, str], tmp_path: Path
) -> None:
    listed = tmp_path / "models.toml"
    listed.write_text('[[model]]\nreference = "org/chat-small"\naliases = ["chat"]\n')
    shown = on_terminal(["seed", "--from", str(listed), "--prune"], store_env, answer="n")
    assert "would remove org/chat-next" in shown
    assert "Seed this list, and then remove these 2 models" in shown
    assert "would remove org/embedding" in cli("seed", "--from", str(listed), "--prune", code=8).stderr
    assert len(list(volume.catalog.keys())) == 3


def test_a_canary_is_asked_for_in_words(volume: ModelStore, store_env: dict[str, str]) -> None:
    shown = on_terminal(["alias", "set", "chat", "org/chat-next", "--percent", "10"], store_env, answer="y")
    assert "Send 10 % of @chat's workers to org/chat-next (90 % stay on org/chat-small)?" in shown
    assert "@chat points to org/chat-next" in shown


def test_rm_and_pin_take_several_and_ask_once(volume: ModelStore, cli: Cli, store_env: dict[str, str]) -> None:
    assert [record["pinned"] for record in cli.json("pin", "org/chat-next", "org/embedding")] == [True, True]
    assert "is pinned" in cli("rm", "org/embedding", "org/chat-next", "--yes", code=8).stderr
    assert cli("unpin", "org/chat-next", "org/embedding").stdout.count("unpinned") == 2
    assert "org/nowhere" in cli("rm", "org/embedding", "org/nowhere", "--yes", code=3).stderr
    assert len([*volume.catalog.keys()]) == 3, "nothing is removed if one is not there"
    shown = on_terminal(["rm", "org/chat-next", "org/embedding"], store_env, answer="y")
    assert "Remove these 2 models" in shown
    assert shown.count("removed ") == 2
    assert [key.repo_id for key in list(volume.catalog.keys())] == ["org/chat-small"]
    assert "REF is missing" in cli("rm", code=2).stderr


def test_a_pruning_seed_removes_only_what_was_in_its_plan(
    volume: ModelStore, cli: Cli, hub: Hub, tmp_path: Path
) -> None:
    """The plan is empty because one model could not be looked at; then it can, and nobody was asked."""
    write_repo(hub.folder / "org" / "new", random_tensors(2, seed=7))
    listed = tmp_path / "models.toml"
    listed.write_text("".join(f'[[model]]\nreference = "org/{name}"\n' for name in ("new", "chat-small")))
    hub.faults.status["config.json"] = [(403, {})]
    told = cli("seed", "--from", str(listed), "--prune").stderr
    assert "org/embedding" in told
    assert "was not in the plan" in told
    assert len(list(volume.catalog.keys())) == 4
    cli("seed", "--from", str(listed), "--prune", "--yes")
    assert len(list(volume.catalog.keys())) == 2


def test_one_model_is_this_model(volume: ModelStore, cli: Cli) -> None:
    cli("rm", "org/embedding", "--yes")
    assert re.search(r"remove this model \([0-9.]+ kB\)", cli("gc", "--to", "0B", code=8).stderr)


# Unfinished downloads, and claims.


@pytest.fixture
def left(hub: Hub, store: ModelStore) -> ModelStore:
    """A store with an unfinished download of org/name."""
    write_repo(hub.folder / "org" / "name", random_tensors(4), shards=2)
    leave_unfinished(hub, store)
    return store


def test_an_unfinished_download_is_shown_everywhere(left: ModelStore, cli: Cli) -> None:
    (record,) = cli.json("ls", "--unfinished")
    assert (record["repo_id"], record["running"]) == ("org/name", False)
    assert 0 < record["done"] < record["total"]
    assert 23 * 3600 < record["kept_s"] <= 24 * 3600
    assert re.search(r"org/name \w{12} float16: unfinished, \d+%, kept for (24 h|23 h|1 d) more, ", cli("ls").stdout)
    assert cli.json("ls") == []
    assert "unfinished" in cli("gc", "--dry-run").stdout
    (kept,) = cli.json("gc", "--dry-run")["unfinished"]
    assert (kept["path"], kept["bytes"]) == (record["path"], record["bytes"])
    assert "1 unfinished download" in cli("doctor").stdout
    assert "unfinished downloads, see `modelstore ls`" in cli("du").stdout


def test_an_unfinished_download_is_dropped_by_rm(left: ModelStore, cli: Cli, hub: Hub) -> None:
    assert "org/name" in cli("rm", "--unfinished", code=8).stderr
    assert "no unfinished download of org/other" in cli("rm", "--unfinished", "org/other", code=3).stderr
    assert cli.json("rm", "--unfinished", "--dry-run")[0]["removed"] is False
    (record,) = cli.json("rm", "--unfinished", "org/name", "--yes")
    assert record["bytes"] > 0
    assert not list(unfinished(left.layout))
    assert cli.json("rm", "--unfinished", "--yes") == []
    assert "no unfinished downloads" in cli("ls", "--unfinished").stdout
    assert left.ensure("org/name").status == "downloaded"


def test_rm_unfinished_takes_what_is_named_and_nothing_else(left: ModelStore, cli: Cli, hub: Hub) -> None:
    write_repo(hub.folder / "org" / "other", random_tensors(4, seed=5), shards=2)
    hub.faults.status["model-00002-of-00002.safetensors"] = [(404, {})] * 1000
    cli("seed", "org/other", "--dtype", "bfloat16", code=1)
    hub.faults.status.clear()

    def planned(*arguments: str) -> list[str]:
        return [record["repo_id"] for record in cli.json("rm", "--unfinished", "--dry-run", *arguments)]

    assert planned() == ["org/name", "org/other"]
    assert planned("--dtype", "bf16") == ["org/other"]
    assert planned("org/name", "org/name") == ["org/name"]
    assert "bogus" in cli("rm", "--unfinished", "org/name", "--dtype", "bogus", code=2).stderr
    assert "--revision" in cli("rm", "--unfinished", "--revision", "main", code=2).stderr
    commit = cli.json("ls", "--unfinished")[0]["commit"]
    assert planned(f"org/name@{commit[:10]}") == planned(f"org/name@{commit}") == ["org/name"]
    assert "no unfinished download" in cli("rm", "--unfinished", "org/name@v1.0", code=3).stderr
    assert "no unfinished download" in cli("rm", "--unfinished", "org/name", "--dtype", "keep", code=3).stderr
    shown = cli("ls", "--unfinished").stdout
    assert "no unfinished downloads" not in shown
    assert "matches" not in cli("ls", "--filter", "org/name").stdout


def test_a_download_that_runs_is_not_dropped(hub: Hub, cli: Cli, store_env: dict[str, str]) -> None:
    write_repo(hub.folder / "org" / "name", random_tensors(8, (256, 256)))
    hub.faults.bytes_per_s = 100_000
    with subprocess.Popen(
        [sys.executable, "-m", "modelstore", "seed", "org/name"], env=os.environ | store_env, stderr=subprocess.DEVNULL
    ) as seeding:
        try:
            while not (records := cli.json("ls", "--unfinished")) or not records[0]["running"]:
                assert seeding.poll() is None
                time.sleep(0.1)
            assert "downloading" in cli("ls").stdout
            assert cli.json("rm", "--unfinished", "--yes") == []
            done = cli("rm", "--unfinished", "org/name", "--yes", "--json", code=8)
            assert "stop that first" in done.stderr
            assert json.loads(done.stdout) == []
            assert "alive" in cli("claims").stdout
        finally:
            seeding.send_signal(signal.SIGKILL)
    assert len(cli.json("rm", "--unfinished", "org/name", "--yes")) == 1


def test_a_claim_of_the_dead_tells_its_silence_and_no_time_left(hub: Hub, make_store: MakeStore, cli: Cli) -> None:
    store = make_store()
    write_repo(hub.folder / "org" / "name")
    store.ensure("org/name")
    key = SnapshotKey("org/lost", "a" * 40, "float16")
    claim = Contender(store.layout.claims(key), worker="w", lease_s=30).try_claim()
    assert isinstance(claim, Claim)
    claim.report("downloading", done=35, total=100, eta_s=70021)
    claim._write()
    claim._stop.set()  # it beats no more, as if its host had gone
    claim._thread.join()
    os.utime(store.layout.claims(key) / "1", (time.time() - 3, time.time() - 3))
    (record,) = cli.json("claims")
    assert record["alive"] is False
    assert record["silent_s"] >= 1
    shown = cli("claims").stdout
    assert re.search(r"no heartbeat for \d+ s; the next who asks takes over, within 2\d s", shown)
    assert "35% of 100 B" in shown
    assert "70021 s" not in shown


def test_a_quota_error_names_what_can_be_dropped(left: ModelStore, cli: Cli, hub: Hub) -> None:
    write_repo(hub.folder / "org" / "other", random_tensors(4, seed=5))
    cli.env = cli.env | {"MODELSTORE_QUOTA": "2300kB"}
    told = cli("seed", "org/other", code=6).stderr
    assert "drop the unfinished downloads (`modelstore rm --unfinished`" in told
    cli("rm", "--unfinished", "--yes")
    cli("seed", "org/other")


# A list with one bad name.


def test_one_bad_name_in_a_list_has_a_row_and_a_last_line(hub: Hub, cli: Cli, tmp_path: Path) -> None:
    write_repo(hub.folder / "org" / "one")
    write_repo(hub.folder / "org" / "gated")
    hub.gated.add("org/gated")
    listed = tmp_path / "models.toml"
    listed.write_text("".join(f'[[model]]\nreference = "org/{name}"\n' for name in ("one", "nope", "gated")))
    done = cli("seed", "--from", str(listed), "--dry-run", code=3)
    assert re.search(r"^org/one .*missing *$", done.stdout, re.MULTILINE)
    assert re.search(r"^org/nope .*failed: not found *$", done.stdout, re.MULTILINE)
    assert re.search(r"^org/gated .*failed: no access *$", done.stdout, re.MULTILINE)
    assert done.stderr.count("error: ") == 2
    done = cli("seed", "--from", str(listed), code=3)
    assert done.stdout.splitlines()[-1] == "1 of 3 published; failed: org/nope (not found), org/gated (no access)"


# Damage, and the way back.


def damage(store: ModelStore, reference: str) -> SnapshotKey:
    snapshot = store.lookup(reference)
    assert snapshot is not None
    weights = snapshot.path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    return snapshot.key


def test_a_damaged_snapshot_is_remembered_until_it_is_made_again(volume: ModelStore, cli: Cli) -> None:
    key = damage(volume, "org/embedding")
    assert "(damaged)" not in cli("ls").stdout
    shown = cli("verify", code=5).stdout
    assert f"made again at the next start, or now: modelstore seed org/embedding@{key.commit}" in shown
    assert "org/embedding (damaged)" in cli("ls").stdout
    by_name = {record["repo_id"]: record["problem"] for record in cli.json("ls")}
    assert by_name["org/embedding"].startswith("model.safetensors: not the bytes")
    assert by_name["org/chat-small"] == ""
    assert "verify found damage in 1 model: org/embedding" in cli("doctor", code=5).stdout
    cli("verify", "--sample", "1/1000")
    assert "(damaged)" in cli("ls").stdout, "a sample that finds nothing forgets nothing"
    assert cli.json(*shown.rpartition("modelstore ")[2].split())["status"] in ("downloaded", "resumed")
    assert "(damaged)" not in cli("ls").stdout
    cli("verify")


def test_a_whole_run_that_finds_nothing_forgets_the_problem(volume: ModelStore, cli: Cli) -> None:
    damage(volume, "org/embedding")
    cli("verify", code=5)
    damage(volume, "org/embedding")  # the same bit again
    cli("verify")
    assert "(damaged)" not in cli("ls").stdout


def test_a_file_that_does_not_belong_is_no_damage(volume: ModelStore, cli: Cli) -> None:
    snapshot = volume.lookup("org/embedding")
    assert snapshot is not None
    (snapshot.path / "notes.txt").write_text("x")
    shown = cli("verify", code=5).stdout
    assert "remove it" in shown
    assert "made again" not in shown
    assert "(damaged)" not in cli("ls").stdout


def test_a_damaged_model_is_not_called_present(volume: ModelStore, cli: Cli, hub: Hub) -> None:
    damage(volume, "org/embedding")
    cli("verify", code=5)
    (planned,) = cli.json("seed", "org/embedding", "--dry-run")["models"]
    assert planned["status"] == "damaged"
    assert planned["downloaded_bytes"] > 0
    assert "and damaged" in cli("doctor", "org/embedding", code=5).stdout
    cli("alias", "set", "safe", "org/embedding")
    cli("verify")


def test_a_seed_of_a_damaged_model_takes_the_newest_commit(volume: ModelStore, cli: Cli, hub: Hub) -> None:
    damage(volume, "org/embedding")
    cli("verify", code=5)
    write_repo(hub.folder / "org" / "embedding", random_tensors(3, seed=77))
    assert cli.json("seed", "org/embedding")["commit"] == hub.commit(hub.folder / "org" / "embedding")


def test_a_mended_snapshot_is_not_damaged_any_more(volume: ModelStore, cli: Cli) -> None:
    damage(volume, "org/embedding")
    cli("verify", code=5)
    damage(volume, "org/embedding")  # the same bit again
    cli("verify", "--max-seconds", "100")
    assert "(damaged)" not in cli("ls").stdout


def test_a_rollback_makes_a_damaged_target_again(volume: ModelStore, cli: Cli) -> None:
    cli("alias", "set", "chat", "org/chat-next", "--yes")
    damage(volume, "org/chat-small")
    cli("verify", code=5)
    assert "is made again first" in cli("alias", "rollback", "chat", "--yes").stderr
    cli("verify")


def test_a_rollback_after_a_rollback_does_not_go_forward(volume: ModelStore, cli: Cli) -> None:
    for name in ("chat-next", "embedding"):
        cli("alias", "set", "chat", f"org/{name}", "--yes")
    assert "org/chat-next" in cli("alias", "rollback", "chat", "--yes").stdout
    assert "org/chat-small" in cli("alias", "rollback", "chat", "--yes").stdout
    told = cli("alias", "rollback", "chat", "--yes", code=3).stderr
    assert "is back at its first target, org/chat-small" in told
    assert "--to" in told
    shown = cli("alias", "history", "chat").stdout.splitlines()
    assert [line.split()[0] for line in shown] == ["#", "5", "4", "3", "2", "1"]
    assert shown[1].rstrip().endswith("now")
    assert "org/embedding" in cli("alias", "rollback", "chat", "--to", "org/embedding", "--yes").stdout
    assert "org/chat-next" in cli("alias", "rollback", "chat", "--to", "2", "--yes").stdout
    assert "alias history" in cli("alias", "rollback", "chat", "--to", "9", code=3).stderr
    assert "already" in cli("alias", "rollback", "chat", "--to", "7", code=3).stderr
    assert "has not pointed to" in cli("alias", "rollback", "chat", "--to", "org/nothing", code=3).stderr
    assert "alias history" in cli("alias", "rollback", "chat", "--to", "org/other", code=3).stderr


def test_a_rollback_to_a_canary_says_that_it_is_for_all(volume: ModelStore, cli: Cli) -> None:
    cli("alias", "set", "chat", "org/chat-next", "--percent", "10", "--yes")
    cli("alias", "rollback", "chat", "--yes")
    told = cli("alias", "rollback", "chat", "--to", "org/chat-next", code=8).stderr
    assert "which was tried for 10 %, for all workers" in told


def test_a_canary_is_rolled_back_to_the_model_of_the_rest(volume: ModelStore, cli: Cli) -> None:
    cli("alias", "set", "chat", "org/chat-next", "--yes")
    cli("alias", "set", "chat", "org/embedding", "--percent", "10", "--yes")
    assert "org/chat-next" in cli("alias", "rollback", "chat", "--yes").stdout
    assert "org/chat-small" in cli("alias", "rollback", "chat", "--yes").stdout


# Words on success.


def test_what_was_copied_is_not_called_downloaded(hub: Hub, cli: Cli, tmp_path: Path) -> None:
    write_model(tmp_path / "mine", seed=0)
    hub.stop()
    done = cli("seed", f"file://{tmp_path}/mine")
    assert done.stdout.startswith("copied: local/mine at ")
    assert "network" not in done.stdout
    record = cli.json("warm", f"file://{tmp_path}/mine", "--device", "cpu", "--dtype", "keep")
    assert (record["outcome"], "the folder" in record["reason"]) == ("copied", True)


def test_adopt_says_what_it_did(hub: Hub, cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "volume" / "mine"
    write_repo(folder)
    assert re.match(r"would adopt: me/own at \w{12} as keep, 3 files, ", cli(*ADOPT, str(folder), "--dry-run").stdout)
    assert cli.json("ls") == []
    done = cli(*ADOPT, str(folder))
    assert re.match(r"adopted: me/own at \w{12} as keep, 3 files, .*, 1 weights file linked\n", done.stdout)
    assert cli(*ADOPT, str(folder)).stdout.startswith("is there already: me/own")
    assert ", converted\n" in cli("adopt", str(folder), "--as", "me/own", "--dtype", "bfloat16").stdout


ADOPT = ("adopt", "--as", "me/own", "--dtype", "keep")


def test_adopt_takes_a_folder_of_models(hub: Hub, cli: Cli, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two", "org/three")):
        write_repo(tmp_path / "models" / name, random_tensors(2, seed=seed))
    (tmp_path / "models" / "notes").mkdir()
    write_repo(tmp_path / "models" / "bad", random_tensors(2, seed=9))
    (tmp_path / "models" / "bad" / "link.json").symlink_to("/etc/passwd")
    planned = cli.json("adopt", str(tmp_path / "models"), "--dry-run", code=8)
    assert [record.get("status") for record in planned] == [None, "missing", "missing", "missing"]
    assert "--as can name only one" in cli("adopt", str(tmp_path / "models"), "--as", "me/x", code=2).stderr
    records = cli.json("adopt", str(tmp_path / "models"), code=8)
    assert {record.get("repo_id") for record in records} == {None, "local/one", "local/two", "local/three"}
    write_repo(tmp_path / "models" / "own" / "one", random_tensors(2, seed=11))
    assert "would both be local/one" in cli("adopt", str(tmp_path / "models"), code=2).stderr


def test_without_a_network_a_seed_takes_what_lies_in_the_hf_cache(hub: Hub, cli: Cli, tmp_path: Path) -> None:
    write_repo(hub.folder / "org" / "name")
    cli("seed", "org/name", "--dtype", "keep")
    cli("export", "org/name", "--hf-cache", str(tmp_path / "volume" / "huggingface-cache" / "hub"))
    shutil.rmtree(tmp_path / "volume" / "modelstore")
    hub.stop()
    done = cli("seed", "org/name")
    assert done.stdout.startswith("copied: org/name")
    assert "could not be reached" in cli("seed", "org/other", code=1).stderr


# Looking.


@pytest.mark.parametrize("columns", ["50", "80", "200"])
@pytest.mark.parametrize("command", ["ls", "du"])
def test_no_name_is_split_at_any_width(hub: Hub, volume: ModelStore, cli: Cli, columns: str, command: str) -> None:
    write_repo(hub.folder / "org" / LONG)
    volume.ensure(f"org/{LONG}")
    cli.env = cli.env | {"COLUMNS": columns}
    shown = cli(command).stdout
    for name in (*NAMES, LONG):
        assert f"org/{name}" in shown
    assert max(map(len, shown.splitlines())) <= int(columns)
    assert ("commit" in shown) == (columns == "200")


def test_ls_sorts_filters_and_counts(hub: Hub, volume: ModelStore, cli: Cli) -> None:
    write_repo(hub.folder / "org" / "big", random_tensors(6, seed=9))
    cli("seed", "org/big", "--dtype", "float32")
    assert cli.json("ls", "--sort", "size")[0]["repo_id"] == "org/big"
    assert cli.json("ls", "--sort", "used")[0]["repo_id"] == "org/big"
    assert [record["repo_id"] for record in cli.json("ls")] == sorted(f"org/{name}" for name in (*NAMES, "big"))
    assert [record["repo_id"] for record in cli.json("ls", "--filter", "CHAT-")] == ["org/chat-next", "org/chat-small"]
    assert [record["repo_id"] for record in cli.json("ls", "--filter", "@chat")] == ["org/chat-small"]
    assert [record["repo_id"] for record in cli.json("ls", "--filter", "float32")] == ["org/big"]
    assert re.match(r"2 models, [0-9.]+ kB, 0 in use", cli("ls", "--filter", "chat-").stdout.splitlines()[-1])
    assert "matches" in cli("ls", "--filter", "nothing-has-this").stdout
    assert "use name, size, used" in cli("ls", "--sort", "colour", code=2).stderr


def test_history_is_in_utc_and_can_be_narrowed(hub: Hub, make_store: MakeStore, cli: Cli) -> None:
    write_repo(hub.folder / "org" / "name")
    store = make_store()
    store.ensure("org/name")
    for model, age_s, error in (("org/a", 3 * 86400, ""), ("org/b", 60, "Boom"), ("None", 30, "InvalidSetting")):
        timeline = Timeline(worker="w", model=model, began=time.monotonic() - age_s)
        timeline.mark("ready")
        timeline.outcome = "hit"
        history.add(store.layout, timeline, error=error)
    cli.env = cli.env | {"TZ": "Asia/Tokyo"}
    shown = cli("history").stdout
    assert "UTC" in shown
    assert time.strftime("%m-%d %H:", time.gmtime(time.time() - 60)) in shown
    assert "None" not in shown
    assert [record["model"] for record in cli.json("history", "--since", "1h")] == ["org/b", ""]
    assert [record["model"] for record in cli.json("history", "--outcome", "hit")] == ["org/a"]
    assert len(cli.json("history", "--outcome", "failed", "--limit", "1")) == 1
    assert [record["model"] for record in cli.json("history", "--since", "2020-01-01")] == ["org/a", "org/b", ""]
    assert "write it like 6h" in cli("history", "--since", "yesterday", code=2).stderr
    assert "is not known" in cli("history", "--outcome", "nice", code=2).stderr


def test_a_name_that_is_nearly_right_is_suggested(volume: ModelStore, cli: Cli) -> None:
    assert "did you mean org/embedding?" in cli("show", "org/embeding", code=3).stderr
    assert "did you mean @chat?" in cli("path", "@chatt", code=3).stderr
    assert "did you mean" not in cli("show", "org/quite-different", code=3).stderr


def test_a_snapshot_is_one_line(volume: ModelStore) -> None:
    shown = repr(volume.lookup("org/embedding"))
    assert re.fullmatch(r"<Snapshot org/embedding@\w{12} \(float16\), 3 files, [0-9.]+ kB, present, '/.+'>", shown)
