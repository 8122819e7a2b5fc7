"""Image jobs: their requests and their answers. Pure functions, no torch, no network.

in      {"prompt": str, "negative_prompt": "", "num_inference_steps": 30, "guidance_scale": 7.5, "width", "height",
         "num_images": 1, "seed", "stream": false, "model": "org/name"}
out     {"image_base64": str, "images": [str], "seed": int, "model": str, "parameters": {…}}; PNG in base64,
         `image_base64` the first of them
stream  {"progress": 0 to 1, "step": int, "finished": false} for each step, then the output with "finished": true
or      {"error": str, "code": Code}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from handler.errors import JobError, invalid
from handler.jobs import Limits, named_model
from handler.sampling import MAX_SEED
from handler.values import flag, integer, number

MAX_GUIDANCE = 50.0
_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One job for an image engine; `width`, `height` (pixels) and `guidance_scale` are the pipeline's own if None."""

    prompt: str
    negative_prompt: str
    steps: int
    guidance_scale: float | None
    width: int | None
    height: int | None
    count: int
    seed: int | None
    stream: bool = False
    model: str | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters as an answer repeats them."""
        fields = {"num_inference_steps": self.steps, "num_images": self.count}
        optional = {"guidance_scale": self.guidance_scale, "width": self.width, "height": self.height}
        return fields | {name: value for name, value in optional.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Step:
    """So many of `steps` are done."""

    step: int
    steps: int

    def as_json(self) -> dict[str, Any]:
        return {"progress": round(self.step / self.steps, 4), "step": self.step, "finished": False}


@dataclass(frozen=True, slots=True)
class Images:
    """The pictures, as PNG in base64, the seed that they were made with, and by which model."""

    images: tuple[str, ...]
    seed: int
    model: str


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
        return {
            "image_base64": self._images.images[0],
            "images": list(self._images.images),
            "seed": self._images.seed,
            "model": self._images.model,
            "parameters": self._request.parameters,
        }


def parse_image(data: Mapping[str, Any], limits: Limits) -> ImageRequest:
    """An image job's request, checked. Raises JobError whose text names the field, the limit and the value."""
    texts = {}
    for name in ("prompt", "negative_prompt"):
        value = "" if data.get(name) is None else data[name]
        if not isinstance(value, str) or (name == "prompt" and not value):
            raise invalid(f"{name} must be a string{' that is not empty' if name == 'prompt' else ''}")
        if len(value) > limits.prompt_characters:
            raise invalid(f"{name} must have at most {limits.prompt_characters} characters, not {len(value)}")
        texts[name] = value
    width, height = (_side(data, name, limits) for name in ("width", "height"))
    if width and height and width * height > limits.pixels:
        raise invalid(f"width times height must be at most {limits.pixels}, not {width * height}")
    guidance = data.get("guidance_scale")
    return ImageRequest(
        prompt=texts["prompt"],
        negative_prompt=texts["negative_prompt"],
        steps=integer(data, "num_inference_steps", min(30, limits.steps), at_least=1, at_most=limits.steps),
        guidance_scale=None
        if guidance is None
        else number(data, "guidance_scale", 7.5, at_least=0.0, at_most=MAX_GUIDANCE),
        width=width,
        height=height,
        count=integer(data, "num_images", 1, at_least=1, at_most=limits.images),
        seed=None if data.get("seed") is None else integer(data, "seed", 0, at_least=0, at_most=MAX_SEED),
        stream=flag(data, "stream"),
        model=named_model(data),
    )


def _side(data: Mapping[str, Any], name: str, limits: Limits) -> int | None:
    if data.get(name) is None:
        return None
    value = integer(data, name, 0, at_least=_MULTIPLE, at_most=limits.pixels // _MULTIPLE)
    if value % _MULTIPLE:
        raise invalid(f"{name} must be a multiple of {_MULTIPLE}, not {value}")
    return value
