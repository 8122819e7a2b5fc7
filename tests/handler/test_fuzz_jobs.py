"""Every job gets an answer, or an error with a code on one printable line; the worker goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handler.answers import Answer
from handler.engines.multi import MultiModelEngine
from handler.engines.text import TextEngine
from handler.errors import Code
from handler.fields import FIELDS
from handler.images import ImageAnswer, ImageRequest, Images, PipelineCall, Step, parse_image
from handler.jobs import JobContext
from handler.worker import Worker
from modelstore.reference import parse_reference
from modelstore.settings import Settings
from modelstore.store import ModelStore
from modelstore.warmstart import begin
from tests.support.hub import running_hub
from tests.support.models import write_model
from tests.support.workers import Engine

NATIVE = (
    *("prompt", "prompts", "messages", "max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed"),
    *("stop", "stream", "model", "op", "negative_prompt", "num_inference_steps", "guidance_scale", "width", "height"),
    *("num_images", "openai_route", "openai_input", "route", "body", "unknown", *FIELDS),
)
ODD = st.sampled_from(
    [
        *(None, True, False, 0, -1, 2**63, 10**300, -(10**300), 1e308, float("nan"), float("inf"), -0.0),
        *("", " ", "hello world", "\ud800", "\x00\x1b[2J\u202e\n\u2028", "@chat", "org/name", "file:///etc/passwd"),
        *("../../x", "org/name@" + "a" * 40, "{{ 1 / 0 }}", "<end>", "status", "/v1/chat/completions", "/v1/models"),
        *([], {}, [[]], [{}], [None], {"role": "user"}, [{"role": "robot", "content": "hello"}], "x" * 5000),
    ]
)
JSON = st.recursive(
    ODD | st.text(max_size=20) | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ROLES = st.sampled_from(["user", "assistant", "system", "robot", "\ud800"]) | ODD
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": st.text(max_size=20) | JSON}, optional={"name": JSON}), max_size=4
)
# Half of the jobs are good but for their texts, so that these come as far as the model.
TEXTS = st.text(max_size=30) | st.sampled_from(["hi \ud83d", "\udc00", "\x00", "\u202e", "<end>", "\ufffd" * 9])
GOOD = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(1, 16),
        "temperature": st.just(0) | st.floats(0.01, 2),
        "top_p": st.floats(0, 1, exclude_min=True),
        "top_k": st.integers(0, 1_000_000),
        "repetition_penalty": st.floats(0.1, 10),
        "seed": st.integers(0, 2**63 - 1),
        "stop": TEXTS | st.lists(TEXTS, max_size=3),
        "stream": st.booleans(),
        "min_p": st.floats(0, 1),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, 300).map(str), st.floats(-100, 100), max_size=3),
        "stop_token_ids": st.lists(st.integers(0, 300), max_size=3),
        "min_tokens": st.integers(0, 3),
        "ignore_eos": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "logprobs": st.integers(0, 20) | st.booleans(),
        "echo": st.booleans(),
        "n": st.integers(1, 3),
        "continue_final_message": st.booleans(),
        "chat_template_kwargs": st.dictionaries(st.sampled_from(["enable_thinking", "messages", "x y"]), ODD),
        "tools": st.lists(st.just({"type": "function", "function": {"name": "f"}}), max_size=2),
    },
)
SOME = st.dictionaries(st.sampled_from(NATIVE), JSON, max_size=6)
PROMPTS = st.one_of(
    st.fixed_dictionaries({"prompt": TEXTS}),
    st.fixed_dictionaries({"prompts": st.lists(TEXTS, min_size=1, max_size=4)}),
    st.fixed_dictionaries({"prompt": st.lists(st.integers(0, 300), min_size=1, max_size=9)}),
    st.fixed_dictionaries({"messages": MESSAGES}),
    st.fixed_dictionaries({"messages": st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXTS}), min_size=1)}),
)
INPUTS = st.builds(lambda prompt, fields: prompt | fields, PROMPTS, GOOD | SOME) | SOME | JSON
OPENAI = st.fixed_dictionaries(
    {
        "openai_route": st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/models"]) | JSON,
        "openai_input": INPUTS,
    }
)
QUIET = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


class Draws(Engine):
    """An image engine that makes one picture."""

    call = PipelineCall(
        "Pipeline", dict.fromkeys(("prompt", "negative_prompt", "num_inference_steps", "width", "image"))
    )

    async def answer(self, data: Any, job: JobContext) -> Answer:
        request = parse_image(data, job.limits, self.call)
        return self.draw(request), ImageAnswer(request)

    async def draw(self, request: ImageRequest) -> AsyncIterator[Step | Images]:
        yield Step(1, 1)
        yield Images(("AAAA",) * request.count, 7, self.model)


@pytest.fixture(scope="module")
def text_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "hub").mkdir()
    (folder / "volume").mkdir()
    with running_hub(folder / "hub") as hub:
        write_model(hub.folder / "org" / "name", seed=0, context=128)
        root = folder / "volume" / "modelstore"
        own = Settings(root=root, hf_endpoint=hub.url, model=parse_reference("org/name"), max_tokens=16)
        own = replace(own, allowed_models=(parse_reference("org/name"),), max_prompts=4, max_prompt_characters=2000)
        ModelStore(root, settings=own).ensure("org/name")
        engine = MultiModelEngine(
            begin(own).load(TextEngine.load), own, lambda _settings: pytest.fail("nothing else is listed")
        )
        yield Worker(engine, own)
        engine.close()


def check(worker: Worker, data: Any) -> None:
    output = asyncio.run(worker.handle({"id": "1", "input": data}))
    json.dumps(output)
    error = output.get("error") if isinstance(output, dict) else None
    if error is not None:
        assert output["code"] in set(Code)
        assert error
        assert error.isprintable()
        assert len(error) <= 2500
        assert "INTERNAL" not in json.dumps(output), error
    assert not worker.retiring
    assert worker.is_idle


@QUIET
@given(data=INPUTS | OPENAI)
def test_every_text_job_is_answered(text_worker: Worker, data: Any) -> None:
    check(text_worker, data)


@QUIET
@given(data=INPUTS | OPENAI)
def test_every_image_job_is_answered(text_worker: Worker, data: Any) -> None:
    check(Worker(Draws(), text_worker._settings), data)


@QUIET
@given(job=st.dictionaries(st.sampled_from(["id", "input", "webhook"]), JSON))
def test_every_json_value_is_answered(text_worker: Worker, job: Any) -> None:
    assert "error" in asyncio.run(text_worker.handle(job)) or "prompt" in job.get("input", {})
