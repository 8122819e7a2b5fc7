"""Fixtures shared by all tests: a hub over a folder, and stores that ask it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelstore.errors import HubUnavailable
from modelstore.settings import Settings
from modelstore.store import ModelStore
from tests.support.hub import Hub, running_hub
from tests.support.runpod_api import ENDPOINT, KEY, RunPod

MakeStore = Callable[..., ModelStore]
OnMount = Callable[..., subprocess.CompletedProcess[str]]

MAY_MOUNT = os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
needs_mount = pytest.mark.skipif(not MAY_MOUNT, reason="needs root and mount namespaces")

# No test may find a token, a cache or a setting of whoever runs it; processes that tests start inherit this.
for name in [name for name in os.environ if name.startswith(("HF_", "MODELSTORE_", "MODEL_", "RUNPOD_"))]:
    del os.environ[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM's two minutes go first: begun among the last, they would keep one process busy while the other has ended.

    Tests of whole processes are slow, which `scripts/test --quick` leaves out.
    """
    items.sort(key=lambda item: item.path.name != "test_vllm.py")
    for item in items:
        if item.path.parent.name == "system":
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of the test's own, without a saved token."""
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf-home")))


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all tests share one mount, an eviction is seen at once; `test_moosefs.py` waits as a fleet must."""
    monkeypatch.setattr("modelstore.volume.evict.SETTLE_S", 0.0)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub over `tmp_path/hub`; put repos there with `write_repo(hub.folder / "org/name")`. Stores are on `volume/`."""
    folder = tmp_path / "hub"
    folder.mkdir()
    (tmp_path / "volume").mkdir(exist_ok=True)
    with running_hub(folder) as running:
        yield running


@pytest.fixture
def make_store(tmp_path: Path, hub: Hub) -> MakeStore:
    """Stores on one volume that ask `hub`; keyword arguments are settings, and `sleep`."""

    def make(*, sleep: Callable[[float], None] = time.sleep, **changes: Any) -> ModelStore:
        settings = {"root": tmp_path / "volume" / "modelstore", "hf_endpoint": hub.url, **changes}
        return ModelStore(settings["root"], settings=Settings(**settings), sleep=sleep)

    return make


def leave_unfinished(hub: Hub, store: ModelStore) -> None:
    """Fill org/name, which has two shards, from a hub that lacks the second one; afterwards the hub has it."""
    hub.faults.status["model-00002-of-00002.safetensors"] = [(404, {})] * 1000
    with pytest.raises(HubUnavailable):
        store.ensure("org/name")
    hub.faults.status.clear()


@pytest.fixture
def store(make_store: MakeStore) -> ModelStore:
    return make_store()


@pytest.fixture
def store_env(tmp_path: Path, hub: Hub) -> dict[str, str]:
    """The environment of a process that uses the same volume and hub as `store`."""
    return {"MODELSTORE_ROOT": str(tmp_path / "volume" / "modelstore"), "HF_ENDPOINT": hub.url}


@pytest.fixture
def on_mount(tmp_path: Path, store_env: dict[str, str]) -> OnMount:
    """Run a command after mounting something on the volume's folder; the mount ends with the command."""

    def run(mount: str, *command: str, then: str = "true", timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        volume = tmp_path / "volume"
        volume.mkdir(exist_ok=True)
        script = f'cd / && {mount} && "$@"; code=$?; cd "$VOLUME" && {then}; exit $code'
        return subprocess.run(
            ["unshare", "-m", "sh", "-c", script, "sh", *command],
            env=os.environ | store_env | {"VOLUME": str(volume)},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run


class Cli:
    """The command in a process of its own."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env

    def __call__(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "modelstore", *arguments],
            env=os.environ | self.env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def json(self, *arguments: str, code: int = 0) -> Any:
        return json.loads(self(*arguments, "--json", code=code).stdout)


@pytest.fixture
def cli(store_env: dict[str, str]) -> Cli:
    return Cli(store_env)


@pytest.fixture
def endpoint(runpod: RunPod, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The SDK's client of the stand-in that a module runs as `runpod`."""
    import runpod as sdk

    monkeypatch.setattr(sdk, "endpoint_url_base", runpod.url)
    return sdk.Endpoint(ENDPOINT, api_key=KEY)


@pytest.fixture
def client(runpod: RunPod) -> Iterator[Any]:
    """OpenAI's client of the same."""
    from openai import OpenAI

    with OpenAI(base_url=f"{runpod.url}/{ENDPOINT}/openai/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def fake_cuda(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU that is memory of the host, behind the driver's interface; no violation of it passes the test."""
    from tests.support import fake_cuda

    if reason := fake_cuda.why_not():
        pytest.skip(reason)
    library = fake_cuda.compiled(tmp_path_factory.getbasetemp())
    own = tmp_path / library.name
    shutil.copy(library, own)  # each copy has counters of its own
    fake = fake_cuda.FakeCuda(own)
    fake_cuda.use_in(monkeypatch, fake)
    yield fake
    fake.check()


@pytest.fixture
def one_gpu(fake_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As `fake_cuda`, and a start finds that GPU; all weights go through a ring that holds a part of them."""
    monkeypatch.setattr("modelstore.load.memory.free_gpu_bytes", lambda _visible: [1 << 40])
    monkeypatch.setattr("modelstore.warmstart.RING_BYTES", 1)
    monkeypatch.setattr("modelstore.warmstart._KEPT_BYTES", 0)
    return fake_cuda
