"""Images by a tiny random pipeline of real parts: the pictures of diffusers itself, step by step, and cut short."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from handler.errors import JobError
from handler.images import Images, PipelineCall, Step, parse_image
from handler.jobs import Limits
from handler.worker import Worker
from modelstore import ModelStore, load_tensors
from modelstore.errors import BadSafetensors, NotServable, NoWeights, Refused
from modelstore.reference import parse_reference
from modelstore.settings import Settings
from modelstore.volume.verify import verify_snapshot
from modelstore.warmstart import begin
from tests.support.fake_cuda import FakeCuda
from tests.support.hub import Hub
from tests.support.workers import RecordedChannel

diffusers = pytest.importorskip("diffusers")

from handler.engines.diffusion import arguments_of

LIMITS = Limits.of(Settings(root=Path("/")))
JOB = {"prompt": "a b", "num_inference_steps": 3, "seed": 7, "guidance_scale": 5.0, "width": 32, "height": 32}


STABLE_DIFFUSION = PipelineCall("StableDiffusionPipeline", arguments_of(diffusers.StableDiffusionPipeline))


def write_pipeline(folder: Path) -> Any:
    """A Stable Diffusion of a few thousand weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    letters = [chr(code) for code in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16), layers_per_block=1, sample_size=32, in_channels=4, out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32, norm_num_groups=2, attention_head_dim=4,
        ),
        vae=diffusers.AutoencoderKL(
            block_out_channels=[8, 16], in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=2,
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.fixture
def settings(hub: Hub, store: ModelStore) -> Settings:
    write_pipeline(hub.folder / "org" / "name")
    return replace(store.settings, model=parse_reference("org/name"))


@pytest.fixture
def engine(settings: Settings) -> Iterator[Any]:
    from handler.engines.diffusion import DiffusionEngine

    engine = begin(settings).load(DiffusionEngine.load)
    yield engine
    engine.close()


def drawn(engine: Any, **more: Any) -> tuple[list[Step], Images]:
    async def run() -> list[Step | Images]:
        return [one async for one in engine.draw(parse_image(JOB | more, LIMITS, engine.call))]

    *steps, images = asyncio.run(run())
    assert isinstance(images, Images)
    return [step for step in steps if isinstance(step, Step)], images


def picture(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_it_draws_the_picture_of_diffusers(engine: Any, hub: Hub) -> None:
    steps, images = drawn(engine, negative_prompt="z")
    assert [(step.step, step.steps) for step in steps] == [(1, 3), (2, 3), (3, 3)]
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(hub.folder / "org" / "name", dtype=torch.float16)
    expected = theirs(
        "a b", negative_prompt="z", num_inference_steps=3, guidance_scale=5.0, width=32, height=32,
        generator=torch.Generator().manual_seed(7),
    ).images[0]  # fmt: skip
    ours = picture(images.images[0])
    assert ours.size == (32, 32)
    assert ours.tobytes() == expected.tobytes()
    assert len(set(ours.tobytes())) > 10, "it is not one colour"


def test_bytes_on_the_gpu_before_publishing_are_drawn_with(settings: Settings, hub: Hub, one_gpu: FakeCuda) -> None:
    from handler.engines.diffusion import DiffusionEngine

    pending = begin(settings)
    assert pending.transfer is not None
    engine = pending.load(DiffusionEngine.load)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(hub.folder / "org" / "name", dtype=torch.float16)
    for key, tensor in theirs.unet.state_dict().items():
        assert torch.equal(engine._pipeline.unet.state_dict()[key], tensor), key
    assert one_gpu.state.allocated > sum(tensor.nbytes for tensor in theirs.unet.state_dict().values())
    engine.close()
    del engine, pending
    gc.collect()
    one_gpu.check_released()


def test_weights_are_those_of_from_pretrained_bit_for_bit(engine: Any, hub: Hub) -> None:
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(hub.folder / "org" / "name", dtype=torch.float16)
    for name in ("unet", "vae", "text_encoder"):
        ours, expected = (getattr(pipeline, name).state_dict() for pipeline in (engine._pipeline, theirs))
        assert ours.keys() == expected.keys()
        for key, tensor in expected.items():
            assert ours[key].dtype == tensor.dtype, (name, key)
            assert torch.equal(ours[key], tensor), (name, key)


def test_a_seed_gives_the_same_picture_and_its_number_does_not_depend_on_the_others(engine: Any) -> None:
    _, two = drawn(engine, num_images=2)
    _, one = drawn(engine)
    assert two.images == drawn(engine, num_images=2)[1].images
    alone, first, second = (np.asarray(picture(data), int) for data in (*one.images, *two.images))
    assert abs(alone - first).mean() < 1 < abs(first - second).mean(), "but for the rounding of a batch"
    _, free = drawn(engine, seed=None)
    assert drawn(engine, seed=free.seed)[1].images == free.images


def test_tensors_of_parts_are_named_after_their_folders(settings: Settings, store: ModelStore) -> None:
    tensors = load_tensors(store.ensure("org/name"), "cpu")
    assert {name.partition("/")[0] for name in tensors} == {"unet", "vae", "text_encoder"}
    assert all(tensor.dtype in (torch.float16, torch.int64) for tensor in tensors.values())


def test_a_job_is_answered_streamed_and_refused(engine: Any, settings: Settings) -> None:
    told = RecordedChannel()
    worker = Worker(engine, settings, channel=told)
    assert worker.concurrency(1) == 1, "a picture has the whole GPU"
    output = asyncio.run(worker.handle({"id": "1", "input": JOB}))
    assert output["images"] == [{"seed": 7}], "the picture is there once"
    assert output["seed"] == 7
    assert output["model"] == "org/name"
    streamed = asyncio.run(worker.handle({"id": "2", "input": JOB | {"stream": True}}))
    assert streamed == told.chunks
    assert [chunk["step"] for chunk in streamed[:-1]] == [1, 2, 3]
    assert streamed[-1]["finished"]
    assert streamed[-1]["image_base64"] == output["image_base64"]
    for bad in (JOB | {"width": 33}, JOB | {"model": "org/other"}, {"openai_route": "/v1/completions"}):
        assert "error" in asyncio.run(worker.handle({"id": "3", "input": bad}))


def test_a_cancelled_job_ends_at_its_next_step(engine: Any, settings: Settings) -> None:
    worker = Worker(engine, settings)

    async def run() -> None:
        task = asyncio.create_task(worker.handle({"id": "1", "input": JOB | {"num_inference_steps": 150}}))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert drawn(engine)[1].images, "the next one is drawn as ever"


def test_an_abandoned_drawing_that_does_not_end_has_the_worker_replaced(
    engine: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr("handler.engines.diffusion._STUCK_S", 0.2)
    monkeypatch.setattr(engine, "_draw", lambda *_arguments: release.wait(30))
    worker = Worker(engine, replace(settings, max_job_s=0.1))

    async def run() -> None:
        assert (await worker.handle({"id": "1", "input": JOB}))["code"] == "TIMEOUT"
        assert not worker.retiring
        await asyncio.sleep(0.3)
        assert "has not ended" in engine.broken
        assert worker.retiring
        release.set()
        await asyncio.sleep(0.3)
        assert engine.broken == ""

    asyncio.run(run())


def test_a_pipeline_is_not_exchanged_in_the_process(engine: Any) -> None:
    with pytest.raises(Refused, match="restart the worker"):
        engine.swap("org/other")


def test_parts_that_are_not_served_or_not_whole_are_errors(settings: Settings, store: ModelStore) -> None:
    from handler.engines.diffusion import build_pipeline

    snapshot = store.ensure("org/name")
    tensors = load_tensors(snapshot, "cpu")
    less = {name: tensor for name, tensor in tensors.items() if name != "unet/conv_in.weight"}
    with pytest.raises(BadSafetensors, match=r"unet lack conv_in\.weight, which a UNet2DConditionModel has"):
        build_pipeline(snapshot, less, torch.device("cpu"))
    other = tensors | {"unet/conv_in.weight": torch.zeros(3)}
    with pytest.raises(BadSafetensors, match="unet are not those of a UNet2DConditionModel") as caught:
        build_pipeline(snapshot, other, torch.device("cpu"))
    assert "\n" not in str(caught.value)
    index = json.loads((snapshot.path / "model_index.json").read_text())
    for change, words in (
        ({"unet": ["os", "system"]}, "not served"),
        ({"unet": ["diffusers", "NoSuchModel"]}, "not served"),
        ({"_class_name": "NoSuchPipeline"}, "upgrade it"),
    ):
        (snapshot.path / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(NoWeights, match=words):
            build_pipeline(snapshot, dict(tensors), torch.device("cpu"))


def test_what_diffusers_leaves_out_is_left_out(
    settings: Settings, store: ModelStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Tensors of a training, and settings that are lists, as those of Krea 2 and BLIP Diffusion."""
    from handler.engines.diffusion import build_pipeline

    snapshot = store.ensure("org/name")
    tensors = load_tensors(snapshot, "cpu") | {"unet/norm_added_q.weight": torch.zeros(3)}
    index = json.loads((snapshot.path / "model_index.json").read_text())
    more = {"text_encoder_select_layers": [9, 18, 27], "mean": [0.5, 0.5], "names": ["a", "b", "c"]}
    (snapshot.path / "model_index.json").write_text(json.dumps(index | more))
    pipeline = build_pipeline(snapshot, tensors, torch.device("cpu"))
    assert pipeline.safety_checker is None
    assert "unet has no use for norm_added_q.weight" in caplog.text


@pytest.mark.parametrize(
    "settings_of_part", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "torchao"}, {"x": 1}]
)
def test_a_quantized_part_is_refused_before_its_weights_are_read(
    settings: Settings, hub: Hub, settings_of_part: dict[str, Any]
) -> None:
    from handler.engines.diffusion import DiffusionEngine

    config = hub.folder / "org" / "name" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": settings_of_part}))
    with pytest.raises(NotServable, match=r"unet is quantized .* name a repo with its weights in 16 or 32 bits"):
        begin(settings).load(DiffusionEngine.load)


def test_a_negative_prompt_that_is_empty_is_one(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines make another picture of an empty one than of none."""
    asked: list[Any] = []
    real = type(engine._pipeline).__call__

    def call(self: Any, **arguments: Any) -> Any:
        asked.append(arguments.get("negative_prompt", "none"))
        return real(self, **arguments)

    monkeypatch.setattr(type(engine._pipeline), "__call__", call)
    drawn(engine)
    drawn(engine, negative_prompt="")
    drawn(engine, negative_prompt="b")
    assert asked == ["none", "", "b"]


@pytest.mark.parametrize(
    "name",
    ["prior_num_inference_steps", "decoder_num_inference_steps", "original_inference_steps", "num_frames", "frames",
     "video_length", "base_num_frames", "prompt_max_new_tokens", "pyramid_num_inference_steps_list"],
)  # fmt: skip
def test_every_argument_that_says_how_long_it_takes_has_a_limit(name: str) -> None:
    call = PipelineCall("Pipeline", {"prompt": None, name: None})
    for value in (200_000, [2, 200_000]):
        with pytest.raises(JobError, match=f"{name} must be"):
            parse_image({"prompt": "a", name: value}, LIMITS, call)
    assert parse_image({"prompt": "a", name: 2}, LIMITS, call).others == {name: 2}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "prompt must be a string that is not empty"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "a", "negative_prompt": 7}, "negative_prompt must be a string"),
        ({"prompt": "a", "num_inference_steps": 151}, "between 1 and 150, not 151"),
        ({"prompt": "a", "width": 33}, "width must be a multiple of 8, not 33"),
        ({"prompt": "a", "width": 4096, "height": 4096}, "width times height must be at most 4194304"),
        ({"prompt": "a", "width": 4096}, "width must be at most 2048 without height, not 4096"),
        ({"prompt": "a", "height": 524288}, "height must be at most 2048 without width"),
        ({"prompt": "a", "num_images": 5}, "num_images must be an integer between 1 and 4"),
        ({"prompt": "a", "guidance_scale": -1}, "guidance_scale"),
        ({"prompt": "a", "seed": "x"}, "seed"),
    ],
)
def test_bad_input_names_the_field_and_the_limit(data: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError, match=words):
        parse_image(data, LIMITS, STABLE_DIFFUSION)


def test_modules_that_a_class_keeps_in_fp32_are_bit_for_bit(hub: Hub, store: ModelStore) -> None:
    """Wan's transformer, in a pipeline of nothing else."""
    from handler.engines.diffusion import _part

    torch.manual_seed(0)
    folder = hub.folder / "org" / "wan"
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    model.save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text('{"transformer": ["diffusers", "WanTransformer3DModel"]}')
    snapshot = store.ensure("org/wan")
    assert not snapshot.manifest.stored_unchanged
    tensors = load_tensors(snapshot, "cpu")
    ours = _part(snapshot, "transformer", "diffusers", "WanTransformer3DModel", tensors, torch.device("cpu"))
    theirs = diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float16)
    assert {tensor.dtype for tensor in theirs.state_dict().values()} == {torch.float16, torch.float32}
    for name, tensor in theirs.state_dict().items():
        assert ours.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(ours.state_dict()[name], tensor), name


