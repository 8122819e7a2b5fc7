"""Each pipeline of diffusers is served as its own signature has it, and draws what diffusers draws."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

import diffusers

from handler.engines import diffusion
from handler.engines.diffusion import DiffusionEngine, class_of
from handler.worker import Worker
from modelstore import ModelStore
from modelstore.reference import parse_reference
from modelstore.warmstart import begin
from tests.support.hub import Hub
from tests.support.pipelines import PIPELINES, write

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of a scheduler of diffusers

SIZE = {"width": 32, "height": 32}
GREY = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
# What a job sends to each, and what diffusers is called with
JOBS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd_with_checker": (SIZE, SIZE),
    "sd_image_to_image": ({"image": "GREY", "strength": 0.8}, {"image": GREY, "strength": 0.8}),
    "sd_inpaint": (
        {"image": "GREY", "mask_image": "GREY"} | SIZE,
        {"image": GREY, "mask_image": GREY.convert("L")} | SIZE,
    ),
    "latent_consistency": (SIZE, SIZE),
    "sdxl": (SIZE | {"prompt_2": "c d", "guidance_rescale": 0.5}, SIZE | {"prompt_2": "c d", "guidance_rescale": 0.5}),
    "sd3": (SIZE | {"max_sequence_length": 20}, SIZE | {"max_sequence_length": 20}),
    "flux": (
        {"width": 16, "height": 16, "true_cfg_scale": 2.0, "negative_prompt": "z"},
        {"width": 16, "height": 16, "true_cfg_scale": 2.0, "negative_prompt": "z"},
    ),
    "pixart": (SIZE | {"use_resolution_binning": False}, SIZE | {"use_resolution_binning": False}),
    "wan": (
        {"width": 16, "height": 16, "num_frames": 5},
        {"width": 16, "height": 16, "num_frames": 5, "output_type": "pil"},
    ),
    "unconditional": ({}, {}),
}
Make = Callable[[str], tuple[Worker, DiffusionEngine, Any]]


def base64_of(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.save(data, format="PNG")
    return base64.b64encode(data.getvalue()).decode()


def pictures_of(output: dict[str, Any]) -> list[Image.Image]:
    texts = [output["image_base64"], *(each["image_base64"] for each in output["images"][1:])]
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in texts]


@pytest.fixture
def serving(hub: Hub, store: ModelStore) -> Iterator[Make]:
    engines: list[DiffusionEngine] = []

    def make(name: str) -> tuple[Worker, DiffusionEngine, Any]:
        folder = hub.folder / "org" / "name"
        write(name, folder)
        settings = replace(store.settings, model=parse_reference("org/name"), dtype="float32")
        engine = begin(settings).load(DiffusionEngine.load)
        engines.append(engine)
        theirs = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        return Worker(engine, settings), engine, theirs

    yield make
    for engine in engines:
        engine.close()


def answer(worker: Worker, **data: Any) -> dict[str, Any]:
    data = {name: base64_of(GREY) if value == "GREY" else value for name, value in data.items()}
    output: dict[str, Any] = asyncio.run(worker.handle({"id": "1", "input": data}))
    return output


@pytest.mark.parametrize("name", PIPELINES)
def test_every_part_is_made_of_the_stores_tensors_in_its_dtype(hub: Hub, store: ModelStore, name: str) -> None:
    """Also one that the pipeline calls optional, as Wan its transformer."""
    folder = hub.folder / "org" / "name"
    write(name, folder)
    settings = replace(store.settings, model=parse_reference("org/name"), dtype="float16")
    with pytest.MonkeyPatch.context() as patch:
        made: list[Any] = []
        real = diffusion._part
        patch.setattr(diffusion, "_part", lambda *arguments: made.append(real(*arguments)) or made[-1])
        engine = begin(settings).load(DiffusionEngine.load)
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float16)
    modules = {part: each for part, each in theirs.components.items() if isinstance(each, torch.nn.Module)}
    assert modules
    for part, their in modules.items():
        ours = getattr(engine._pipeline, part)
        assert any(ours is each for each in made), f"diffusers has loaded {part} by itself"
        for (key, tensor), (their_key, their_tensor) in zip(
            ours.state_dict().items(), their.state_dict().items(), strict=True
        ):
            assert (key, tensor.dtype) == (their_key, their_tensor.dtype)
            assert torch.equal(tensor, their_tensor), (part, key)
    engine.close()


def test_every_pipeline_has_a_job() -> None:
    assert JOBS.keys() == PIPELINES.keys()


@pytest.mark.parametrize("name", PIPELINES)
def test_it_draws_what_diffusers_draws(serving: Make, name: str) -> None:
    worker, engine, theirs = serving(name)
    job, arguments = JOBS[name]
    common: dict[str, Any] = {"num_inference_steps": 2}
    if "prompt" in engine.call.defaults:
        common["prompt"] = "a b"
    output = answer(worker, **common, **job, seed=7)
    assert "error" not in output, output
    made = theirs(**common, **arguments, generator=torch.Generator().manual_seed(7))
    expected = made.frames[0] if name == "wan" else made.images
    ours = pictures_of(output)
    assert len(ours) == len(expected) == (5 if name == "wan" else 1)
    for mine, their in zip(ours, expected, strict=True):
        assert mine.tobytes() == their.tobytes()
    if name == "sd_with_checker":
        assert made.nsfw_content_detected == [True]
        assert output["nsfw_content_detected"] == [True]
        assert not any(ours[0].tobytes()), "it is black, and says so"


@pytest.mark.parametrize("name", PIPELINES)
def test_what_it_does_not_take_is_refused_by_its_name(serving: Make, name: str) -> None:
    worker, engine, _theirs = serving(name)
    fields = {
        "scheduler": "K_EULER", "refiner_inference_steps": 5, "strength": 0.3, "image": base64_of(GREY),
        "mask_image": base64_of(GREY), "image_url": "http://127.0.0.1:9/x.png", "prompt": "a", "width": 32,
        "true_cfg_scale": 2.0, "num_frames": 5, "latents": [1.0], "callback_on_step_end": 7, "generator": 7,
        "cross_attention_kwargs": {"scale": 1}, "prompt_embeds": [1.0], "output_type": "latent", "steps": 7,
    }  # fmt: skip
    good = {"prompt": "a"} if "prompt" in engine.call.defaults else {}
    for field, value in fields.items():
        if field in engine.call.fields:
            continue
        output = answer(worker, **(good | {field: value}))
        assert output["code"] == "INVALID_INPUT"
        assert field in output["error"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"strength": "x"}, "strength must be a number"),
        ({"strength": 1e9}, "strength must be a number of at most"),
        ({"strength": 7.0}, "StableDiffusionImg2ImgPipeline does not take this job"),
        ({"image": "x"}, "image must be a picture in base64"),
        ({"image": base64.b64encode(b"no picture").decode()}, "image must be a picture"),
        ({"image": 7}, "image must be a picture"),
        ({"num_images": 2, "num_images_per_prompt": 2}, "are the same"),
        ({"num_images_per_prompt": 99}, "num_images_per_prompt must be"),
        ({"image_format": "tiff"}, "image_format must be png, jpeg or webp"),
        ({"clip_skip": {"a": 1}}, "clip_skip must be a number, a text"),
        ({"clip_skip": 99}, "StableDiffusionImg2ImgPipeline does not take this job"),
        ({"strength": 0}, "StableDiffusionImg2ImgPipeline does not take this job"),
        ({"sigmas": []}, "sigmas must have 1 to 150 entries, not 0"),
        ({"ip_adapter_image": "x"}, "ip_adapter_image is not served"),
    ],
)
def test_a_bad_value_names_its_field(serving: Make, more: dict[str, Any], words: str) -> None:
    worker, _engine, _theirs = serving("sd_image_to_image")
    output = answer(worker, **({"prompt": "a", "image": base64_of(GREY), "num_inference_steps": 2} | more))
    assert words in output["error"]


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("stable_diffusion", "StableDiffusionSafetyChecker"),
        ("deepfloyd_if", "IFSafetyChecker"),
        ("deepfloyd_if", "IFWatermarker"),
        ("kolors", "ChatGLMModel"),
        ("kolors", "ChatGLMTokenizer"),
        ("latent_diffusion", "LDMBertModel"),
        ("transformers", "CLIPTextModel"),
        ("diffusers", "AutoencoderKL"),
    ],
)
def test_parts_are_classes_as_diffusers_finds_them(library: str, name: str) -> None:
    assert class_of(library, name).__name__ == name


@pytest.mark.parametrize(("library", "name"), [("os", "system"), ("pipeline_utils", "X"), ("stable_diffusion", "X")])
def test_no_other_class_is_a_part(library: str, name: str) -> None:
    assert class_of(library, name) is None


def test_pictures_come_as_people_send_them(serving: Make) -> None:
    """Large, in lines, as an address of its own data, and turned as a telephone turns them."""
    worker, _engine, _theirs = serving("sd_image_to_image")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (640, 640, 3), np.uint8))
    large = base64_of(noise)
    assert len(large) > 1_200_000
    job = {"prompt": "a", "num_inference_steps": 2, "strength": 0.5, "seed": 1}
    assert "error" not in answer(worker, image=large, **job)
    plain = answer(worker, image=base64_of(GREY), **job)["image_base64"]
    lines = base64.encodebytes(base64.b64decode(base64_of(GREY))).decode()
    for text in (lines, f"data:image/png;base64,\n{lines}", f"DATA:image/png;base64,{base64_of(GREY).rstrip('=')}"):
        assert answer(worker, image=text, **job)["image_base64"] == plain
    assert "opens no addresses" in answer(worker, image="https://example.com/a.png", **job)["error"]
    data = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    GREY.resize((64, 32)).save(data, format="JPEG", exif=exif)
    turned = answer(worker, image=base64.b64encode(data.getvalue()).decode(), **job)
    assert pictures_of(turned)[0].size == (32, 64)


def test_an_argument_that_is_a_pair_comes_as_a_list(serving: Make) -> None:
    worker, _engine, theirs = serving("sdxl")
    more = {"original_size": [64, 64], "crops_coords_top_left": [8, 0]}
    output = answer(worker, prompt="a", num_inference_steps=2, seed=7, **SIZE, **more)
    made = theirs(
        prompt="a", num_inference_steps=2, original_size=(64, 64), crops_coords_top_left=(8, 0),
        generator=torch.Generator().manual_seed(7), **SIZE,
    )  # fmt: skip
    assert pictures_of(output)[0].tobytes() == made.images[0].tobytes()
    cut = answer(worker, prompt="a", prompt_2=[" ".join("abcdefghij" * 3)], num_inference_steps=1, **SIZE)
    assert [(each["field"], each["tokenizer"]) for each in cut["truncated"]] == [("prompt_2", "tokenizer_2")]


def test_a_repo_with_the_earlier_name_of_a_class_starts(serving: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    write_it = write

    def write_earlier(name: str, folder: Path) -> None:
        write_it(name, folder)
        index = json.loads((folder / "model_index.json").read_text())
        index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
        (folder / "model_index.json").write_text(json.dumps(index))

    monkeypatch.setitem(globals(), "write", write_earlier)
    worker, _engine, _theirs = serving("sd_with_checker")
    assert answer(worker, prompt="a", num_inference_steps=1, **SIZE)["nsfw_content_detected"] == [True]


def test_a_picture_with_too_many_pixels_is_refused_before_it_is_decoded(serving: Make) -> None:
    """Also if it is hidden in a format that Pillow decodes at once."""
    worker, engine, _theirs = serving("sd_image_to_image")
    data = io.BytesIO()
    Image.new("RGB", (64, 64)).save(data, format="ICO")
    icon = base64.b64encode(data.getvalue()).decode()
    assert "image must be a picture in base64" in answer(worker, prompt="a", image=icon)["error"]
    small = Worker(engine, replace(worker._settings, max_pixels=1000))
    assert "must have at most 1000 pixels, not 1024" in answer(small, prompt="a", image=base64_of(GREY))["error"]


@pytest.mark.parametrize(("image_format", "magic"), [("png", b"\x89PNG"), ("jpg", b"\xff\xd8"), ("WEBP", b"RIFF")])
def test_a_picture_has_the_format_that_is_asked_for(serving: Make, image_format: str, magic: bytes) -> None:
    worker, _engine, _theirs = serving("latent_consistency")
    output = answer(worker, prompt="a", num_inference_steps=1, image_format=image_format, num_images=2, **SIZE)
    assert base64.b64decode(output["image_base64"]).startswith(magic)
    assert base64.b64decode(output["images"][1]["image_base64"]).startswith(magic)
    assert "image_base64" not in output["images"][0], "each picture is there once"
    assert output["images"][1]["seed"] == output["images"][0]["seed"] + 1 == output["seed"] + 1


def test_a_prompt_that_an_encoder_cuts_is_flagged(serving: Make) -> None:
    worker, _engine, _theirs = serving("sd3")
    long = " ".join("abcdefghij" * 3)
    job = {"num_inference_steps": 1, "max_sequence_length": 20} | SIZE
    assert answer(worker, prompt=long, **job)["truncated"] == [
        {"field": "prompt", "tokenizer": "tokenizer", "tokens": 32, "read": 16},
        {"field": "prompt", "tokenizer": "tokenizer_2", "tokens": 32, "read": 16},
        {"field": "prompt", "tokenizer": "tokenizer_3", "tokens": 31, "read": 20},
    ]
    assert "truncated" not in answer(worker, prompt="a b", **job)


def test_the_pipelines_own_steps_are_the_default_if_they_are_few(serving: Make) -> None:
    worker, _engine, _theirs = serving("latent_consistency")
    assert answer(worker, prompt="a", **SIZE)["parameters"]["num_inference_steps"] == 4


def test_pictures_go_into_a_bucket_if_there_is_one(serving: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.request

    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        for variable, value in (
            ("BUCKET_ENDPOINT_URL", address), ("BUCKET_ACCESS_KEY_ID", "id"), ("BUCKET_SECRET_ACCESS_KEY", "secret"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):  # fmt: skip
            monkeypatch.setenv(variable, value)
        import time

        import boto3

        client = boto3.client("s3", endpoint_url=address, aws_access_key_id="id", aws_secret_access_key="secret")
        client.create_bucket(Bucket=time.strftime("%m-%y"))
        worker, engine, _theirs = serving("latent_consistency")
        job = {"prompt": "a", "num_inference_steps": 1, "num_images": 2, "seed": 3} | SIZE
        plain = answer(worker, **job)
        engine._settings = replace(engine._settings, bucket_endpoint=address)
        output = answer(worker, **job)
        assert "image_base64" not in str(output)
        assert [each["seed"] for each in output["images"]] == [3, 4]
        for url, text in (
            (output["image_url"], plain["image_base64"]),
            (output["images"][1]["image_url"], plain["images"][1]["image_base64"]),
        ):
            assert urllib.request.urlopen(url, timeout=10).read() == base64.b64decode(text)
        body = {"prompt": "a", "num_inference_steps": 1, "seed": 3, "size": "32x32"}
        for more, name in (
            ({}, "url"),
            ({"response_format": "url"}, "url"),
            ({"response_format": "b64_json"}, "b64_json"),
        ):
            route = {"openai_route": "/v1/images/generations", "openai_input": body | more}
            assert set(answer(worker, **route)["data"][0]) == {name, "seed"}
            streamed: Any = answer(worker, **(route | {"openai_input": body | more | {"stream": True}}))
            assert f'"{name if more else "b64_json"}": ' in streamed[0], "OpenAI's event has a picture alone"
        monkeypatch.delenv("BUCKET_ACCESS_KEY_ID")
        assert "BUCKET_ACCESS_KEY_ID" in answer(worker, **job)["error"]
    finally:
        server.stop()
