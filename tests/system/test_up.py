"""`scripts/deploy.py up` and `down` against the stand-in: a real seed, a real worker, and a kill after each step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.hub import Hub
from tests.support.models import write_model
from tests.support.runpod_api import RunPod
from tests.support.runpod_machines import Machines
from tests.support.runpod_owner import READ_ONLY_KEY

HERE = Path(__file__).parent.parent.parent
LIST = '[[model]]\nreference = "org/chat"\naliases = ["chat"]\n'


@pytest.fixture
def runpod(hub: Hub, tmp_path: Path) -> Iterator[RunPod]:
    write_model(hub.folder / "org" / "chat", seed=0)
    (tmp_path / "models.toml").write_text(LIST)
    machines = Machines(tmp_path / "runpod", {"HF_ENDPOINT": hub.url})
    with RunPod().running() as runpod:
        runpod.account.machines = machines
        try:
            yield runpod
        finally:
            machines.close()


def command(tmp_path: Path, *arguments: str) -> list[str]:
    usual = ["--name", "chat", "--image", "you/worker", "--data-center", "EU-RO-1"]
    return [sys.executable, "scripts/deploy.py", "up", str(tmp_path / "models.toml"), *usual, *arguments]


def deploy(runpod: RunPod, hub: Hub, arguments: list[str], **env: str) -> tuple[int, dict[str, Any], str]:
    env = os.environ | runpod.client_env | {"HF_ENDPOINT": hub.url} | env
    env.pop("AWS_ACCESS_KEY_ID", None)
    done = subprocess.run(arguments, cwd=HERE, env=env, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def down(runpod: RunPod, hub: Hub, *arguments: str) -> tuple[int, dict[str, Any], str]:
    return deploy(runpod, hub, [sys.executable, "scripts/deploy.py", "down", "chat", *arguments])


def assert_all_is_there(runpod: RunPod) -> None:
    """One of each, and no pod that costs money."""
    account = runpod.account
    (volume,) = account.volumes.values()
    (endpoint,) = account.endpoints.values()
    assert (volume["name"], volume["size"], volume["dataCenter"]) == ("chat", 10, "EU-RO-1")
    assert (endpoint["networkVolumes"], endpoint["dataCenterIds"]) == ([volume["id"]], ["EU-RO-1"])
    assert endpoint["env"]["MODEL_ID"] == "@chat"
    assert not account.pods


def test_a_list_becomes_an_endpoint_that_answers_and_nothing_is_left_of_it(
    runpod: RunPod, hub: Hub, tmp_path: Path
) -> None:
    code, record, told = deploy(runpod, hub, command(tmp_path), HF_TOKEN="hf_secret")
    assert code == 0, told
    assert record["answer"]["model"].startswith("org/chat")
    assert_all_is_there(runpod)
    assert "hf_secret" not in told + json.dumps(record)
    (worker,) = {line.split()[1].rstrip(":") for line in told.splitlines() if line.startswith("worker ")}
    assert f"worker {worker} is initializing" in told
    assert f"worker {worker}: " in told, "its log"
    print(told)
    assert "chat-seed: " in told, "the seed's log"
    seeded = runpod.account.machines.volume(record["volume"])  # type: ignore[union-attr]
    assert list(seeded.glob("modelstore/models/*/*/manifest.json"))
    requests = len(runpod.account.requests)
    code, again, told = deploy(runpod, hub, command(tmp_path))
    assert code == 0, told
    assert (again["volume"], again["endpoint"]) == (record["volume"], record["endpoint"])
    assert_all_is_there(runpod)
    made = [path for method, path, _body in runpod.account.requests[requests:] if method == "POST"]
    assert made == ["/v2/pods"], "the seed fetches nothing the second time"
    code, _, told = down(runpod, hub)
    assert (code, "repeat the command with --yes" in told) == (2, True)
    assert_all_is_there(runpod)
    code, record, _ = down(runpod, hub, "--yes", "--keep-volume")
    assert record["removed"] == ["the endpoint chat"]
    code, record, _ = down(runpod, hub, "--yes")
    assert record["removed"] == [f"the volume chat ({again['volume']}, 10 GB in EU-RO-1) and all on it"]
    account = runpod.account
    assert not account.endpoints
    assert not account.volumes
    assert down(runpod, hub, "--yes")[:2] == (0, {"removed": []})


STEPS = [
    ("POST", "/v2/network-volumes"),
    ("POST", "/v2/pods"),
    ("DELETE", "/v2/pods"),
    ("POST", "/v2/serverless"),
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: " ".join(step))
def test_a_run_that_is_killed_is_finished_by_the_next(
    runpod: RunPod, hub: Hub, tmp_path: Path, step: tuple[str, str]
) -> None:
    reached = threading.Event()

    def on_change(method: str, path: str) -> None:
        if (method, "/".join(path.split("/")[:3])) == step and not reached.is_set():
            process.kill()  # it has not got the answer
            process.wait()
            reached.set()

    runpod.account.on_change = on_change
    env = os.environ | runpod.client_env | {"HF_ENDPOINT": hub.url}
    process = subprocess.Popen(command(tmp_path), cwd=HERE, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, told = process.communicate(timeout=240)
    assert reached.is_set(), told.decode()
    assert process.returncode == -signal.SIGKILL
    code, record, told_next = deploy(runpod, hub, command(tmp_path))
    assert code == 0, told_next
    assert record["answer"]["model"].startswith("org/chat")
    assert_all_is_there(runpod)


def test_what_a_killed_run_has_made_is_removed(runpod: RunPod, hub: Hub, tmp_path: Path) -> None:
    def on_change(method: str, path: str) -> None:
        if (method, path) == ("POST", "/v2/pods"):
            process.kill()
            process.wait()

    runpod.account.on_change = on_change
    env = os.environ | runpod.client_env | {"HF_ENDPOINT": hub.url}
    process = subprocess.Popen(command(tmp_path), cwd=HERE, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    process.communicate(timeout=240)
    assert runpod.account.pods
    code, record, told = down(runpod, hub, "--yes")
    assert code == 0, told
    assert [line.split(" (")[0] for line in record["removed"]] == ["the pod chat-seed", "the volume chat"]
    assert not runpod.account.pods
    assert not runpod.account.volumes


def test_http_answers_over_http(runpod: RunPod, hub: Hub, tmp_path: Path) -> None:
    code, record, told = deploy(runpod, hub, command(tmp_path, "--http"))
    assert code == 0, told
    assert record["answer"]["output"]["model"].startswith("org/chat")
    assert record["url"].startswith("http://127.0.0.1:")
    assert_all_is_there(runpod)


def test_a_model_that_there_is_not_makes_nothing(runpod: RunPod, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(LIST + '[[model]]\nreference = "org/nope"\n')
    code, _, told = deploy(runpod, hub, command(tmp_path))
    assert (code, "org/nope" in told, "nothing was made on RunPod" in told) == (3, True, True)
    assert all(method == "GET" for method, _path, _body in runpod.account.requests)


def test_a_seed_that_fails_leaves_no_pod(runpod: RunPod, hub: Hub, tmp_path: Path) -> None:
    """The volume's folder is a file by the time that the pod starts."""
    code, _, told = deploy(runpod, hub, command(tmp_path, "--env", "X=1"), HF_TOKEN="hf_secret")
    assert code == 0, told
    write_model(hub.folder / "org" / "late", seed=1)
    (tmp_path / "models.toml").write_text(LIST + '[[model]]\nreference = "org/late"\n')
    machines = runpod.account.machines
    assert machines is not None
    (volume,) = runpod.account.volumes
    models = machines.volume(volume) / "modelstore" / "models"
    models.rename(models.with_name("moved"))
    models.write_text("in the way")
    code, _, told = deploy(runpod, hub, command(tmp_path))
    assert code == 3, told
    assert f"the list is not all on the volume {volume}" in told.splitlines()[-1]
    assert not runpod.account.pods


