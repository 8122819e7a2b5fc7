"""Images with diffusers: a pipeline whose weights come through the store's own reader, part by part."""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import json
import logging
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import accelerate
import diffusers
import torch
import transformers
from diffusers.pipelines.pipeline_loading_utils import _maybe_remap_transformers_class
from PIL.Image import DecompressionBombError, Image
from PIL.Image import open as open_picture
from PIL.ImageOps import exif_transpose

from handler import openai_routes
from handler.answers import Answer, whole
from handler.bucket import with_addresses
from handler.engines import LARGE, compiled_code
from handler.engines.abandoned import Abandoned
from handler.engines.batcher import free_memory
from handler.errors import gpu_loss, invalid, is_gpu_lost, is_out_of_memory, not_served
from handler.images import (
    ImageAnswer,
    ImageFormat,
    ImageRequest,
    Images,
    PipelineCall,
    Step,
    Truncation,
    parse_image,
)
from handler.jobs import JobContext
from handler.openai_images import OpenAIImagesAnswer, parse_images_job
from modelstore.errors import BadSafetensors, NotServable, NoWeights, Refused
from modelstore.load.model import bounded_build, build_part
from modelstore.load.model_class import MESSAGE_CHARACTERS
from modelstore.load.tensors import load_tensors
from modelstore.pending_start import PendingStart
from modelstore.settings import Settings
from modelstore.timeline import Timeline
from modelstore.units import first_names, one_line
from modelstore.volume import durable
from modelstore.volume.layout import Layout
from modelstore.volume.snapshots import Catalog, Snapshot

_LIBRARIES = ("diffusers", "transformers")
_QUALITY = 95  # of JPEG and WEBP, of 100
_PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # whose size is told without the picture's decoding
_STUCK_S = 120.0  # for a step of the pipeline that goes on though its picture is not needed any more

logger = logging.getLogger(__name__)


