"""OpenAI's route for pictures, `/v1/images/generations`: its body to an image request, and the pictures in its form.

    in      {"prompt": str, "n": 1, "size": "512x512", "output_format": "png", "response_format": "b64_json" | "url",
             "stream": false, "model": "org/name"}, and the fields of the pipeline that `images.py` names
    out     {"created": int, "data": [{"b64_json": str, "seed": int}, …], "output_format": str, "size": "512x512",
             "model": str}; with a bucket there is "url" instead of "b64_json", unless this is asked for
    stream  an event `image_generation.completed` for each picture, with "b64_json" unless "url" is asked for

A field that would change the pictures and is not served is refused rather than ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from handler import openai_routes
from handler.errors import JobError, invalid, shown
from handler.images import SIDE_MULTIPLE, ImageRequest, Images, PipelineCall, Step, parse_image, picture_format
from handler.jobs import JobContext, Limits
from handler.values import integer

Form = Literal["b64_json", "url"]
ImagesRoute = Literal["images/generations", "models"]
ROUTES: tuple[ImagesRoute, ...] = ("images/generations", "models")

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_RENAMED = {"n": "num_images", "output_format": "image_format"}  # OpenAI's names for ours
_HARMLESS = ("user", "metadata", "moderation", "safety_identifier")
# Fields of OpenAI's own models: the values that ask for nothing here, and what to do instead of the others.
_NEUTRAL: Mapping[str, tuple[tuple[object, ...], str]] = {
    "quality": (("auto", "standard"), "num_inference_steps sets it"),
    "style": (("vivid",), "name the style in the prompt"),
    "background": (("auto", "opaque"), "name the background in the prompt"),
    "output_compression": ((100,), "leave it out"),
    "partial_images": ((0,), "only finished pictures are sent: leave it out"),
}


@dataclass(frozen=True, slots=True)
class ImagesRequest:
    """A request on this route. `form`: that of the pictures in the answer; None for the worker's own choice."""

    image: ImageRequest
    form: Form | None

    def uploads(self, *, has_bucket: bool) -> bool:
        """Whether the pictures go into the bucket. Raises JobError if they have to and there is none."""
        if self.form == "url" and not has_bucket:
            raise invalid("response_format url needs a bucket (BUCKET_ENDPOINT_URL): send b64_json instead")
        # OpenAI's own form of an event has no place for an address.
        return has_bucket and (self.form == "url" or (self.form is None and not self.image.stream))


def parse_images_job(data: Mapping[str, Any], job: JobContext, call: PipelineCall) -> ImagesRequest | None:
    """The request of a job in OpenAI's form; None if it asks for the list of models. Raises JobError."""
    requested, content = openai_routes.route_and_body(data, usual=f"/v1/{ROUTES[0]}")
    if openai_routes.parse_route(requested, ROUTES) == "models":
        openai_routes.check_no_body(content)
        return None
    body = openai_routes.checked_body(content)
    return ImagesRequest(
        parse_image(_fields(body, job.limits, call), job.limits, call), _form(body.get("response_format"))
    )


def _fields(body: Mapping[str, Any], limits: Limits, call: PipelineCall) -> dict[str, Any]:
    """The fields of an image job. Raises JobError."""
    fields: dict[str, Any] = {}
    for theirs, ours in (*_RENAMED.items(), ("n", "num_images_per_prompt")):
        if body.get(theirs) is not None and body.get(ours) is not None:
            raise invalid(f"{theirs} and {ours} are the same: leave one of them out")
    # These two are checked here, so that an error has OpenAI's name.
    if integer(body, "n", 1, at_least=1, at_most=limits.images) > 1 and "num_images_per_prompt" not in call.defaults:
        raise invalid(f"n must be 1: {call.name} makes one at a time")
    if body.get("output_format") is not None:
        picture_format(body, "output_format")
    for name, value in body.items():
        if value is None or name in _HARMLESS or name == "response_format":
            continue
        if name in _NEUTRAL:
            neutral, instead = _NEUTRAL[name]
            if value not in neutral:
                raise invalid(f"{name} {shown(value)} is not served here: {instead}")
        elif name == "size":
            fields |= _sides(value, body, call)
        else:
            fields[_RENAMED.get(name, name)] = value
    return fields


def _sides(size: object, body: Mapping[str, Any], call: PipelineCall) -> dict[str, int]:
    """Width and height in pixels, from a text such as 512x512; none for `auto`. Raises JobError."""
    if size == "auto":
        return {}
    sides = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if sides is None:
        raise invalid(f"size must be auto, or WIDTHxHEIGHT as in 512x512, not {shown(size)}")
    if not {"width", "height"} <= set(call.defaults):
        raise invalid(f"size is not served here: {call.name} has a size of its own")
    if body.get("width") is not None or body.get("height") is not None:
        raise invalid("size says what width and height say: leave one of them out")
    width, height = int(sides[1]), int(sides[2])
    if width % SIDE_MULTIPLE or height % SIDE_MULTIPLE:
        raise invalid(f"size must be two multiples of {SIDE_MULTIPLE}, not {size}")
    return {"width": width, "height": height}


def _form(value: object) -> Form | None:
    if value in (None, "b64_json", "url"):
        return value
    raise invalid(f"response_format must be b64_json or url, not {shown(value)}")


class OpenAIImagesAnswer:
    """Puts the pictures of one request in OpenAI's form: a Responder."""

    def __init__(self, request: ImagesRequest, *, created: int) -> None:
        """`created`: seconds since 1970."""
        self.streams = request.image.stream
        self._created = created
        self._images: Images | None = None

    def chunks(self, piece: Step | Images) -> list[Any]:
        """Take the next step, or the pictures; returns an event for each picture of a stream."""
        if isinstance(piece, Step):
            return []
        self._images = piece
        return [self._event(entry, piece) for entry in _entries(piece)] if self.streams else []

    def merge(self, chunks: list[Any]) -> list[Any]:
        """Each picture stays a chunk of its own."""
        return chunks

    def progress(self) -> Mapping[str, Any] | None:
        """OpenAI's clients get no progress."""
        return None

    def last_chunks(self) -> list[Any]:
        """The end."""
        return [openai_routes.DONE]

    def failed_chunks(self, error: JobError) -> list[Any]:
        """An event with the error, at which a client raises, and the end."""
        return openai_routes.error_events(error)

    def output(self) -> dict[str, Any]:
        """The whole answer of a request that is not streamed."""
        assert self._images is not None
        answer = {"created": self._created, "data": _entries(self._images)}
        return answer | _described(self._images)

    def _event(self, entry: Mapping[str, Any], images: Images) -> str:
        kind = "image_generation.completed"
        content = {"type": kind, "created_at": self._created, **entry, **_described(images)}
        return f"event: {kind}\ndata: {json.dumps(content)}\n\n"


def _entries(images: Images) -> list[dict[str, Any]]:
    """The pictures, each with its seed."""
    name, pictures = ("url", images.urls) if images.urls else ("b64_json", images.images)
    return [{name: picture, "seed": seed} for picture, seed in zip(pictures, images.seeds, strict=True)]


def _described(images: Images) -> dict[str, Any]:
    width, height = images.size
    return {"output_format": images.image_format, "size": f"{width}x{height}", "model": images.model} | images.remarks
