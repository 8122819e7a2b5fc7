"""Engines: each turns a snapshot into something that answers requests, behind one small interface."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol, runtime_checkable

from handler.images import ImageRequest, Images, Step
from handler.jobs import Piece, TextRequest
from modelstore.timeline import Timeline


class Engine(Protocol):
    """What the worker needs of a loaded model, whatever it makes."""

    @property
    def model(self) -> str:
        """The name of the model that answers where a job names none."""

    @property
    def broken(self) -> str:
        """Why nothing can be answered any more in this process; empty where all is well."""

    def serves(self, name: str) -> bool:
        """Whether a job may call the model so without loading another."""

    def swap(self, reference: str) -> Timeline:
        """Serve another model from now on; returns the record of its start. The current one answers meanwhile.

        Raises Refused where that takes a new process.
        """

    def status(self) -> dict[str, Any]:
        """Model, commit, dtype, memory in bytes."""

    def check(self) -> None:
        """Raise ModelStoreError where the model is not what the volume's records say, or cannot answer."""

    def close(self) -> None:
        """End, and give the memory back; what still runs comes to its end first."""


@runtime_checkable
class TextEngine(Engine, Protocol):
    """Continues texts."""

    def generate(self, request: TextRequest) -> AsyncIterator[Piece]:
        """The pieces of all the request's prompts, as they come; whoever stops to ask for them ends the generation.

        Raises JobError for what the sender can mend. Requests may overlap.
        """


@runtime_checkable
class OpenAIEngine(TextEngine, Protocol):
    """Continues texts, and serves OpenAI's routes by itself."""

    def openai(self, route: str, body: Mapping[str, Any] | None) -> AsyncIterator[str | dict[str, Any]]:
        """The events of a stream as they come, each as it goes over the wire, or else the one answer.

        Raises JobError for what the sender can mend. Requests may overlap.
        """


@runtime_checkable
class ImageEngine(Engine, Protocol):
    """Draws pictures."""

    def draw(self, request: ImageRequest) -> AsyncIterator[Step | Images]:
        """The steps as they are done, and the pictures; whoever stops to ask for them ends the drawing.

        Raises JobError for what the sender can mend. Requests may overlap.
        """