@pytest.mark.parametrize(
    ("arguments", "env", "code", "words"),
    [
        (["--data-center", "US-NO-1"], {}, 2, "US-NO-1 has no network volumes: choose --data-center out of EU-RO-1"),
        (["--volume", "vol9"], {}, 2, "there is no one volume vol9: without --volume one is made"),
        (["--name", "down"], {}, 2, "down is no name for an endpoint"),
        (["--env", "MODEL_DTYPE=float8"], {}, 2, "MODEL_DTYPE='float8'"),
        ([], {"RUNPOD_API_KEY": ""}, 2, "RUNPOD_API_KEY is not set"),
        ([], {"RUNPOD_API_KEY": "wrong"}, 4, "RunPod does not know this key"),
        ([], {"RUNPOD_API_KEY": READ_ONLY_KEY}, 4, "make one that has the permission"),
        ([], {"RUNPOD_API_BASE_URL": "http://127.0.0.1:9"}, 4, "RunPod cannot be reached"),
        (["--workers-max", "99", "--seed", "none"], {}, 2, "quota is 30 workers"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_is_one_line(
    runpod: RunPod, hub: Hub, tmp_path: Path, arguments: list[str], env: dict[str, str], code: int, words: str
) -> None:
    found, _, told = deploy(runpod, hub, command(tmp_path, *arguments), **env)
    assert (found, words in told.splitlines()[-1]) == (code, True), told
    assert not runpod.account.endpoints
    assert not runpod.account.pods


def test_a_name_with_another_image_and_a_volume_elsewhere_are_not_touched(
    runpod: RunPod, hub: Hub, tmp_path: Path
) -> None:
    assert deploy(runpod, hub, command(tmp_path, "--seed", "none", "--wait-s", "0"))[0] == 4
    before = json.dumps([runpod.account.endpoints, runpod.account.volumes])
    for arguments, words in (
        (["--image", "you/other"], "runs another image (you/worker): choose another --name, or change it first"),
        (["--data-center", "US-KS-2"], "is in EU-RO-1, not in US-KS-2: leave --data-center out"),
    ):
        code, _, told = deploy(runpod, hub, command(tmp_path, *arguments))
        assert (code, words in told.splitlines()[-1]) == (2, True), told
    assert json.dumps([runpod.account.endpoints, runpod.account.volumes]) == before


def test_a_volume_grows_with_the_list(runpod: RunPod, hub: Hub, tmp_path: Path) -> None:
    assert deploy(runpod, hub, command(tmp_path, "--seed", "none", "--wait-s", "0"))[0] == 4
    code, _, told = deploy(runpod, hub, command(tmp_path, "--seed", "none", "--wait-s", "0", "--volume-size", "40"))
    assert code == 4
    assert "grows from 10 to 40 GB" in told
    assert [volume["size"] for volume in runpod.account.volumes.values()] == [40]


def test_a_volume_that_another_endpoint_uses_stays(runpod: RunPod, hub: Hub, tmp_path: Path) -> None:
    assert deploy(runpod, hub, command(tmp_path, "--seed", "none", "--wait-s", "0"))[0] == 4
    (volume,) = runpod.account.volumes
    other = [sys.executable, "scripts/deploy.py", "other", "--image", "i", "--model", "org/chat", "--volume", volume]
    assert deploy(runpod, hub, other)[0] == 0
    code, _, told = down(runpod, hub, "--yes")
    assert (code, f"the endpoint other uses the volume {volume}, too" in told) == (2, True)
    assert down(runpod, hub, "--yes", "--keep-volume")[1] == {"removed": ["the endpoint chat"]}


@pytest.mark.parametrize("status", [409, 400, 500])
def test_down_waits_until_workers_have_left_the_volume(runpod: RunPod, hub: Hub, tmp_path: Path, status: int) -> None:
    assert deploy(runpod, hub, command(tmp_path, "--seed", "none", "--wait-s", "0"))[0] == 4
    runpod.account.in_use_status = status
    runpod.account.detach_s = 2.5
    code, record, told = down(runpod, hub, "--yes")
    assert (code, len(record["removed"])) == (0, 2), told
    assert told.count("is in use; this command tries again") == 1, told
    assert not runpod.account.volumes


@pytest.mark.parametrize("status", [400, 409])
def test_down_ends_at_once_if_the_volume_is_refused_for_another_reason_or_to_a_stranger(
    runpod: RunPod, hub: Hub, tmp_path: Path, status: int
) -> None:
    assert deploy(runpod, hub, command(tmp_path, "--seed", "none", "--wait-s", "0"))[0] == 4
    account = runpod.account
    if status == 409:  # nothing of this name holds it any more
        account.held_until |= dict.fromkeys(account.volumes, time.monotonic() + 1000)
        account.endpoints.clear()
    else:
        account.on_change = lambda method, _path: account.refusals.append(status) if method == "DELETE" else None
    began = time.monotonic()
    code, _, told = down(runpod, hub, "--yes")
    assert (code, "tries again" in told) == (2, False), told
    assert time.monotonic() - began < 60
    assert account.volumes


def test_a_pod_of_another_image_is_replaced_and_a_stranger_is_let_be(runpod: RunPod, hub: Hub, tmp_path: Path) -> None:
    account = runpod.account
    assert deploy(runpod, hub, command(tmp_path, "--seed", "none", "--wait-s", "0"))[0] == 4
    machines, account.machines = account.machines, None  # an image that is never pulled
    code, _, told = deploy(runpod, hub, command(tmp_path, "--seed-wait-s", "3", "--seed-cpu", "cpu3c"))
    assert (code, "goes on; run this again, or `down`" in told) == (4, True), told
    (stuck,) = account.pods.values()
    account.pods["p-own"] = {**stuck, "id": "p-own", "env": {}, "mounts": {}}  # a person's, of the same name
    stuck["image"] = "you/typo"
    account.machines = machines
    code, _, told = deploy(runpod, hub, command(tmp_path))
    assert code == 0, told
    assert list(account.pods) == ["p-own"]
    assert down(runpod, hub, "--yes")[1]["removed"][0] == "the endpoint chat"
    assert list(account.pods) == ["p-own"]


def test_one_of_two_volumes_of_a_name_is_removed_if_the_endpoint_has_it(
    runpod: RunPod, hub: Hub, tmp_path: Path
) -> None:
    assert deploy(runpod, hub, command(tmp_path, "--seed", "none", "--wait-s", "0"))[0] == 4
    (own,) = runpod.account.volumes.values()
    runpod.account.volumes["theirs"] = {**own, "id": "theirs"}
    code, _, told = down(runpod, hub, "--yes")
    assert code == 0, told
    assert list(runpod.account.volumes) == ["theirs"]
    runpod.account.volumes["more"] = {**own, "id": "more"}
    code, _, told = down(runpod, hub, "--yes")
    assert (code, "several volumes have the name chat" in told) == (2, True)


@pytest.mark.parametrize("arguments", [["--workers-min", "9"], ["--http", "--queue-delay", "3"]], ids=str)
def test_options_are_checked_before_anything_is_made(
    runpod: RunPod, hub: Hub, tmp_path: Path, arguments: list[str]
) -> None:
    code, _, told = deploy(runpod, hub, command(tmp_path, *arguments))
    assert code == 2, told
    assert not runpod.account.volumes


def test_the_models_go_over_s3_if_there_are_keys_for_it(runpod: RunPod, hub: Hub, tmp_path: Path) -> None:
    code, _, told = deploy(runpod, hub, command(tmp_path, "--seed", "s3"), MODELSTORE_ROOT=str(tmp_path / "local"))
    assert code == 3
    assert "the models go to s3://" in told
    assert "AWS_ACCESS_KEY_ID" in told, "the seed's own line"
    assert not runpod.account.pods
