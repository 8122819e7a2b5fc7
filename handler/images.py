"""Image jobs: their requests and their answers. Pure functions, no torch, no network.

    in      {"prompt": str, "negative_prompt": str, "num_inference_steps": 30, "guidance_scale": 7.5, "width", "height",
             "num_images": 1, "seed", "image_format": "png" | "jpeg" | "webp", "stream": false, "model": "org/name"},
             and what else the pipeline's `__call__` takes: "strength", "true_cfg_scale", …, and pictures in base64
    out     {"image_base64": str, "images": [{"seed": int}, {"seed": int, "image_base64": str}, …], "seed": int,
             "image_format": str, "model": str, "parameters": {…}}: a picture is there once, the first one outside the
             list. With a bucket there is "image_url" instead of "image_base64".
    stream  {"progress": 0 to 1, "step": int, "finished": false} for each step, then the output with "finished": true
    or      {"error": str, "code": Code}

An output also has "nsfw_content_detected": [bool] if the pipeline has a safety checker, and "truncated": [{"field",
"tokenizer", "tokens", "read"}] if a text encoder read less than the whole prompt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from handler.errors import JobError, invalid, shown
from handler.fields import unknown_field
from handler.jobs import Limits, named_model
from handler.sampling import MAX_SEED
from handler.values import flag, integer, number

ImageFormat = Literal["png", "jpeg", "webp"]

MAX_GUIDANCE = 50.0
MAX_NUMBER = 1_000_000
SIDE_MULTIPLE = 8
_STEPS = 30
_COUNTS = ("num_images", "num_images_per_prompt")
_OF_THE_WORKER = ("seed", "image_format", "stream", "model", *_COUNTS)
# Arguments of pipelines that are tensors, functions or the worker's own
_NOT_SENT = re.compile(
    r"generator|latents|.*ip_adapter_image.*|.*_embeds(_.*)?|.*_attention_mask|callback.*|output_type|return_dict"
    r"|.*_kwargs|num_(images|videos|waveforms)_per_prompt"
)
_PICTURE_COUNTS = ("batch_size", "decode_chunk_size", "class_labels")  # that say how many pictures are made at once
# Arguments that say how long a pipeline works; `num_inference_steps` has a field of its own.
_STEP_COUNTS = re.compile(r".*inference_steps(_list)?|num_.*steps|max_post_steps")
_FRAME_COUNTS = re.compile(r"(.*_)?num_.*frames.*|frames|video_length")
_NEW_TOKENS = re.compile(r".*max_new_tokens|gen_length")
_PAIRS = ("_size", "_top_left")
_PICTURES = re.compile(r"(.*_)?(image|images|mask)")


@dataclass(frozen=True, slots=True)
class PipelineCall:
    """The call of a pipeline: its class, and what its `__call__` takes, each with its default."""

    name: str
    defaults: Mapping[str, Any]

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a job that it serves."""
        return (*(name for name in self.defaults if not _NOT_SENT.fullmatch(name)), *_OF_THE_WORKER)


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One job for an image engine; `width`, `height` (pixels) and `guidance_scale` are the pipeline's own if None.

    `others`: further arguments of the pipeline; `pictures`: those that are pictures, in base64. `most_pixels`: of one
    of these.
    """

    prompt: str
    negative_prompt: str | None
    steps: int
    guidance_scale: float | None
    width: int | None
    height: int | None
    count: int
    seed: int | None
    stream: bool = False
    model: str | None = None
    image_format: ImageFormat = "png"
    others: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    most_pixels: int = 0

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters as an answer repeats them."""
        fields = {"num_inference_steps": self.steps, "num_images": self.count}
        optional = {"guidance_scale": self.guidance_scale, "width": self.width, "height": self.height}
        return fields | {name: value for name, value in optional.items() if value is not None} | dict(self.others)


@dataclass(frozen=True, slots=True)
class Step:
    """So many of `steps` are done."""

    step: int
    steps: int

    def as_json(self) -> dict[str, Any]:
        return {"progress": round(min(1.0, self.step / self.steps), 4), "step": self.step, "finished": False}


@dataclass(frozen=True, slots=True)
class Truncation:
    """A text encoder read so many `tokens` of a prompt less than it has."""

    field: str
    tokenizer: str
    tokens: int
    read: int

    def as_json(self) -> dict[str, Any]:
        return {"field": self.field, "tokenizer": self.tokenizer, "tokens": self.tokens, "read": self.read}