class DiffusionEngine:
    """Draws with one pipeline, one request at a time: a picture has the whole GPU."""

    jobs_at_once = 1
    beside_the_prompt = LARGE

    def __init__(self, pipeline: Any, pending: PendingStart) -> None:
        self._pipeline = pipeline
        self._snapshot = pending.snapshot
        self._settings = pending.settings
        self._in_use = pending.in_use
        self.call = PipelineCall(type(pipeline).__name__, arguments_of(type(pipeline)))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draw")
        self._lost_gpu = ""
        self._abandoned = Abandoned()

    @classmethod
    def load(cls, pending: PendingStart, *, while_reading: Callable[[], None] | None = None) -> DiffusionEngine:
        """The engine from a start whose bytes are in flight; `while_reading` is called before the last of them."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        pending.reading.wait_small_files(pending.snapshot)
        check_parts(pending.snapshot)
        if while_reading is not None:
            while_reading()
        tensors = load_tensors(
            pending.snapshot, device, reading=pending.reading, transfer=pending.transfer, timeline=pending.timeline
        )
        with pending.timeline.span("build"):
            pipeline = build_pipeline(pending.snapshot, tensors, device)
        return cls(pipeline, pending)

    @property
    def model(self) -> str:
        return self._snapshot.repo_id

    @property
    def broken(self) -> str:
        late_s = self._abandoned.longest_s
        return self._lost_gpu or (f"a drawing has not ended for {late_s:.0f} s" if late_s > _STUCK_S else "")

    async def answer(self, data: Mapping[str, Any], job: JobContext) -> Answer:
        uploads = self._settings.bucket_endpoint is not None and job.may_upload
        responder: ImageAnswer | OpenAIImagesAnswer
        if openai_routes.is_request(data):
            wanted = parse_images_job(data, job, self.call)
            if wanted is None:
                return whole(openai_routes.models(job.models, created=job.created))
            uploads = wanted.uploads(has_bucket=uploads)
            request, responder = wanted.image, OpenAIImagesAnswer(wanted, created=job.created)
        else:
            request = parse_image(data, job.limits, self.call)
            responder = ImageAnswer(request)
        pieces = self.draw(replace(request, model=job.model_of({"model": request.model})))
        return with_addresses(pieces, job.id) if uploads else pieces, responder

    async def draw(self, request: ImageRequest) -> AsyncIterator[Step | Images]:
        """The steps as they are done, and the pictures. A caller that stops the iteration ends the drawing.

        Raises JobError for errors that the sender can mend. Requests may overlap.
        """
        if request.model not in (None, self.model, str(self._settings.model)):
            raise not_served(str(request.model), self.model, *self._settings.served_names)
        loop = asyncio.get_running_loop()
        steps: asyncio.Queue[Step | None] = asyncio.Queue()
        is_wanted = threading.Event()
        is_wanted.set()

        def step(pipeline: Any, number: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if not is_wanted.is_set():
                pipeline._interrupt = True
            count = getattr(pipeline, "num_timesteps", None) or request.steps
            loop.call_soon_threadsafe(steps.put_nowait, Step(number + 1, count))
            return values

        def ended(drawing: asyncio.Future[Images]) -> None:
            if not drawing.cancelled():
                drawing.exception()  # without a waiting job the error would never be retrieved
            steps.put_nowait(None)

        work = self._thread.submit(self._draw, request, step)
        drawing = asyncio.wrap_future(work)
        drawing.add_done_callback(ended)
        try:
            while (done := await steps.get()) is not None:
                yield done
            yield await drawing
        finally:
            is_wanted.clear()
            self._abandoned.leave(work)

    def _draw(self, request: ImageRequest, step: Any) -> Images:
        seed = secrets.randbits(32) if request.seed is None else request.seed
        arguments = self._arguments(request, seed) | {"callback_on_step_end": step}
        try:
            with torch.inference_mode():
                made = self._pipeline(**{name: each for name, each in arguments.items() if name in self.call.defaults})
        except Exception as error:
            self._lost_gpu = gpu_loss(error) or self._lost_gpu
            error.with_traceback(None)
            free_memory()
            if self._is_of_the_job(error, request):
                raise invalid(f"{self.call.name} does not take this job: {type(error).__name__}: {error}") from error
            raise
        pictures, are_frames = self._pictures(made)
        return Images(
            tuple(encoded(picture, request.image_format) for picture in pictures),
            seed,
            self.model,
            image_format=request.image_format,
            nsfw=tuple(map(bool, getattr(made, "nsfw_content_detected", None) or ())),
            truncated=tuple(truncations(self._pipeline, request, self.call)),
            are_frames=are_frames,
            size=pictures[0].size,
        )

    @staticmethod
    def _is_of_the_job(error: Exception, request: ImageRequest) -> bool:
        """Whether a pipeline fails for what it was called with: it says so, or the job has arguments that few have."""
        if is_gpu_lost(error) or is_out_of_memory(error):
            return False
        kinds: tuple[type[Exception], ...] = (ValueError, TypeError)
        if request.others or request.pictures:
            kinds += (ArithmeticError, AttributeError, LookupError, RuntimeError)
        return isinstance(error, kinds) and not isinstance(error, NotImplementedError)

    def _arguments(self, request: ImageRequest, seed: int) -> dict[str, Any]:
        """What the pipeline is called with, as far as it takes it."""
        # One generator an image: picture n of a seed is the same, however many are asked for.
        device = self._pipeline._execution_device
        generators = [torch.Generator(device).manual_seed((seed + n) % 2**63) for n in range(request.count)]
        chosen = {
            "negative_prompt": request.negative_prompt,
            "guidance_scale": request.guidance_scale,
            "width": request.width,
            "height": request.height,
        }
        return {
            "prompt": request.prompt,
            "num_inference_steps": request.steps,
            "num_images_per_prompt": request.count,
            "generator": generators if request.count > 1 else generators[0],
            "output_type": "pil",
            **{name: value for name, value in chosen.items() if value is not None},
            **request.others,
            **{name: decoded(texts, name, request.most_pixels) for name, texts in request.pictures.items()},
        }

    def _pictures(self, made: Any) -> tuple[list[Any], bool]:
        """The pictures of a pipeline's output, and whether they are the frames of a video. Raises JobError."""
        frames = getattr(made, "frames", None)
        pictures = getattr(made, "images", None) if frames is None else frames[0]
        if not isinstance(pictures, list) or not pictures or not all(isinstance(each, Image) for each in pictures):
            raise invalid(f"{self.call.name} makes no pictures: this worker serves pipelines of pictures and videos")
        return pictures, frames is not None

    def compile(self) -> None:
        for part in self._denoisers():
            part.compile_repeated_blocks()

    def run_uncompiled(self) -> None:
        for part in self._denoisers():
            compiled_code.run_uncompiled(part)

    def _denoisers(self) -> list[Any]:
        """The parts that run at each step: of those of diffusers, the ones that are built of repeated blocks."""
        parts = self._pipeline.components.values()
        return [part for part in parts if isinstance(part, diffusers.ModelMixin) and part._repeated_blocks]

    def swap(self, reference: str) -> Timeline:
        raise Refused(f"a pipeline such as {self.model} is not exchanged in the process: restart the worker instead")

    def check(self) -> None:
        Catalog(Layout(self._settings.root)).check_unchanged(self._snapshot)

    def status(self) -> dict[str, Any]:
        return {
            "engine": "diffusion",
            "model": self.model,
            "commit": self._snapshot.commit,
            "dtype": self._snapshot.dtype,
            "memory": {"weights_bytes": self._snapshot.plain_bytes, "device": str(self._pipeline.device)},
        }

    def close(self) -> None:
        self._thread.shutdown()
        self._in_use.end()
        del self._pipeline
        free_memory()


