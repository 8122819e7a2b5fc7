"""One small job before the first: whether there is one, and that it cannot fail a start."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from handler.answers import TextDelta
from handler.engines import ENGINES
from handler.engines.text import TextEngine
from handler.jobs import JobContext, TextRequest
from handler.warm_up import warm_up
from modelstore import ModelStore
from modelstore.reference import parse_reference
from modelstore.settings import Settings
from modelstore.timeline import Timeline
from modelstore.warmstart import begin
from tests.support.hub import Hub
from tests.support.models import write_model


@pytest.fixture
def settings(hub: Hub, store: ModelStore) -> Settings:
    write_model(hub.folder / "org" / "name", seed=1)
    return replace(store.settings, model=parse_reference("org/name"))


@pytest.fixture
def engine(settings: Settings) -> Iterator[TextEngine]:
    engine = begin(settings).load(TextEngine.load)
    yield engine
    engine.close()


def on_a_gpu(engine: TextEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    status: Callable[[], dict[str, Any]] = engine.status
    monkeypatch.setattr(engine, "status", lambda: status() | {"memory": {"device": "cuda:0"}})


@pytest.mark.parametrize(
    ("setting", "gpu", "expected"),
    [(None, False, False), (None, True, True), (True, False, True), (False, True, False)],
)
def test_a_model_is_warmed_up_on_a_gpu_or_as_it_is_set(
    setting: bool | None,
    gpu: bool,
    expected: bool,
    engine: TextEngine,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[TextRequest] = []
    real = engine.generate

    def generate(request: TextRequest) -> AsyncIterator[TextDelta]:
        asked.append(request)
        return real(request)

    monkeypatch.setattr(engine, "generate", generate)
    if gpu:
        on_a_gpu(engine, monkeypatch)
    timeline = Timeline()
    warm_up(engine, replace(settings, warm_up=setting), timeline)
    assert [request.sampling.max_tokens for request in asked] == [2] * expected, "a first token, and one after it"
    assert [span.name for span in timeline.spans] == ["warmup"] * expected
    assert not [each for each in caplog.records if each.levelname == "WARNING"]


def test_a_picture_of_the_warm_up_goes_into_no_bucket(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts: list[JobContext] = []

    class Engine:
        model = "org/name"
        broken = ""
        beside_the_prompt = 1000

        def status(self) -> dict[str, Any]:
            return {"engine": "diffusion", "memory": {"device": "cuda"}}

        async def answer(self, _data: Any, job: JobContext) -> Any:
            contexts.append(job)
            raise LookupError("no picture")

    warm_up(Engine(), settings, Timeline())  # type: ignore[arg-type]
    assert [job.may_upload for job in contexts] == [False]


def test_a_job_that_fails_leaves_the_start_alone(
    engine: TextEngine, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def generate(_request: TextRequest) -> Any:
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(engine, "generate", generate)
    timeline = Timeline()
    warm_up(engine, replace(settings, warm_up=True), timeline)
    assert [span.name for span in timeline.spans] == ["warmup"]
    assert "could not be warmed up" in caplog.text
    assert "no kernel image" in caplog.text


@pytest.mark.parametrize("name", ["diffusion", "embedding", "text"])
def test_each_engine_that_runs_here_has_a_job_of_one_step(name: Any) -> None:
    assert ENGINES[name].warm_up_jobs
    for job in ENGINES[name].warm_up_jobs:
        assert job.get("max_tokens", 1) <= 2
        assert job.get("num_inference_steps", 1) == 1
