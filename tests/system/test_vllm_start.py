"""vLLM's boot: beside the read, with another worker's compiled code, mended while it goes on; and without our worker."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from modelstore.load import vllm_plugin
from modelstore.volume import engine_caches
from modelstore.volume.layout import Layout
from modelstore.volume.snapshots import Catalog
from tests.support.runpod_api import FINAL, RunPod
from tests.support.vllm import GREEDY, PYTHON, QUESTION, environment, needs_vllm, processes_of
from tests.support.workers import serving

pytestmark = pytest.mark.timeout(900)  # vLLM boots twice in one test


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A volume with SmolLM2 on it after the first start."""
    folder = tmp_path_factory.mktemp("vllm")
    (folder / "volume").mkdir()
    return environment(folder)


@needs_vllm
def test_a_worker_whose_vllm_dies_answers_with_an_error_and_is_replaced(volume: dict[str, str]) -> None:
    log: list[str] = []
    with RunPod().running() as runpod, serving(volume | runpod.env, log=log) as worker:
        assert any("compiled_code: published" in line for line in log)
        for pid in processes_of(worker.pid):
            os.kill(pid, signal.SIGKILL)
        job = runpod.submit("after", {"prompt": "a"})
        assert runpod.wait(lambda: job.status in FINAL)
        assert job.status == "FAILED"
        assert "vLLM has ended" in job.error
        assert worker.wait(30) == 0, "the SDK ends a worker that asks to be replaced"


def compiled_code(volume: dict[str, str]) -> Path:
    """The folder of the one cache that a worker has published."""
    (folder,) = Path(volume["MODELSTORE_ROOT"]).glob("engine-caches/*/*/*")
    return folder


@needs_vllm
def test_damage_and_compiled_code_that_answers_wrongly_are_mended_in_one_start(volume: dict[str, str]) -> None:
    """The last block is wrong when vLLM boots already; the code is right but for the answer that its maker had."""
    root, log = Path(volume["MODELSTORE_ROOT"]), list[str]()
    (weights,) = root.glob("models/*/*/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(data)
    layout, (key,) = Layout(root), Catalog(Layout(root)).keys()
    secret, code = volume["MODELSTORE_ENGINE_CACHE_KEY"], compiled_code(volume)
    cache = engine_caches.read(layout, key, code.name, secret)
    assert cache is not None
    assert cache.answer.startswith(" Paris")
    engine_caches.quarantine(layout, key, code.name)
    assert engine_caches.publish(layout, key, replace(cache, answer=" Rome"), "w", secret)
    with RunPod().running() as other, serving(volume | other.env, log=log):
        job = other.submit("one", {"messages": QUESTION} | GREEDY)
        assert other.wait(lambda: job.status in FINAL)
        assert job.output["generated_text"] == "The capital of France is Paris."
    lines = "".join(log)
    assert "differs from the published bytes" in lines
    assert "vLLM starts again without the compiled code: it answers ' Paris" in lines
    assert lines.count("non-default args") == 2, "a damaged block alone starts nothing again"
    assert len(list((root / "quarantine").iterdir())) == 3, "the snapshot, the code, and that which was replaced here"
    mended = engine_caches.read(layout, key, code.name, secret)
    assert mended is not None
    assert mended.answer.startswith(" Paris")


@needs_vllm
def test_arguments_that_vllm_refuses_end_the_start_with_its_words(volume: dict[str, str]) -> None:
    env = os.environ | volume | {"MODELSTORE_VLLM_ARGS": "--no-such-option"}
    done = subprocess.run(
        [sys.executable, "-m", "handler"], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("start failed: ServerFailed: vLLM has ended with status 2")
    assert "--no-such-option" in last


@needs_vllm
def test_vllms_own_command_finds_or_makes_the_snapshot(volume: dict[str, str], tmp_path: Path) -> None:
    """On an empty volume, with this package beside vLLM: our worker is not there, so the plug-in is installed."""
    vllm_plugin.lend(tmp_path / "packages")
    for name in ("xxhash", "filelock"):  # the other packages that the store needs are in vLLM's environment
        (tmp_path / "packages" / name).symlink_to(Path(str(find_spec(name).origin)).parent)  # type: ignore[union-attr]
    name, root = volume["MODEL_ID"], tmp_path / "volume" / "modelstore"
    root.parent.mkdir()
    env = os.environ | {
        "PYTHONPATH": str(tmp_path / "packages"),
        "MODELSTORE_ROOT": str(root),
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    path = tmp_path / "socket"
    serve = ["serve", name, "--load-format", "modelstore", "--max-model-len", "512", "--enforce-eager", "--uds", path]
    command = [PYTHON, "-m", "vllm.entrypoints.cli.main", *serve]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, env=env, stdout=log, stderr=log) as vllm:
        try:
            while not listens(path) and vllm.poll() is None:
                time.sleep(0.2)
            assert vllm.poll() is None, (tmp_path / "log").read_text()[-3000:]
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://vllm") as client:
                question = {"model": name, "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
                answer = client.post("/v1/completions", json=question, timeout=240).json()
            assert answer["choices"][0]["text"].startswith(" Paris")
            (reader,) = [
                pid for pid in processes_of(vllm.pid) if b"serve_weights" in Path(f"/proc/{pid}/cmdline").read_bytes()
            ]
            deadline = time.monotonic() + 60
            while "memfd" in Path(f"/proc/{reader}/maps").read_text() and time.monotonic() < deadline:
                time.sleep(0.2)
            assert "memfd" not in Path(f"/proc/{reader}/maps").read_text(), "its memory went back"
            assert list(root.glob("used/*/*/*")), "the snapshot is in use"
        finally:
            vllm.send_signal(signal.SIGTERM)
            vllm.wait(30)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{reader}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{reader}").exists()
    (start,) = root.glob("starts/*/*.json")
    record = json.loads(start.read_text())
    assert record["outcome"] == "copied"
    assert {"read", "ready"} <= {span["name"] for span in record["spans"]}


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as tried:
        return tried.connect_ex(str(path)) == 0


@pytest.mark.parametrize("python", ["", "/no/such/python"])
def test_without_vllm_the_start_names_the_setting(store_env: dict[str, str], python: str) -> None:
    env = os.environ | store_env | {"MODEL_ID": "org/name", "ENGINE": "vllm", "MODELSTORE_VLLM_PYTHON": python}
    done = subprocess.run(
        [sys.executable, "-m", "handler"], env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 3
    assert "let MODELSTORE_VLLM_PYTHON name the interpreter" in done.stderr.strip().splitlines()[-1]
