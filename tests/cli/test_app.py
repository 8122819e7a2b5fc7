"""The command line: one JSON document on stdout, one line on stderr, the exit codes of the design."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.support.checkpoints import random_tensors, write_repo
from tests.support.hub import Hub
from tests.support.models import write_model

pytestmark = pytest.mark.slow


def test_seed_twice_prints_the_contracts_record_and_downloads_once(hub: Hub, cli: Cli) -> None:
    repo = write_repo(hub.folder / "org" / "name")
    first = cli.json("seed", "org/name")
    assert first.keys() == {"repo_id", "commit", "dtype", "path", "files", "bytes", "downloaded_bytes", "status"}
    assert (first["repo_id"], first["commit"], first["dtype"]) == ("org/name", hub.commit(repo), "float16")
    assert first["downloaded_bytes"] == hub.served.total_bytes > 0
    second = cli.json("seed", "org/name")
    assert (second["status"], second["downloaded_bytes"]) == ("present", 0)
    assert Path(second["path"], "manifest.json").is_file()


def test_several_references_give_a_list_and_one_failure_spares_the_others(hub: Hub, cli: Cli) -> None:
    write_repo(hub.folder / "org" / "one")
    write_repo(hub.folder / "org" / "two", random_tensors(2, seed=2))
    done = cli("seed", "org/one", "org/missing", "org/two", "--json", code=3)
    records = json.loads(done.stdout)
    assert [record.get("status") for record in records] == ["downloaded", None, "downloaded"]
    assert records[1]["exit_code"] == 3
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1


def test_path_prints_the_folder_and_touches_no_network(hub: Hub, cli: Cli) -> None:
    write_repo(hub.folder / "org" / "name")
    seeded = cli.json("seed", "org/name")
    hub.stop()
    done = cli("path", "org/name")
    assert done.stdout.strip() == seeded["path"]
    assert cli.json("path", "org/name") == {"path": seeded["path"]}


def test_ls_show_and_verify_tell_the_present_snapshots(hub: Hub, cli: Cli) -> None:
    write_repo(hub.folder / "org" / "name")
    assert cli.json("ls") == []
    assert "modelstore seed" in cli("ls").stdout
    seeded = cli.json("seed", "org/name")
    (listed,) = cli.json("ls")
    assert listed["path"] == seeded["path"]
    assert "org/name" in cli("ls").stdout
    shown = cli.json("show", "org/name")
    assert {file["path"] for file in shown["file_list"]} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert "model.safetensors" in cli("show", "org/name").stdout
    assert cli.json("verify", "org/name")[0]["ok"] is True
    weights = Path(seeded["path"], "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    (record,) = cli.json("verify", code=5)
    assert record["findings"][0]["path"] == "model.safetensors"
    for damaged, name in ((weights, "model.safetensors"), (weights.with_name("manifest.json"), "manifest.json")):
        damaged.write_bytes(damaged.read_bytes()[:-10])
        for arguments in (["verify"], ["verify", "org/name"]):
            (record,) = cli.json(*arguments, code=5)
            assert record["findings"][0]["path"] == name
    assert cli.json("rm", "org/name", "--yes")["removed"] is True
    assert cli.json("verify") == []


def test_rm_removes_one_variant_and_only_when_told(hub: Hub, cli: Cli) -> None:
    write_repo(hub.folder / "org" / "name")
    seeded = cli.json("seed", "org/name")
    other = cli.json("seed", "org/name", "--dtype", "keep")
    assert cli.json("rm", "org/name", "--dry-run")["removed"] is False
    assert "--yes" in cli("rm", "org/name", code=8).stderr
    assert Path(seeded["path"]).is_dir()
    assert cli.json("rm", "org/name", "--yes")["removed"] is True
    assert not Path(seeded["path"]).exists()
    assert Path(other["path"]).is_dir()
    assert list(Path(seeded["path"]).parents[2].joinpath("trash").iterdir()) == []
    cli("rm", "org/name", "--yes", code=3)
    assert cli.json("seed", "org/name")["status"] == "downloaded"


def test_version_is_the_packages(cli: Cli) -> None:
    from modelstore import __version__

    assert cli("--version").stdout.strip() == f"modelstore {__version__}"


@pytest.mark.parametrize("device", ["cuda:99", "toaster"])
def test_a_device_that_is_not_here_is_one_line(hub: Hub, cli: Cli, device: str) -> None:
    write_model(hub.folder / "org" / "name", seed=0)
    assert device in cli("warm", "org/name", "--device", device, code=2).stderr


def test_warm_prints_the_timeline_record(hub: Hub, cli: Cli) -> None:
    write_model(hub.folder / "org" / "name", seed=0)
    record = cli.json("warm", "org/name", "--device", "cpu")
    assert record["outcome"] == "downloaded"
    assert record["spans"][-1]["name"] == "ready"
    assert "build" in cli("warm", "org/name").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["seed", "org/unknown"], 3, "org/unknown"),
        (["seed", "not-a-reference"], 2, "org/name"),
        (["seed", "org/name@../x"], 2, "revision"),
        (["seed", "org/gated"], 4, "HF_TOKEN"),
        (["seed", "org/pickles"], 8, "pickles"),
        (["seed", "org/name", "--dtype", "int3"], 2, "int3"),
        (["path", "org/name"], 3, "modelstore seed org/name"),
        (["show", "@chat"], 3, "alias"),
        (["seed", "file:///nowhere"], 3, "file:///nowhere"),
        (["ls", "--root", "/dev/null/x"], 1, "MODELSTORE_ROOT"),
        (["seed", "org/name", "--root", "/dev/null/x"], 1, "MODELSTORE_ROOT"),
        (["seed", "org/name", "--overflow", "wrap"], 2, "overflow"),
        (["seed"], 2, "REF"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_bad_input_is_one_line_and_the_right_code(
    hub: Hub, cli: Cli, arguments: list[str], code: int, words: str
) -> None:
    write_repo(hub.folder / "org" / "name")
    write_repo(hub.folder / "org" / "gated")
    hub.gated.add("org/gated")
    pickles = write_repo(hub.folder / "org" / "pickles")
    (pickles / "model.safetensors").rename(pickles / "pytorch_model.bin")
    done = cli(*arguments, code=code)
    assert words in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    usage = "Usage:" in done.stderr
    assert len(errors) == (0 if usage else 1), done.stderr
    assert done.stdout == ""


def test_a_bad_setting_names_its_variable(cli: Cli) -> None:
    cli.env = cli.env | {"MODELSTORE_LEASE_S": "soon"}
    assert "MODELSTORE_LEASE_S" in cli("ls", code=2).stderr


def test_a_hub_that_is_down_is_one_line(hub: Hub, cli: Cli) -> None:
    hub.stop()
    done = cli("seed", "org/name", code=1)
    assert "could not be reached" in done.stderr


def test_a_narrow_terminal_and_a_pipe_look_right(hub: Hub, cli: Cli) -> None:
    write_repo(hub.folder / "organisation" / "a-model-with-a-rather-long-name-indeed")
    cli.env = cli.env | {"COLUMNS": "60"}
    cli("seed", "organisation/a-model-with-a-rather-long-name-indeed")
    out = cli("ls").stdout
    assert "\x1b" not in out
    assert "".join(line.split()[0] for line in out.splitlines()[1:]).startswith("organisation/a-model")


def test_lines_into_a_pipe_are_as_long_as_they_are(hub: Hub, cli: Cli) -> None:
    name = "organisation/a-model-with-a-rather-long-name-indeed"
    write_repo(hub.folder / name)
    cli("seed", name)
    for columns in ("", "0"):
        cli.env["COLUMNS"] = columns
        line, total = cli("ls").stdout.splitlines()[1:]
        assert total == "1 model, 524.8 kB, 0 in use"
        assert line.startswith(f"{name} ")
        assert line.split()[2:5] == ["float16", "3", "524.8"]


def test_a_commit_may_be_cut_and_other_variants_are_named(hub: Hub, cli: Cli) -> None:
    write_repo(hub.folder / "org" / "name")
    commit = cli.json("seed", "org/name", "--dtype", "keep")["commit"]
    hub.stop()
    assert cli("path", f"org/name@{commit[:12]}", "--dtype", "keep").stdout.endswith(f"{commit}.keep\n")
    for command in ("show", "path", "verify", "pin", "unpin", "rm"):
        told = cli(command, "org/name", "--dtype", "float16", code=3).stderr
        assert told.endswith(f"as float16, but this is: org/name@{commit[:12]} --dtype keep\n")
        if command != "rm":
            cli(command, "org/name")
    assert "modelstore ls" in cli("path", "org/other", code=3).stderr
    cli("pin", f"org/name@{commit[:12]}", "--dtype", "keep")
    cli("seed", "org/name", "--dtype", "keep", code=1)


def test_a_folders_name_is_known_everywhere_and_never_asked_of_the_hub(hub: Hub, cli: Cli, tmp_path: Path) -> None:
    write_repo(tmp_path / "my-model")
    cli("seed", f"file://{tmp_path}/my-model")
    (listed,) = cli.json("ls")
    assert listed["repo_id"] == "local/my-model"
    for command in (["show"], ["path"], ["verify"], ["pin"], ["unpin"], ["doctor"], ["seed"], ["alias", "set", "own"]):
        cli(*command, "local/my-model")
    assert cli.json("seed", "local/my-model", "--dry-run")["models"][0]["status"] == "present"
    cli("alias", "rm", "own", "--yes")
    cli("rm", "local/my-model", "--yes")
    write_repo(hub.folder / "local" / "my-model", random_tensors(2, seed=9))  # somebody else's
    for command in (["seed"], ["warm"], ["alias", "set", "own"], ["doctor"]):
        done = cli(*command, "local/my-model", code=3)
        assert "no Hub is asked" in done.stderr + done.stdout
    assert not [request for request in hub.served.requests if "local" in str(request)]


def test_an_alias_whose_model_is_gone_is_said_and_removed(hub: Hub, cli: Cli) -> None:
    write_repo(hub.folder / "org" / "name")
    cli("alias", "set", "chat", "org/name")
    cli("rm", "@chat", "--yes", code=8)
    cli("rm", "@chat", "--yes", "--force")
    assert "is not on the volume" in cli("rm", "@chat", "--yes", "--force", code=3).stderr
    assert "not on the volume" in cli("alias", "ls").stdout
    assert not cli.json("alias", "ls")[0]["published"]
    assert "needs --yes" in cli("alias", "rm", "chat", code=8).stderr
    assert cli.json("alias", "rm", "chat", "--yes")["removed"]
    assert cli.json("alias", "ls") == []
    assert "no alias @chat" in cli("alias", "rm", "chat", "--yes", code=3).stderr


def test_a_removal_that_is_interrupted_is_whole(hub: Hub, cli: Cli, store_env: dict[str, str]) -> None:
    write_repo(hub.folder / "org" / "name")
    folder = Path(cli.json("seed", "org/name")["path"])
    cli("pin", "org/name")
    process = subprocess.Popen(
        ["env", "--default-signal=INT", sys.executable, "-m", "modelstore", "rm", "org/name", "--yes", "--force"],
        env=os.environ | store_env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    root, until = Path(store_env["MODELSTORE_ROOT"]), time.monotonic() + 20
    while list((root / "pins").rglob("*.json")) and time.monotonic() < until:
        time.sleep(0.01)
    assert not folder.exists(), "it is unpublished, and waits for other mounts to see that"
    process.send_signal(signal.SIGINT)
    _out, told = process.communicate(timeout=240)
    assert (process.returncode, told.count("\n")) == (130, 1)
    assert list((root / "trash").iterdir()) == []
    assert list(root.rglob(".evicting")) == []
    assert [path for path in (root / "pins").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("closed", ["<&-", "2>&-", ">&-"])
def test_a_stream_that_is_closed_changes_nothing_else(
    hub: Hub, cli: Cli, store_env: dict[str, str], closed: str
) -> None:
    write_repo(hub.folder / "org" / "name")
    for arguments, code in (("seed org/name", 0), ("rm org/name", 8), ("ls", 0), ("rm org/none --json", 3)):
        command = f"{sys.executable} -m modelstore {arguments} {closed}"
        done = subprocess.run(["bash", "-c", command], env=os.environ | store_env, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert "error" not in done.stdout
    assert [one["repo_id"] for one in cli.json("ls")] == ["org/name"]


def test_a_reader_that_reads_nothing_is_no_error(hub: Hub, cli: Cli, store_env: dict[str, str]) -> None:
    write_repo(hub.folder / "org" / "name")
    for command in ("seed org/name", "ls", "du", "verify"):
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {sys.executable} -m modelstore {command} | true"],
            env=os.environ | store_env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("line", "found"),
    [("show o", ["org/name"]), ("pin ", ["@chat", "org/name"]), ("alias rollback c", ["chat"]), ("cla", ["claims"])],
)
def test_the_shell_completes_the_models_on_the_volume(hub: Hub, cli: Cli, line: str, found: list[str]) -> None:
    write_repo(hub.folder / "org" / "name")
    cli("alias", "set", "chat", "org/name")
    words = f"modelstore {line}"
    cli.env |= {
        "_MODELSTORE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)
    }  # fmt: skip
    done = subprocess.run(
        [str(Path(sys.executable).with_name("modelstore"))], env=os.environ | cli.env, capture_output=True, text=True
    )
    assert done.stdout.split() == found, done.stderr


def test_a_size_without_a_unit_is_asked_again(cli: Cli) -> None:
    assert "write it like 150GB" in cli("gc", "--to", "150", "--yes", code=2).stderr


def test_verify_in_parts_goes_on_at_its_position_and_finds_the_damage(hub: Hub, cli: Cli) -> None:
    write_repo(hub.folder / "org" / "name", random_tensors(3, (1024, 2048)), shards=3)  # two blocks a shard
    folder = Path(cli.json("seed", "org/name")["path"])
    (whole,) = cli.json("verify")
    assert whole["ok"]
    assert whole["complete"]
    assert whole["compared_bytes"] == whole["planned_bytes"] == cli.json("ls")[0]["bytes"]
    parts = [cli.json("verify", "org/name", "--sample", "1/3")[0] for _run in range(3)]
    assert sum(part["compared_bytes"] for part in parts) == whole["compared_bytes"]
    (cut,) = cli.json("verify", "--max-seconds", "1e-9")
    assert not cut["complete"]
    assert "run it again" in cli("verify", "--max-seconds", "1e-9").stdout
    shard = next(folder.glob("*-00002-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 128
    shard.write_bytes(data)
    found = [cli.json("verify", "--sample", "33%", code=code)[0]["ok"] for code in codes_of_samples(folder, shard, cli)]
    assert found.count(False) == 1
    cli("verify", "--sample", "2/3", code=2)
    cli("verify", "--max-seconds", "0", code=2)


def codes_of_samples(folder: Path, shard: Path, cli: Cli) -> list[int]:
    """The exit codes of the next three samples: 5 for the one that holds the last block of `shard`."""
    manifest = json.loads((folder / "manifest.json").read_text())
    blocks = [(file["path"], at) for file in manifest["files"] for at in range(len(file["blocks"]) // 16)]
    last = max(index for index, (path, _at) in enumerate(blocks) if path == shard.name)
    return [5 if last % 3 == first else 0 for first in range(3)]


def test_pinned_models_stay_and_gc_evicts_the_least_recently_used(hub: Hub, cli: Cli) -> None:
    for number, name in enumerate(("a", "b", "c")):
        write_repo(hub.folder / "org" / name, random_tensors(4, seed=number))
        cli("seed", f"org/{name}", "--quiet")
    assert cli.json("pin", "org/a")["pinned"]
    cli("rm", "org/a", "--yes", code=8)
    one = cli.json("ls")[0]["bytes"]
    planned = cli.json("gc", "--to", str(2 * one + 5000), "--dry-run")
    assert [item["repo_id"] for item in planned["evicted"]] == ["org/b"]
    assert not planned["removed"]
    assert len(cli.json("ls")) == 3
    cli("gc", "--to", str(2 * one + 5000), code=8)
    done = cli.json("gc", "--to", str(2 * one + 5000), "--yes")
    assert [item["repo_id"] for item in done["evicted"]] == ["org/b"]
    assert {item["repo_id"] for item in cli.json("ls")} == {"org/a", "org/c"}
    error = cli("gc", "--to", "1KB", "--yes", code=6).stderr
    assert "pinned" in error or "in use" in error
    assert {item["repo_id"] for item in cli.json("ls")} == {"org/a"}
    assert not cli.json("unpin", "org/a")["pinned"]
    assert "was not pinned" in cli("unpin", "org/a").stdout
    cli("rm", "org/a", "--yes")
    assert cli.json("gc", "--dry-run")["collected"] == []
    cli("gc", "--grace-s", "1", code=2)
    cli("gc", "--to", "much", code=2)
    cli("pin", "org/a", code=3)
