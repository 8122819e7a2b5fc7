"""Engines: each turns a snapshot into something that answers jobs, behind one small interface.

    text.py, multi.py      transformers: one model that can be exchanged, and several of them in one worker
    diffusion.py           diffusers
    vllm_engine.py         vLLM, a server in a process of its own (server.py), which has OpenAI's routes itself

`ENGINES` is the table of them. A new engine is a line there, its name in `settings.EngineName`, and a module with a
`Loader`; another server with OpenAI's routes takes `server.py` as vLLM does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from handler.answers import TextDelta
from handler.images import ImageRequest, Images, PipelineCall, Step
from handler.jobs import ServerFields, TextRequest
from modelstore.servable import CheckConfig, check_generates_text, check_nothing
from modelstore.settings import EngineName
from modelstore.timeline import Timeline
from modelstore.warmstart import PendingStart, Target


class BaseEngine(Protocol):
    """The worker's view of a loaded model, of any kind."""

    @property
    def model(self) -> str:
        """The name of the model that answers if a job names none."""

    @property
    def broken(self) -> str:
        """Why no job can be answered any more in this process; empty if all is well."""

    def serves(self, name: str) -> bool:
        """Whether a job may call the model so without loading another."""

    def swap(self, reference: str) -> Timeline:
        """Serve another model from now on; returns the record of its start. The current one answers meanwhile.

        Raises Refused if that takes a new process.
        """

    def status(self) -> dict[str, Any]:
        """Model, commit, dtype, memory in bytes."""

    def check(self) -> None:
        """Raise ModelStoreError if the model differs from the volume's records, or cannot answer."""

    def close(self) -> None:
        """Finish running requests, then release the model."""


class _GeneratesText(BaseEngine, Protocol):
    def generate(self, request: TextRequest) -> AsyncIterator[TextDelta]:
        """The pieces of all the request's prompts, as they come. A caller that stops the iteration ends the generation.

        Raises JobError for errors that the sender can mend. Requests may overlap.
        """


class TextEngine(_GeneratesText, Protocol):
    """Continues texts."""

    kind: Literal["text"]


class OpenAIEngine(_GeneratesText, Protocol):
    """Continues texts, and serves OpenAI's routes by itself."""

    kind: Literal["openai"]

    async def fields(self) -> ServerFields:
        """The fields that it takes on each route."""

    def openai(self, route: str, body: Mapping[str, Any] | None) -> AsyncIterator[str | dict[str, Any]]:
        """The events of a stream as they come, each as it goes over the wire, or else the one answer.

        Raises JobError for errors that the sender can mend. Requests may overlap.
        """


class ImageEngine(BaseEngine, Protocol):
    """Draws pictures."""

    kind: Literal["image"]

    @property
    def call(self) -> PipelineCall:
        """What it takes."""

    def draw(self, request: ImageRequest) -> AsyncIterator[Step | Images]:
        """The steps as they are done, and the pictures. A caller that stops the iteration ends the drawing.

        Raises JobError for errors that the sender can mend. Requests may overlap.
        """


Engine = TextEngine | OpenAIEngine | ImageEngine


class Loader(Protocol):
    """Loads an engine of one kind: the class `Loader` of the engine's module, made with the settings."""

    def load(self, pending: PendingStart, import_sdk: Callable[[], None]) -> Engine:
        """The engine of a start whose bytes are in flight; `import_sdk` is called once, while bytes still arrive."""

    def cancel(self) -> None:
        """Give up: `load` failed, or was never called."""


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """One engine.

    `module`: below `handler.engines`. `libraries`: the packages that the import takes its time for, the last of them
    with the module itself. `extra`: of the distribution. `can_serve`: whether a snapshot with these files is served
    by it if ENGINE is not set. `target`: the place that the bytes are read to, see `warmstart.begin`. `check_config`:
    whether it serves a model, told before a download.
    """

    module: str
    libraries: tuple[str, ...]
    extra: str
    can_serve: Callable[[Collection[str]], bool]
    target: Target = "device"
    check_config: CheckConfig = check_nothing


def _is_pipeline(files: Collection[str]) -> bool:
    return "model_index.json" in files


ENGINES: Mapping[EngineName, EngineEntry] = {  # the first that can serve a snapshot is taken
    "diffusion": EngineEntry("diffusion", ("torch", "diffusers"), "diffusion", _is_pipeline),
    "vllm": EngineEntry("vllm_engine", ("aiohttp",), "vllm", lambda _files: False, target="shared"),
    "text": EngineEntry(
        "multi", ("torch", "transformers"), "worker", lambda _files: True, check_config=check_generates_text
    ),
}


def engine_for(files: Collection[str]) -> EngineName:
    """The engine that serves a snapshot with these files, by path, if ENGINE is not set."""
    return next(name for name, entry in ENGINES.items() if entry.can_serve(files))
