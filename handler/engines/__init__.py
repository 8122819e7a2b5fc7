"""Engines: each turns a snapshot into something that answers requests, behind one small interface."""

from __future__ import annotations

from typing import Protocol

from handler.jobs import Completion, TextRequest
from modelstore.timeline import Timeline


class Engine(Protocol):
    """What the worker needs of a loaded model."""

    @property
    def model(self) -> str:
        """The model's name in answers."""

    def generate(self, request: TextRequest) -> Completion:
        """Answer one request. Raises JobError for what the sender can mend; called from one thread at a time."""

    def swap(self, reference: str) -> Timeline:
        """Serve another model from now on; returns the record of its start. The current one answers meanwhile."""

    def free_memory(self) -> None:
        """Give back what a failed request held; called after an out-of-memory error."""
