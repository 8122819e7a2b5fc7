"""`ls`, `du`, `claims`, `watch`: the models on a volume, their users, and the downloads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelstore.mount import mount_of
from modelstore.operate import inventory
from modelstore.settings import Settings
from modelstore.store import ModelStore
from modelstore.volume import aliases, durable, pins
from modelstore.volume.claim import Claim, Contender
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.snapshots import Catalog
from tests.conftest import Cli
from tests.support.checkpoints import random_tensors, write_repo
from tests.support.hub import Hub


@pytest.fixture
def filled(hub: Hub, store: ModelStore) -> ModelStore:
    """A store of two models: one pinned, aliased and in use, the other not."""
    write_repo(hub.folder / "org" / "one")
    write_repo(hub.folder / "org" / "two", random_tensors(2, seed=1))
    one = store.ensure("org/one")
    store.ensure("org/two")
    pins.pin(store.layout, one.key, "alice")
    aliases.point(store.layout, "chat", one.key, "alice")
    return store


def test_a_model_that_is_evicted_while_ls_looks_is_not_listed(
    filled: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Catalog.read

    def after_an_eviction(catalog: Catalog, key: SnapshotKey) -> durable.Contents | None:
        if key.repo_id == "org/one":
            shutil.rmtree(filled.layout.snapshot(key))
        return read(catalog, key)

    monkeypatch.setattr(Catalog, "read", after_an_eviction)
    assert [model["repo_id"] for model in inventory.models(filled.layout)] == ["org/two"]


def test_ls_goes_on_if_there_can_be_no_marks(filled: ModelStore, cli: Cli) -> None:
    shutil.rmtree(filled.layout.root / "used")
    (filled.layout.root / "used").touch()
    assert [(model["repo_id"], model["idle_s"]) for model in cli.json("ls")] == [("org/one", None), ("org/two", None)]


def test_ls_tells_use_pins_and_aliases(filled: ModelStore, cli: Cli) -> None:
    one = filled.lookup("org/one")
    assert one is not None
    use = pins.UsageMark(filled.layout, one.key, "worker-7")
    first, second = cli.json("ls")
    assert (first["repo_id"], second["repo_id"]) == ("org/one", "org/two")
    assert first["pinned"]
    assert first["aliases"] == ["chat"]
    assert first["in_use_by"] == ["worker-7"]
    assert (first["bytes"], first["files"]) == (one.size_bytes, len(one.manifest.files))
    assert (second["pinned"], second["aliases"], second["in_use_by"]) == (False, [], [])
    assert 0 <= second["idle_s"] < 60
    use.end()
    shown = cli("ls").stdout
    assert "@chat" in shown
    assert "pin" in shown


def test_ls_sees_a_worker_on_a_snapshot_that_was_unused_for_long(filled: ModelStore, cli: Cli) -> None:
    one = filled.lookup("org/one")
    assert one is not None
    last = filled.layout.used(one.key) / ".last"
    os.utime(last, (0, last.stat().st_mtime - 1000))
    assert cli.json("ls")[0]["idle_s"] >= 1000
    use = pins.UsageMark(filled.layout, one.key, "worker-7")
    deadline = time.monotonic() + 60
    while (found := cli.json("ls")[0])["in_use_by"] != ["worker-7"]:  # its thread says so next
        assert time.monotonic() < deadline
    assert found["idle_s"] < 60
    use.end()


def test_ls_names_damaged_snapshots(filled: ModelStore, cli: Cli) -> None:
    two = filled.lookup("org/two")
    assert two is not None
    (two.path / two.weights[0].path).unlink()
    one, damaged = cli.json("ls")
    assert one["complete"]
    assert not damaged["complete"]
    assert "org/two (damaged)" in cli("ls").stdout


def test_ls_lists_a_folder_only_if_it_changed_after_its_manifest(
    filled: ModelStore, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = []
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(str(path)) or real(path))
    one, two = filled.lookup("org/one"), filled.lookup("org/two")
    assert one is not None
    assert two is not None
    for snapshot, later_s in ((one, 0), (two, 1)):
        (snapshot.path / snapshot.weights[0].path).unlink()
        written = (snapshot.path / "manifest.json").stat().st_mtime_ns
        os.utime(snapshot.path, ns=(written, written + later_s * 10**9))
    assert [record["complete"] for record in inventory.models(filled.layout)] == [True, False]
    assert str(two.path) in listed
    assert str(one.path) not in listed


def test_models_in_the_place_of_a_link_are_not_listed(filled: ModelStore, cli: Cli, tmp_path: Path) -> None:
    filled.layout.models.rename(tmp_path / "elsewhere")
    filled.layout.models.symlink_to(tmp_path / "elsewhere")
    for command in ("ls", "verify", "du"):
        assert "is a link" in cli(command, code=8).stderr


def test_du_adds_up_and_names_the_models_that_may_go(filled: ModelStore, cli: Cli) -> None:
    one, two = filled.lookup("org/one"), filled.lookup("org/two")
    assert one is not None
    assert two is not None
    cli.env["MODELSTORE_QUOTA"] = "1GB"
    found = cli.json("du")
    sizes = {model["repo_id"]: model["bytes"] for model in found["snapshots"]}
    assert found["taken"] == sum(sizes.values()) == found["kinds"]["models"]
    assert found["evictable"] == sizes["org/two"] >= two.size_bytes
    assert found["free"] == 10**9 - found["taken"]
    kept = {model["repo_id"]: model["kept_because"] for model in found["snapshots"]}
    assert kept == {"org/one": "it is pinned", "org/two": ""}
    assert "an eviction would free" in cli("du").stdout


def test_a_download_that_runs_and_one_whose_worker_is_gone_are_told_apart(filled: ModelStore, hub: Hub) -> None:
    write_repo(hub.folder / "org" / "three")
    keys = [snapshot.key for snapshot in filled.snapshots()]
    held = []
    for key in keys:
        claim = Contender(filled.layout.claims(key), worker=f"of {key.repo_id}", lease_s=30).try_claim()
        assert isinstance(claim, Claim)
        claim.report("downloading", done=250, total=1000, eta_s=7.0)
        held.append(claim)
    held[1]._stop.set()  # it beats no more, as if its host had gone
    held[1]._thread.join()
    time.sleep(0.7)
    alive, gone = inventory.claims(filled.layout)
    assert (alive["worker"], alive["phase"], alive["done"], alive["total"], alive["eta_s"]) == (
        "of org/one", "downloading", 250, 1000, 7.0,
    )  # fmt: skip
    assert (alive["alive"], gone["alive"]) == (True, False)
    held[0].finish("released")
    held[1]._stop.clear()
    held[1].finish("released")
    assert inventory.claims(filled.layout) == []


@pytest.mark.slow
def test_claims_shows_a_real_download(hub: Hub, cli: Cli, store_env: dict[str, str]) -> None:
    write_repo(hub.folder / "org" / "name", random_tensors(8))
    hub.faults.bytes_per_s = 100_000
    seeding = subprocess.Popen(
        [sys.executable, "-m", "modelstore", "seed", "org/name", "--quiet"], env=os.environ | store_env
    )
    try:
        deadline = time.monotonic() + 60
        while not (found := cli.json("claims")) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert found[0]["repo_id"] == "org/name"
        assert found[0]["alive"]
        assert found[0]["pid"] == seeding.pid
        assert "org/name" in cli("claims").stdout
        lines = cli("watch", "--json", "--count", "2", "--every-s", "0.2").stdout.splitlines()
        assert [json.loads(line)["claims"][0]["repo_id"] for line in lines] == ["org/name"] * 2
        assert "org/name" in cli("watch", "--count", "1").stdout
    finally:
        seeding.kill()
        seeding.wait()
    assert [claim["alive"] for claim in cli.json("claims")] == [False]
    assert "gone" in cli("claims").stdout


def test_an_empty_store_and_one_that_is_not_there(cli: Cli, tmp_path: Path) -> None:
    assert cli.json("ls") == []
    assert "publish one with" in cli("ls").stdout
    found = cli.json("du", "--root", str(tmp_path / "nothing"))
    assert (found["taken"], found["snapshots"]) == (0, [])
    assert cli.json("claims", "--root", str(tmp_path / "nothing")) == []
    assert "there are no downloads" in cli("claims").stdout


def test_a_reader_of_the_output_that_goes_away_is_no_error(filled: ModelStore, store_env: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m modelstore ls --json | head -c 1"],
        env=os.environ | store_env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "["
    assert done.stderr == ""


@pytest.mark.parametrize("columns", ["60", "200"])
def test_tables_fit_the_terminal(filled: ModelStore, cli: Cli, columns: str) -> None:
    cli.env["COLUMNS"] = columns
    for command in ("ls", "du", "history"):
        lines = cli(command).stdout.splitlines()
        assert max(map(len, lines)) <= int(columns), command
        assert "\x1b" not in "".join(lines), "no colours where it is no terminal"


@pytest.mark.parametrize("command", ["--help", "ls --json", "ls", "du", "history", "claims", "path org/one"])
def test_looking_imports_neither_torch_nor_http(filled: ModelStore, store_env: dict[str, str], command: str) -> None:
    code = (
        "import sys, modelstore.__main__\n"
        "try: modelstore.__main__.main()\n"
        "finally: print(*sorted({n.split('.')[0] for n in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split()],
        env=os.environ | store_env,
        capture_output=True,
        text=True,
        check=True,
    )
    imported = set(done.stderr.split())
    assert not imported & {"torch", "transformers", "numpy", "huggingface_hub", "httpx", "httpx2", "runpod"}
    assert ("rich" in imported) == (command in ("ls", "du", "history", "claims")), "what draws nothing does without"


def test_help_is_there_at_once() -> None:
    """By its processor time, which a busy machine leaves nearly as it is: it waits for nothing else."""
    took = []
    for _run in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-m", "modelstore", "--help"], capture_output=True, check=True)
        after = os.times()
        took.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert 0 < min(took) < 0.5, "0.16 s on a quiet machine, where that is all the time it takes"


def test_settings_of_a_volume_are_found_by_its_mount() -> None:

    table = (
        "/dev/a / ext4 rw 0 0\nmfs#m:9421 /runpod-volume fuse rw,mfsnobsdlocks 0 0\nx /with\\040space tmpfs ro 0 0\n"
    )
    mount = mount_of(Path("/runpod-volume/modelstore"), table)
    assert mount is not None
    assert (mount.device, mount.kind, mount.options) == ("mfs#m:9421", "fuse", ("rw", "mfsnobsdlocks"))
    other = mount_of(Path("/with space/x"), table)
    assert other is not None
    assert other.options == ("ro",)
    assert mount_of(Path("/x"), "") is None
    assert Settings.from_env({}, mounts=table).root == Path("/runpod-volume/modelstore")
