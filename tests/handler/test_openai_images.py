"""OpenAI's route for pictures: the real `openai` client, over HTTP, against a tiny pipeline of real parts."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from handler.errors import JobError
from handler.images import PipelineCall
from handler.jobs import JobContext, Limits
from handler.openai_images import parse_images_job
from handler.worker import Worker
from modelstore.settings import Settings
from tests.handler.test_diffusion import JOB, engine, picture, settings  # noqa: F401 (fixtures)
from tests.handler.test_http import Served, served

openai: Any = pytest.importorskip("openai")

ROUTE = "/v1/images/generations"
CALL = PipelineCall(
    "Draws", {"prompt": None, "num_inference_steps": 30, "width": None, "height": None, "num_images_per_prompt": 1}
)
CONTEXT = JobContext("1", Limits.of(Settings(root=Path("/"))))
PROMPT = {"prompt": "a b", "size": "32x32"}
OWN = {"num_inference_steps": 3, "guidance_scale": 5.0, "seed": 7}


def parsed(body: Any) -> Any:
    return parse_images_job({"openai_route": ROUTE, "openai_input": body}, CONTEXT, CALL)


@pytest.fixture
def http(engine: Any) -> Iterator[Served]:  # noqa: F811
    with served(engine) as made:
        yield made


@pytest.fixture
def client(http: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{http.port}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_the_pictures_are_those_of_a_native_job(http: Served, client: Any) -> None:
    native = http.client.post("/generate", json=JOB | {"num_images": 2}, timeout=60).json()["output"]
    made = client.images.generate(model="org/name", prompt="a b", n=2, size="32x32", extra_body=OWN)
    assert [each.b64_json for each in made.data] == [native["image_base64"], native["images"][1]["image_base64"]]
    assert [each.seed for each in made.data] == [7, 8]
    assert (made.size, made.output_format) == ("32x32", "png")
    assert made.created > 1_700_000_000
    assert picture(made.data[0].b64_json).size == (32, 32)
    usual = client.images.generate(prompt="a b", size="auto", extra_body=OWN)
    assert usual.size == "x".join(map(str, picture(usual.data[0].b64_json).size))
    jpeg = client.images.generate(prompt="a b", output_format="jpeg", extra_body=OWN | {"width": 32, "height": 32})
    assert picture(jpeg.data[0].b64_json).format == "JPEG"


def test_a_stream_has_an_event_for_each_picture(client: Any) -> None:
    events = list(client.images.generate(prompt="a b", n=2, size="32x32", stream=True, extra_body=OWN))
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    whole = client.images.generate(prompt="a b", n=2, size="32x32", extra_body=OWN)
    assert [event.b64_json for event in events] == [each.b64_json for each in whole.data]


def test_models_are_listed(client: Any) -> None:
    assert [each.id for each in client.models.list()] == ["org/name"]
    assert client.models.retrieve("org/name").object == "model"


def test_errors_are_openais(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="org/other"):
        client.images.generate(model="org/other", prompt="a")
    with pytest.raises(openai.BadRequestError, match=re.escape("/v1/images/generations, /v1/models")):
        client.completions.create(model="org/name", prompt="a")
    with pytest.raises(openai.BadRequestError, match="BUCKET_ENDPOINT_URL"):
        client.images.generate(prompt="a", response_format="url")
    with pytest.raises(openai.BadRequestError, match="size must be two multiples of 8"):
        client.images.generate(prompt="a", size="33x32", stream=True)


def test_a_job_of_the_queue_is_answered_alike(engine: Any, settings: Settings) -> None:  # noqa: F811
    worker = Worker(engine, settings)
    job = {"id": "1", "input": {"openai_route": ROUTE, "openai_input": PROMPT | OWN}}
    output = asyncio.run(worker.handle(job))
    assert [set(each) for each in output["data"]] == [{"b64_json", "seed"}]
    listed = asyncio.run(worker.handle({"id": "2", "input": {"openai_route": "/v1/models"}}))
    assert listed["data"][0]["id"] == "org/name"


def test_a_pipeline_with_a_size_of_its_own_that_makes_one_picture_says_so() -> None:
    call = PipelineCall("Turns", {"prompt": None, "image": None})
    for body, words in (
        ({"size": "32x32"}, "size is not served here: Turns has a size of its own"),
        ({"n": 2}, "n must be 1: Turns makes one at a time"),
    ):
        with pytest.raises(JobError, match=words):
            parse_images_job({"openai_input": {"prompt": "a"} | body}, CONTEXT, call)
    assert parse_images_job({"openai_input": {"prompt": "a", "n": 1, "size": "auto"}}, CONTEXT, call) is not None


def test_fields_that_ask_for_nothing_are_taken() -> None:
    usual = {"quality": "auto", "style": "vivid", "background": "opaque", "moderation": "low", "user": "me"}
    usual |= {"output_compression": 100, "partial_images": 0, "size": "auto", "n": None, "response_format": None}
    request = parsed({"prompt": "a"} | usual)
    assert request.image == parsed({"prompt": "a"}).image
    assert request.form is None


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "prompt must be a string"),
        ({"prompt": "a", "size": "32"}, "size must be auto, or WIDTHxHEIGHT"),
        ({"prompt": "a", "size": "32x32", "width": 32}, "leave one of them out"),
        ({"prompt": "a", "size": "80000x80000"}, "width times height must be at most"),
        ({"prompt": "a", "size": ["32x32"]}, "size must be auto"),
        ({"prompt": "a", "size": "33x32"}, "size must be two multiples of 8, not 33x32"),
        ({"prompt": "a", "size": "32x33"}, "size must be two multiples of 8, not 32x33"),
        ({"prompt": "a", "n": 0}, "^n must be an integer between 1 and"),
        ({"prompt": "a", "n": 2, "num_images": 2}, "n and num_images are the same"),
        ({"prompt": "a", "n": 2, "num_images_per_prompt": 2}, "n and num_images_per_prompt are the same"),
        ({"prompt": "a", "size": "３２x３２"}, "size must be auto"),
        ({"prompt": "a", "quality": "hd"}, "num_inference_steps sets it"),
        ({"prompt": "a", "quality": {"a": 1}}, "num_inference_steps sets it"),
        ({"prompt": "a", "style": "natural"}, "in the prompt"),
        ({"prompt": "a", "background": "transparent"}, "in the prompt"),
        ({"prompt": "a", "partial_images": 2}, "only finished pictures"),
        ({"prompt": "a", "output_format": "gif"}, "^output_format must be png, jpeg or webp"),
        ({"prompt": "a", "response_format": "bytes"}, "b64_json or url"),
        ({"prompt": "a", "whatever": 1}, "whatever is not served"),
        ("a", "must be an object"),
    ],
)
def test_bad_input_names_the_field(body: Any, words: str) -> None:
    with pytest.raises(JobError, match=words):
        parsed(body)