def requested(hub: Hub) -> set[str]:
    return {path.rpartition("/")[2] for _server, _method, path, _ in hub.served.requests if "safetensors" in path}


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_a_pipelines_own_fp16_files_are_preferred(hub: Hub, store: ModelStore, shards: bool) -> None:
    pipeline = write_pipeline(hub.folder / "org" / "name")
    pipeline.to(torch.float16)
    size = "20KB" if shards else "10GB"
    pipeline.unet.save_pretrained(hub.folder / "org" / "name" / "unet", variant="fp16", max_shard_size=size)
    names = {path.name for path in (hub.folder / "org" / "name" / "unet").iterdir()}
    assert "diffusion_pytorch_model.safetensors" in names
    assert ("diffusion_pytorch_model.safetensors.index.fp16.json" in names) == shards
    snapshot = store.ensure("org/name")
    stored = {file.path for file in snapshot.manifest.files if file.path.startswith("unet/")}
    assert not any("fp16" in path for path in stored)
    assert any("fp16" in name for name in requested(hub))
    assert verify_snapshot(snapshot).ok
    ours = diffusers.UNet2DConditionModel.from_pretrained(snapshot.path / "unet", torch_dtype=torch.float16)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(
        hub.folder / "org" / "name" / "unet", variant="fp16", torch_dtype=torch.float16
    )
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
    hub.served.reset()
    wide = store.ensure("org/name", dtype="float32")
    assert not any("fp16" in name for name in requested(hub)), "what is not in it cannot be made from it"
    assert wide.size_bytes > snapshot.size_bytes


def test_a_repo_with_fp16_files_alone_goes_by_their_plain_names(hub: Hub, store: ModelStore) -> None:
    write_pipeline(hub.folder / "org" / "name").to(torch.float16).save_pretrained(
        hub.folder / "org" / "name", variant="fp16"
    )
    for path in (hub.folder / "org" / "name").rglob("*.safetensors"):
        if "fp16" not in path.name:
            path.unlink()
    snapshot = store.ensure("org/name", dtype="bfloat16")
    assert {file.path.rpartition("/")[2] for file in snapshot.weights} == {
        "diffusion_pytorch_model.safetensors",
        "model.safetensors",
    }