@dataclass(frozen=True, slots=True)
class Images:
    """The pictures in base64, the seed of the first one, and the model. Each has a seed one higher than the one before,
    but for the frames of a video. `urls`: their addresses, if they lie in a bucket."""

    images: tuple[str, ...]
    seed: int
    model: str
    image_format: ImageFormat = "png"
    nsfw: tuple[bool, ...] = ()
    truncated: tuple[Truncation, ...] = ()
    are_frames: bool = False
    size: tuple[int, int] = (0, 0)  # of the first one, width and height in pixels
    urls: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The part of an output that tells the pictures."""
        name, pictures = ("image_url", self.urls) if self.urls else ("image_base64", self.images)
        listed: list[dict[str, Any]] = [
            {"seed": seed} | ({name: picture} if place else {})
            for place, (seed, picture) in enumerate(zip(self.seeds, pictures, strict=True))
        ]
        output = {name: pictures[0], "images": listed, "seed": self.seed, "image_format": self.image_format}
        return output | self.remarks | {"model": self.model}

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each picture."""
        return tuple(self.seed + (0 if self.are_frames else place) for place in range(len(self.images)))

    @property
    def remarks(self) -> dict[str, Any]:
        """The part of an output that tells what a safety checker or a text encoder did."""
        remarks: dict[str, Any] = {"nsfw_content_detected": list(self.nsfw)} if self.nsfw else {}
        return remarks | ({"truncated": [cut.as_json() for cut in self.truncated]} if self.truncated else {})


class ImageAnswer:
    """Puts the steps and the pictures of one request in RunPod's form: a Responder."""

    def __init__(self, request: ImageRequest) -> None:
        self.streams = request.stream
        self._request = request
        self._step: Step | None = None
        self._images: Images | None = None

    def chunks(self, piece: Step | Images) -> list[Any]:
        """Take the next step, or the pictures; returns its chunk of a stream."""
        if isinstance(piece, Step):
            self._step = piece
            return [piece.as_json()] if self.streams else []
        self._images = piece
        return [self.output() | {"progress": 1.0, "finished": True}] if self.streams else []

    def merge(self, chunks: list[Any]) -> list[Any]:
        """Each step stays a chunk of its own."""
        return chunks

    def progress(self) -> Mapping[str, Any] | None:
        """The last step; None once the output is next."""
        step = self._step
        return step.as_json() if self._images is None and step is not None and step.step < step.steps else None

    def last_chunks(self) -> list[Any]:
        """Nothing: the chunk with the pictures says that it is finished."""
        return []

    def failed_chunks(self, error: JobError) -> list[Any]:
        """One chunk with the error."""
        return [{"finished": True} | error.payload()]

    def output(self) -> dict[str, Any]:
        """The output of a finished job."""
        assert self._images is not None
        return self._images.as_json() | {"parameters": self._request.parameters}


def parse_image(data: Mapping[str, Any], limits: Limits, call: PipelineCall) -> ImageRequest:
    """An image job's request, checked. `call`: the pipeline's, which decides on the fields. Raises JobError whose text
    names the field, the limit and the value."""
    fields = {name: value for name, value in data.items() if value is not None}
    for name in fields:
        if name not in call.fields:
            raise _not_taken(name, call)
    texts = {name: _text(fields, name, limits) for name in ("prompt", "negative_prompt")}
    if "prompt" in call.defaults and not texts["prompt"]:
        raise invalid(f"prompt must be a string that is not empty, not {shown(fields.get('prompt'))}")
    width, height = (_side(fields, name, limits) for name in ("width", "height"))
    if width and height and width * height > limits.pixels:
        raise invalid(f"width times height must be at most {limits.pixels}, not {width * height}")
    for name, side, other in (("width", width, "height"), ("height", height, "width")):
        if (
            side and (width is None or height is None) and side > math.isqrt(limits.pixels)
        ):  # the pipeline has the other
            raise invalid(f"{name} must be at most {math.isqrt(limits.pixels)} without {other}, not {side}")
    guidance = None
    if "guidance_scale" in fields:
        guidance = number(fields, "guidance_scale", 7.5, at_least=0.0, at_most=MAX_GUIDANCE)
    own_steps = call.defaults.get("num_inference_steps")
    steps = min(_STEPS, own_steps if isinstance(own_steps, int) and own_steps > 0 else _STEPS, limits.steps)
    others = {name: value for name, value in fields.items() if name not in _NAMED and name not in _OF_THE_WORKER}
    pictures = {
        name: _picture_texts(name, value, limits) for name, value in others.items() if _PICTURES.fullmatch(name)
    }
    checked = {name: _argument(name, value, call, limits) for name, value in others.items() if name not in pictures}
    return ImageRequest(
        prompt=texts["prompt"],
        negative_prompt=texts["negative_prompt"] if "negative_prompt" in fields else None,
        steps=integer(fields, "num_inference_steps", steps, at_least=1, at_most=limits.steps),
        guidance_scale=guidance,
        width=width,
        height=height,
        count=_count(fields, call, limits),
        seed=None if "seed" not in fields else integer(fields, "seed", 0, at_least=0, at_most=MAX_SEED),
        stream=flag(fields, "stream"),
        model=named_model(fields),
        image_format=picture_format(fields, "image_format"),
        others=checked,
        pictures=pictures,
        most_pixels=limits.pixels,
    )


