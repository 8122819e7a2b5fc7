"""torch.compile as a setting: the same answers, the code from worker to worker, and no start that it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from handler import compilation
from handler.answers import Answer
from handler.compilation import compile_model
from handler.engines.text import TextEngine
from handler.jobs import JobContext
from modelstore import ModelStore
from modelstore.errors import Refused
from modelstore.reference import parse_reference
from modelstore.settings import Settings
from modelstore.timeline import Timeline
from modelstore.volume import engine_caches
from modelstore.volume.layout import Layout, SnapshotKey
from modelstore.warmstart import begin
from tests.handler.test_diffusion import write_pipeline
from tests.support.hub import Hub
from tests.support.models import write_model
from tests.support.workers import Engine

KEY = SnapshotKey("org/name", "c" * 40, "float16")


class Compiling(Engine):
    """Answers in one way as it is, and in another way if it is compiled; notes each change of that."""

    def __init__(self, compiled: Answer | str | BaseException, *, device: str = "cuda:0") -> None:
        super().__init__()
        self.compiled = compiled
        self.device = device
        self.changes: list[str] = []

    def compile(self) -> None:
        self.changes.append("compile")
        Path(self.folder()).mkdir(parents=True)
        (Path(self.folder()) / "kernel.so").write_bytes(b"code")

    def run_uncompiled(self) -> None:
        self.changes.append("as it is")

    def folder(self) -> str:
        return SET["TORCHINDUCTOR_CACHE_DIR"]

    def status(self) -> dict[str, Any]:
        return super().status() | {"memory": {"device": self.device}}

    async def answer(self, data: Mapping[str, Any], job: JobContext) -> Answer:
        if isinstance(self.compiled, BaseException):
            raise self.compiled
        self.pieces = (replace(self.pieces[0], text=str(self.compiled)), *self.pieces[1:])
        return await super().answer(data, job)


SET: dict[str, str] = {}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    (tmp_path / "store").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(compilation, "set_variables", SET.update)
    monkeypatch.setattr(compilation, "find_spec", lambda _name: True)
    monkeypatch.setattr("handler.engines.compiled_code.gpus", lambda _visible: ["NVIDIA H100, 9.0, driver 570"])
    return Settings(root=tmp_path / "store", compile=True, engine_cache="write", worker_id="w1")


def start(engine: Engine, settings: Settings) -> Timeline:
    """A worker's start up to its first job; the process ends, so its folder of code is free again."""
    timeline, ends = Timeline(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atexit.register", ends.append)
        compile_model(engine, settings, timeline)
    for end in ends:
        end()
    return timeline


def caches(settings: Settings) -> int:
    return len(engine_caches.records(Layout(settings.root), KEY))


def test_the_second_worker_runs_the_code_of_the_first(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "handler.engines")
    assert [span.name for span in start(Compiling("Paris"), settings).spans] == ["compile"]
    assert caches(settings) == 1
    engine = Compiling("Paris")
    engine.compile = lambda: engine.changes.append((Path(engine.folder()) / "kernel.so").read_text())  # type: ignore[method-assign]
    start(engine, settings)
    assert engine.changes == ["code"]
    assert [record.message.split()[0] for record in caplog.records] == ["no", "published:", "restored"]


def test_restored_code_that_answers_otherwise_is_not_used(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    start(Compiling("Paris"), settings)
    engine = Compiling("")
    engine.compile = lambda: engine.changes.append("compile")  # type: ignore[method-assign]
    start(engine, settings)
    assert engine.changes == ["compile", "as it is"]
    assert caches(settings) == 0
    assert "answers otherwise" in caplog.text
    start(Compiling("Paris"), settings)
    assert caches(settings) == 1, "the next worker compiles for itself"


def test_a_model_that_cannot_be_compiled_runs_as_it_is(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    engine = Compiling(RuntimeError("BackendCompilerFailed: no kernel for this"))
    start(engine, settings)
    assert engine.changes == ["compile", "as it is"]
    assert "no kernel for this" in caplog.text
    assert caches(settings) == 0


def test_nothing_is_compiled_unless_it_is_asked_for(settings: Settings) -> None:
    engine = Compiling("Paris")
    assert not start(engine, replace(settings, compile=False)).spans
    assert not engine.changes


@pytest.mark.parametrize(
    ("engine", "lacks", "phrase"),
    [
        (Compiling("Paris", device="cpu"), "which", "install g++"),
        (Compiling("Paris"), "find_spec", "install it"),
        (Engine(), "", "does not compile"),
    ],
)
def test_an_obstacle_is_named_and_the_start_goes_on(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    engine: Engine,
    lacks: str,
    phrase: str,
) -> None:
    if lacks:
        monkeypatch.setattr(*((shutil, lacks) if lacks == "which" else (compilation, lacks)), lambda _name: None)
    assert not start(engine, settings).spans
    assert phrase in caplog.text
    assert not getattr(engine, "changes", [])


def test_a_compiled_model_is_exchanged_by_a_new_worker(hub: Hub, store: ModelStore) -> None:
    """It would be compiled anew while jobs wait."""
    write_model(hub.folder / "org" / "name", seed=1)
    settings = replace(store.settings, model=parse_reference("org/name"), compile=True)
    engine = begin(settings).load(TextEngine.load)
    with pytest.raises(Refused, match="restart the worker"):
        engine.swap("org/name")
    engine.close()


def test_a_text_model_is_compiled_as_a_whole_and_runs_as_it_is_again(hub: Hub, store: ModelStore) -> None:
    write_model(hub.folder / "org" / "name", seed=1)
    engine = begin(replace(store.settings, model=parse_reference("org/name"))).load(TextEngine.load)
    model = engine._loaded.model
    engine.compile()
    assert model._compiled_call_impl is not None
    engine.run_uncompiled()
    assert model._compiled_call_impl is None
    engine.close()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_torch_compiles_a_pipeline_and_a_second_worker_gets_the_code(
    hub: Hub, store_env: dict[str, str], tmp_path: Path
) -> None:
    write_pipeline(hub.folder / "org" / "name")
    (tmp_path / "tmp").mkdir()
    env = os.environ | store_env | {"MODEL_ID": "org/name", "TMPDIR": str(tmp_path / "tmp")}
    env |= {"MODELSTORE_COMPILE": "1", "MODELSTORE_ENGINE_CACHE": "1"}
    job = {"input": {"prompt": "a", "num_inference_steps": 2, "seed": 3}}

    def started() -> tuple[str, str, float]:
        """The picture of a job, the log, and the seconds that compiling took."""
        done = subprocess.run(
            [sys.executable, "-m", "handler", "--test_input", json.dumps(job)],
            env=env, capture_output=True, text=True, check=True, timeout=280,
        )  # fmt: skip
        log = done.stdout + done.stderr
        timeline = json.loads(next(line for line in log.splitlines() if line.startswith('{"timeline"')))["timeline"]
        compiling_s = sum(span["end"] - span["start"] for span in timeline["spans"] if span["name"] == "compile")
        picture = re.search(r"'image_base64': '([^']+)'", log)
        assert picture is not None, log
        return picture[1], log, compiling_s

    first, first_log, first_s = started()
    second, second_log, second_s = started()
    assert "published: " in first_log
    assert "restored " in second_log
    assert "runs as it is" not in first_log + second_log
    assert second_s < 0.8 * first_s
    assert first == second