def build_pipeline(snapshot: Snapshot, tensors: dict[str, torch.Tensor], device: torch.device) -> Any:
    """The pipeline that `model_index.json` names, from tensors whose names begin with the folder of their part.

    Raises NoWeights for a pipeline or a part that this version of diffusers does not know, BadSafetensors if weights
    are missing.
    """
    index = json.loads(durable.read_file(snapshot.path / "model_index.json"))
    pipeline_class = getattr(diffusers, str(index.get("_class_name")), None)
    if pipeline_class is None:
        raise NoWeights(
            f"diffusers {diffusers.__version__} has no {index.get('_class_name')!r}: upgrade it, or use another model"
        )
    parts = {
        name: _part(snapshot, name, value[0], value[1], tensors, device)
        for name, value in index.items()
        if _names_class(value)
    }
    # By its own class: the general one would load a part that is optional there once more, by itself.
    pipeline = pipeline_class.from_pretrained(snapshot.path, local_files_only=True, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _names_class(value: object) -> bool:
    """Whether an entry of `model_index.json` is a part, as a library and a class of it; others are settings."""
    return isinstance(value, list) and len(value) == 2 and all(each is None or isinstance(each, str) for each in value)


def _part(
    snapshot: Snapshot,
    name: str,
    library: str | None,
    class_name: str | None,
    tensors: dict[str, torch.Tensor],
    device: torch.device,
) -> Any:
    if library is None or class_name is None:
        return None
    cls = class_of(library, class_name)
    if cls is None:
        raise NoWeights(f"{snapshot.key}: {name} is a {class_name} of {library}, which is not served")
    prefix, folder = f"{name}/", snapshot.path / name
    own_module = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    if not own_module:  # schedulers, tokenizers, feature extractors
        return cls.from_pretrained(folder)
    if issubclass(cls, transformers.PreTrainedModel):
        config = cls.config_class.from_pretrained(folder)
        return build_part(cls, config, snapshot, own_module, device)
    with bounded_build(snapshot, len(own_module)), accelerate.init_empty_weights():
        model = cls.from_config(cls.load_config(folder))
    model._fix_state_dict_keys_on_load(own_module)
    wide = set(cls._keep_in_fp32_modules or ())
    own_module = {key: tensor.float() if wide & set(key.split(".")) else tensor for key, tensor in own_module.items()}
    try:
        missing, left_over = model.load_state_dict(own_module, strict=False, assign=True)
    except RuntimeError as error:
        reason = one_line(str(error), MESSAGE_CHARACTERS)
        raise BadSafetensors(
            f"{snapshot.key}: the weights of {name} are not those of a {class_name}: {reason}"
        ) from error
    if missing:
        raise BadSafetensors(
            f"{snapshot.key}: the weights of {name} lack {first_names(missing)}, which a {class_name} has: use "
            "another revision"
        )
    if left_over:  # of a training, or of another version: diffusers leaves them out, too
        logger.warning("%s: %s has no use for %s", snapshot.key, name, first_names(left_over))
    return model.eval()


def check_parts(snapshot: Snapshot) -> None:
    """Raise NotServable for a pipeline with a part that is stored quantized: its classes are built of plain weights."""
    for path in snapshot.manifest.paths:
        folder, _, file = path.rpartition("/")
        if folder and file == "config.json" and (settings := snapshot.config(path).get("quantization_config")):
            how = settings.get("quant_method") if isinstance(settings, dict) else None
            raise NotServable(
                f"{snapshot.key}: {folder} is quantized ({str(how or 'quantization_config')[:40]}), which the "
                "diffusion engine does not serve: name a repo with its weights in 16 or 32 bits"
            )


def class_of(library: str, class_name: str) -> Any:
    """The class of a pipeline's part: of diffusers, of transformers, or of a pipeline of diffusers that has parts of
    its own, such as `stable_diffusion`; None if it is neither."""
    if library == "transformers":
        class_name = _maybe_remap_transformers_class(class_name) or class_name
    if library in _LIBRARIES:
        return getattr(import_module(library), class_name, None)
    return getattr(getattr(diffusers.pipelines, library, None), class_name, None)


def arguments_of(pipeline_class: Any) -> dict[str, Any]:
    """The arguments of a pipeline's call, each with its default, None if it has none."""
    parameters = list(inspect.signature(pipeline_class.__call__).parameters.values())[1:]
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    return {each.name: None if each.default is each.empty else each.default for each in named}


def truncations(pipeline: Any, request: ImageRequest, call: PipelineCall) -> Iterator[Truncation]:
    """The prompts of which a text encoder reads less than they have."""
    for suffix in ("", "_2", "_3"):
        tokenizer = getattr(pipeline, f"tokenizer{suffix}", None)
        if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
            continue
        own_limit = request.others.get("max_sequence_length", call.defaults.get("max_sequence_length"))
        is_clip = "CLIP" in type(tokenizer).__name__
        longest = own_limit if isinstance(own_limit, int) and not is_clip else tokenizer.model_max_length
        for field in ("prompt", "negative_prompt"):
            own = request.others.get(f"{field}{suffix}") if suffix else None
            name = field if own is None else f"{field}{suffix}"
            texts = own if isinstance(own, list) else [getattr(request, field) if own is None else own]
            counts = [len(tokenizer(str(text), truncation=False, verbose=False)["input_ids"]) for text in texts if text]
            if max(counts, default=0) > longest:
                yield Truncation(name, f"tokenizer{suffix}", max(counts), longest)


def decoded(texts: str | tuple[str, ...], name: str, most_pixels: int) -> Image | list[Image]:
    """A job's picture, or several, in base64, also as `data:` addresses. Raises JobError."""
    if isinstance(texts, tuple):
        return [_decoded(text, name, most_pixels) for text in texts]
    return _decoded(texts, name, most_pixels)


def _decoded(text: str, name: str, most_pixels: int) -> Image:
    if text[:5].lower() == "data:":
        text = text.partition(",")[2]
    elif "://" in text[:20]:
        raise invalid(f"{name} must be a picture in base64: this worker opens no addresses")
    text = "".join(text.split()).rstrip("=")
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        picture = open_picture(io.BytesIO(data), formats=_PICTURE_FORMATS)
        if picture.width * picture.height > most_pixels:
            raise invalid(f"{name} must have at most {most_pixels} pixels, not {picture.width * picture.height}")
        upright: Image = exif_transpose(picture)  # as `load_image` of diffusers does
        return upright.convert("L" if "mask" in name else "RGB")
    except (ValueError, OSError, SyntaxError, DecompressionBombError) as error:
        raise invalid(f"{name} must be a picture in base64, such as PNG or JPEG: {error}") from error


def encoded(picture: Image, image_format: ImageFormat) -> str:
    """A picture in base64."""
    data = io.BytesIO()
    has_alpha = picture.mode in ("RGBA", "LA", "P")
    (picture.convert("RGB") if image_format == "jpeg" and has_alpha else picture).save(
        data, format=image_format.upper(), **({} if image_format == "png" else {"quality": _QUALITY})
    )
    return base64.b64encode(data.getvalue()).decode()


class Loader:
    """See `handler.engines.Loader`."""

    def __init__(self, settings: Settings) -> None:
        pass

    def load(self, pending: PendingStart, import_server: Callable[[], None]) -> DiffusionEngine:
        return pending.load(partial(DiffusionEngine.load, while_reading=import_server))

    def cancel(self) -> None:
        """See `handler.engines.Loader`."""
