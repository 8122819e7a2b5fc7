"""The engine of a worker: which one it is, its imports beside the read, and its model."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from handler import sdk
from handler.engines import ENGINES, engine_for, vllm_choice
from modelstore.errors import InvalidSetting, not_installed
from modelstore.logs import take_library_logs
from modelstore.settings import EngineName, Settings
from modelstore.warmstart import begin, find_or_make, note_outcome

if TYPE_CHECKING:
    from types import ModuleType

    from handler.engines import Engine, Loader
    from modelstore.pending_start import PendingStart
    from modelstore.timeline import Timeline
    from modelstore.volume.snapshots import Snapshot

logger = logging.getLogger("handler")

_WITH_ADAPTERS: Sequence[EngineName] = ("text", "vllm")
_SECRETS = ("hf_token", "engine_cache_key", "api_key")


class EngineStart:
    """A start until its engine can answer. The read starts before the imports, but for an engine that is a server: that
    one imports while the snapshot is looked up."""

    def __init__(self, settings: Settings, timeline: Timeline, library: Literal["runpod", "uvicorn"]) -> None:
        """`library`: the one that brings requests."""
        self._settings = settings
        self._timeline = timeline
        self._library = library
        self._name = settings.engine
        self._reason = "as set by ENGINE"
        self._chosen_for: Snapshot | None = None
        self._loader: Loader | None = None

    def load(self) -> Engine:
        """The engine that serves the model. Raises what `begin` and the engine raise; nothing is left running then."""
        try:
            if self._name is None and vllm_choice.is_possible(self._settings):
                self._choose()
            return self._load(self._begin())
        except BaseException:
            if self._loader is not None:
                self._loader.cancel()
            raise

    def _choose(self) -> None:
        """Choose the engine by the model, before its weights are read: vLLM reads to another place than the others."""
        self._chosen_for = find_or_make(self._settings, self._timeline, self._check_config)
        self._name, self._reason = engine_of(self._chosen_for, self._settings)
        if self._name == "vllm":  # which understands more variables
            secrets = {secret: getattr(self._settings, secret) for secret in _SECRETS}
            self._settings = replace(Settings.from_env(engine="vllm"), **secrets)  # the environment has them no more

    def _begin(self) -> PendingStart:
        target = ENGINES[self._name].target if self._name else "device"
        if self._name and target == "shared":
            self._loader = self._import_engine(self._name).Loader(self._settings)
        pending = begin(
            self._settings,
            timeline=self._timeline,
            target=target,
            while_filling=self._import_beside,
            check_config=self._check_config,
        )
        if self._chosen_for is not None and self._chosen_for.key == pending.snapshot.key:
            note_outcome(self._timeline, self._chosen_for)
        return pending

    def _load(self, pending: PendingStart) -> Engine:
        try:
            name, reason = self._name, self._reason
            if name is None:
                name, reason = engine_for(pending.snapshot.config(), pending.snapshot.manifest.paths), "by the model"
            logger.info("the engine is %s: %s", name, reason)
            if self._settings.adapters and name not in _WITH_ADAPTERS:
                raise InvalidSetting(
                    f"MODEL_ADAPTERS is set, and the engine {name} serves none: unset it, or use {_WITH_ADAPTERS[0]}"
                )
            self._loader = self._loader or self._import_engine(name).Loader(self._settings)
            return self._loader.load(pending, self._import_server)
        except BaseException:
            pending.in_use.end()
            raise

    def _check_config(self, config: Mapping[str, Any], files: Collection[str], label: str) -> None:
        ENGINES[self._settings.engine or engine_for(config, files)].check_config(config, files, label)

    def _import_beside(self) -> None:
        """The imports while a snapshot is filled: its engine is known only with the model's own index."""
        self._import_engine(self._settings.engine or "text")
        self._import_server()

    def _import_engine(self, name: EngineName) -> ModuleType:
        entry = ENGINES[name]
        try:
            for each in entry.libraries[:-1]:
                with self._timeline.span("import", each):
                    import_module(each)
            with self._timeline.span("import", entry.libraries[-1]):
                module = import_module(f"handler.engines.{entry.module}")
                import_module("handler.worker")
        except ModuleNotFoundError as error:
            raise not_installed(error, entry.extra) from error
        take_library_logs()
        return module

    def _import_server(self) -> None:
        """The last import, because nothing before needs it."""
        with self._timeline.span("import", self._library):
            sdk.import_sdk() if self._library == "runpod" else import_module("handler.http_server")


def engine_of(snapshot: Snapshot, settings: Settings) -> tuple[EngineName, str]:
    """The engine for a snapshot if ENGINE is not set and vLLM is possible, and why."""
    config = snapshot.config()
    name = engine_for(config, snapshot.manifest.paths)
    if name == "text" and (architecture := vllm_choice.architecture_served(settings, config)):
        return "vllm", f"it is installed, there is a GPU, and it has {architecture}; ENGINE=text takes transformers"
    return name, "by the model"
