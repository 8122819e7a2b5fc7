"""A worker gives up the Hub's token in its environment at its start, and root if another account owns the store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from modelstore import environment as environments
from tests.support.hub import Hub
from tests.support.models import write_model
from tests.support.runpod_api import FINAL, RunPod

SECRETS = {
    "HF_TOKEN": "hf_secret_one",
    "HUGGING_FACE_HUB_TOKEN": "hf_secret_two",
    "AWS_SECRET_ACCESS_KEY": "aws_secret",
    "AWS_ACCESS_KEY_ID": "aws_key",
    "RUNPOD_AI_API_KEY": "rpa_secret",
    "SOME_PASSWORD": "secret",
}


def test_children_get_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    for environment in (
        environments.without_secrets(),
        environments.server_environment(),
        environments.bare_environment(),
    ):
        assert not {*environment.values()} & {*SECRETS.values()}
    assert environments.server_environment()["VLLM_LOGGING_LEVEL"] == "INFO"


FORGETS = """
import os, sys
from modelstore.environment import forget_secrets
from modelstore.settings import Settings
kept = Settings.from_env()
forget_secrets()
assert kept.hf_token == "hf_secret_one"
assert not {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"} & {*os.environ}
if os.fork() == 0:
    print(open("/proc/self/environ").read().replace("\\0", " "))
    sys.stdout.flush()
    os._exit(0)
os.wait()
print(open("/proc/self/environ").read().replace("\\0", " "), os.environ["OTHER"])
"""


def test_a_token_is_forgotten_also_in_the_kernels_copy() -> None:
    env = {**os.environ, **SECRETS, "OTHER": "stays", "MODELSTORE_ROOT": "/nowhere"}
    for second in ("hf_secret_two", "hf_secret_one"):  # many set both to the same
        env["HUGGING_FACE_HUB_TOKEN"] = second
        done = subprocess.run([sys.executable, "-c", FORGETS], env=env, capture_output=True, text=True, check=True)
        assert "hf_secret" not in done.stdout
        assert done.stdout.count("OTHER=stays") == 2
        assert done.stdout.rstrip().endswith("stays")


def test_no_process_of_a_worker_shows_the_token(hub: Hub, store_env: dict[str, str]) -> None:
    write_model(hub.folder / "org" / "name", seed=0)
    with RunPod().running() as runpod:
        env = os.environ | store_env | runpod.worker_env("pod-1")
        env |= {"MODEL_ID": "org/name", "HF_TOKEN": "hf_secret_one"}
        command = [sys.executable, "-m", "handler"]
        process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            message = {"role": "user", "content": "hello"}
            job = runpod.submit("1", {"messages": [message], "max_tokens": 2, "temperature": 0})
            assert runpod.wait(lambda: job.status in FINAL)
            assert job.status == "COMPLETED", job.error
            family = {str(process.pid)}
            for _generation in range(3):
                for status in Path("/proc").glob("[0-9]*/stat"):
                    try:
                        parent = status.read_text().rpartition(")")[2].split()[1]
                    except OSError:
                        continue
                    if parent in family:
                        family.add(status.parent.name)
            assert len(family) >= 3, "the worker, what pings, and what renders chat templates"
            for pid in family:
                assert b"hf_secret" not in Path(f"/proc/{pid}/environ").read_bytes()
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # with the SDK's process that pings
            process.wait()


BECOMES = """
import json, os, subprocess, sys
from pathlib import Path
from handler import privileges
became = privileges.become_owner_of(Path(sys.argv[1]))
made = Path(sys.argv[1]) / "made"
made.touch()
try:
    os.setresuid(0, 0, 0)
    back = True
except PermissionError:
    back = False
fd = os.open(made, os.O_RDONLY)
seen = subprocess.run(["head", "-c", "4", f"/proc/{os.getpid()}/fd/{fd}"], capture_output=True).returncode
assert seen == 0, "a server beside the worker opens the weights like this"
print(json.dumps([became, os.getuid(), os.getgid(), os.getgroups(), made.stat().st_uid, back, os.environ["HOME"]]))
"""
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give it up")


def becomes(root: Path, monkey: str = "") -> list[object]:
    code = BECOMES.replace("became =", f"{monkey}\nbecame =")
    env = os.environ | {"TMPDIR": str(root)}
    done = subprocess.run([sys.executable, "-c", code, str(root)], env=env, capture_output=True, text=True, check=True)
    found: list[object] = json.loads(done.stdout)
    return found


@ROOT
def test_a_worker_becomes_the_owner_of_the_store_for_good(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder != Path("/tmp") and folder.is_relative_to("/tmp"):
            folder.chmod(0o755)
    store = tmp_path / "store"
    store.mkdir()
    os.chown(store, 12345, 12346)
    # This test's Python may lie in root's home, where the image's does not.
    readable = "privileges._could_work = lambda *_: True"
    became, user, group, groups, owner, back, home = becomes(store, readable)
    assert (became, user, group, groups, owner, back) == (True, 12345, 12346, [], 12345, False)
    assert Path(str(home)).name.startswith("modelstore-home-")


@ROOT
@pytest.mark.parametrize("why", ["root owns it", "it is not there", "it cannot be written", "root made a part"])
def test_a_worker_stays_root_if_it_has_to(tmp_path: Path, why: str) -> None:
    store = tmp_path / "store"
    if why != "it is not there":
        store.mkdir()
    if why == "it cannot be written":
        os.chown(store, 12345, 12345)
        store.chmod(0o555)
    if why == "root made a part":
        os.chown(store, 12345, 12345)
        (store / "models").mkdir()
    code = BECOMES.partition("made =")[0] + "print(json.dumps([became, os.getuid()]))"
    done = subprocess.run([sys.executable, "-c", code, str(store)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, 0]