_NAMED = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "width", "height")


def _not_taken(name: str, call: PipelineCall) -> JobError:
    if name in call.defaults:
        return invalid(f"{name} is not served: it is the worker's to set, a tensor, or an adapter's")
    error = unknown_field(name, call.fields)
    return invalid(f"{error}; {call.name} takes {', '.join(call.fields)}")


def _text(data: Mapping[str, Any], name: str, limits: Limits) -> str:
    value = data.get(name, "")
    if not isinstance(value, str):
        raise invalid(f"{name} must be a string, not {shown(value)}")
    if len(value) > limits.prompt_characters:
        raise invalid(f"{name} must have at most {limits.prompt_characters} characters, not {len(value)}")
    return value


def _picture_texts(name: str, value: Any, limits: Limits) -> str | tuple[str, ...]:
    """A picture of a job, or several of them, in base64, which the engine decodes."""
    if isinstance(value, list) and 1 <= len(value) <= limits.images and all(isinstance(each, str) for each in value):
        return tuple(value)
    if not isinstance(value, str):
        raise invalid(f"{name} must be a picture in base64, or at most {limits.images} of them, not {shown(value)}")
    return value


def _argument(name: str, value: Any, call: PipelineCall, limits: Limits) -> Any:
    """A further argument of a pipeline: a switch, a number, a text, or a list of them."""
    default = call.defaults[name]
    each = value if isinstance(value, list) else [value]
    if not 1 <= len(each) <= limits.steps:
        raise invalid(f"{name} must have 1 to {limits.steps} entries, not {len(each)}")
    for item in each:
        if isinstance(item, str):
            _text({name: item}, name, limits)
        elif not isinstance(item, bool | int | float):
            raise invalid(f"{name} must be a number, a text, a switch or a list of them, not {shown(value)}")
        elif not abs(item) <= MAX_NUMBER:
            raise invalid(f"{name} must be a number of at most {MAX_NUMBER}, not {shown(value)}")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, bool) and not isinstance(value, bool):
        raise invalid(f"{name} must be true or false, not {shown(value)}")
    if (
        isinstance(default, int | float)
        and not isinstance(default, bool)
        and not (is_number or isinstance(value, list))
    ):
        raise invalid(f"{name} must be a number, not {shown(value)}")
    counts = ((_STEP_COUNTS, limits.steps), (_FRAME_COUNTS, limits.frames), (_NEW_TOKENS, limits.max_tokens))
    for at_most in (at_most for kind, at_most in counts if kind.fullmatch(name)):
        for item in each:
            integer({name: item}, name, 1, at_least=int(name == "num_frames"), at_most=at_most)
    if name == "max_sequence_length":
        integer({name: value}, name, 1, at_least=1, at_most=MAX_NUMBER)
    if isinstance(value, list) and (isinstance(default, tuple) or name.endswith(_PAIRS)):
        return tuple(value)  # JSON has none
    if name in _PICTURE_COUNTS:
        count = (
            len(value) if isinstance(value, list) else integer({name: value}, name, 1, at_least=0, at_most=MAX_NUMBER)
        )
        limit = MAX_NUMBER if name == "class_labels" and not isinstance(value, list) else limits.images
        if count > limit:
            raise invalid(f"{name} must ask for at most {limit} pictures, not {count}")
    return value


def _count(data: Mapping[str, Any], call: PipelineCall, limits: Limits) -> int:
    """How many pictures are asked for."""
    if all(name in data for name in _COUNTS):
        raise invalid("num_images and num_images_per_prompt are the same: leave one of them out")
    name = next((each for each in _COUNTS if each in data), "num_images")
    count = integer(data, name, 1, at_least=1, at_most=limits.images)
    if count > 1 and "num_images_per_prompt" not in call.defaults:
        raise invalid(f"{name} must be 1: {call.name} makes one at a time")
    return count


def picture_format(data: Mapping[str, Any], field_name: str) -> ImageFormat:
    """The format that a field names; PNG without it. Raises JobError."""
    value = data.get(field_name, "png")
    name = value.lower() if isinstance(value, str) else value
    name = "jpeg" if name == "jpg" else name
    for known in get_args(ImageFormat):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise invalid(f"{field_name} must be png, jpeg or webp, not {shown(value)}")


def _side(data: Mapping[str, Any], name: str, limits: Limits) -> int | None:
    if data.get(name) is None:
        return None
    value = integer(data, name, 0, at_least=SIDE_MULTIPLE, at_most=limits.pixels // SIDE_MULTIPLE)
    if value % SIDE_MULTIPLE:
        raise invalid(f"{name} must be a multiple of {SIDE_MULTIPLE}, not {value}")
    return value
