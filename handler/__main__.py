"""Start a worker: the read first, then the imports, then the model, then jobs.

    MODEL_ID=org/name python -m handler [--rp_serve_api | --test_input JSON]
    MODEL_ID=org/name python -m handler --http [--host ADDRESS] [--port NUMBER]

Without --http, arguments are the RunPod SDK's. A start that fails exits with the error's code and its reason as the
last line.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from handler import readahead, sdk
from handler.engines import ENGINES, engine_for, vllm_choice
from handler.first_answer import FirstAnswer
from handler.privileges import become_owner_of
from handler.redaction import VolumePaths
from handler.start_failure import tell_waiting_jobs
from modelstore.environment import forget_secrets
from modelstore.errors import InvalidSetting, ModelStoreError, not_installed
from modelstore.logs import LINE_CHARACTERS, log_to_stderr, take_library_logs
from modelstore.settings import EngineName, Settings, ineffective
from modelstore.startup import gc_paused
from modelstore.timeline import Timeline
from modelstore.units import one_line
from modelstore.volume import history
from modelstore.volume.layout import Layout
from modelstore.warmstart import begin, find_or_make, note_outcome

if TYPE_CHECKING:
    from types import ModuleType

    from handler.engines import Engine, Loader
    from handler.listening import Listening
    from modelstore.volume.snapshots import Snapshot

logger = logging.getLogger("handler")

_WITH_ADAPTERS: Sequence[EngineName] = ("text", "vllm")


def main() -> int:
    log_to_stderr(logging.INFO, "%(levelname)s %(name)s: %(message)s")
    try:
        with gc_paused():
            serve = start()
    except ModelStoreError as error:
        return _failed(f"{type(error).__name__}: {error}", error.exit_code)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a library's panic too
        logger.exception("the start failed")
        return _failed(f"{type(error).__name__}: {error}", 1)
    serve()
    return 0


def start() -> Callable[[], None]:
    """Load the engine, log the timeline, keep it on the volume; returns the function that serves jobs. A start that
    fails tells the waiting jobs why."""
    paths: VolumePaths | None = None
    try:
        settings = Settings.from_env()
        for line in ineffective():
            logger.warning("%s", line)
        paths = VolumePaths(settings.root)
        return _start_engine(settings, _listening(sys.argv[1:], settings))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        tell_waiting_jobs(f"{type(error).__name__}: {error}", paths)
        raise


def _listening(arguments: Sequence[str], settings: Settings) -> Listening | None:
    """The open ports of a worker that serves HTTP."""
    if "--http" not in arguments:
        return None
    from handler.listening import Address, Listening  # asyncio is imported later otherwise

    address = Address.of(arguments, settings)
    return Listening(address, settings.health_path)


def _start_engine(settings: Settings, listening: Listening | None) -> Callable[[], None]:
    forget_secrets()
    become_owner_of(settings.root)  # forks, so no thread may run before; the port may be root's to open
    if listening is not None:
        listening.begin()
    readahead.begin()
    timeline = Timeline(worker=settings.worker_id, model=str(settings.model or ""), dtype=settings.dtype or "")
    layout = Layout(settings.root)
    try:
        engine = _load_engine(settings, timeline, "runpod" if listening is None else "uvicorn")
        from handler.compilation import compile_model
        from handler.warm_up import warm_up

        compile_model(engine, settings, timeline)
        warm_up(engine, settings, timeline)
        if listening is not None:
            _check(engine)  # RunPod's SDK checks a worker itself before its first job
    except BaseException as error:
        history.add(layout, timeline, error=f"{type(error).__name__}: {error}")
        raise
    timeline.mark("ready")
    print(timeline.log_line(), file=sys.stderr, flush=True)
    first_answer = FirstAnswer(history.add(layout, timeline), timeline.began)
    if listening is not None:
        from handler.http_server import serve_http

        return partial(serve_http, engine, settings, timeline.as_json(), listening, first_answer)
    from handler.worker import serve

    return partial(serve, engine, settings, timeline.as_json(), first_answer)


def _check(engine: Engine) -> None:
    """Raise ModelStoreError, and close the engine, if it does not serve what the volume's records name."""
    try:
        engine.check()
    except BaseException:
        engine.close()
        raise


def _load_engine(settings: Settings, timeline: Timeline, library: Literal["runpod", "uvicorn"]) -> Engine:
    """The engine that serves the model; `library` brings it requests. The read starts before the imports, but for an
    engine that is a server: that one imports while the snapshot is looked up."""

    def import_engine(name: EngineName) -> ModuleType:
        entry = ENGINES[name]
        try:
            for each in entry.libraries[:-1]:
                with timeline.span("import", each):
                    import_module(each)
            with timeline.span("import", entry.libraries[-1]):
                module = import_module(f"handler.engines.{entry.module}")
                import_module("handler.worker")
        except ModuleNotFoundError as error:
            raise not_installed(error, entry.extra) from error
        take_library_logs()
        return module

    def import_server() -> None:  # last, because nothing before needs it
        with timeline.span("import", library):
            sdk.import_sdk() if library == "runpod" else import_module("handler.http_server")

    def while_filling() -> None:
        import_engine(settings.engine or "text")  # the engine is known only with the model's own index
        import_server()

    def check_config(config: Mapping[str, Any], files: Collection[str], label: str) -> None:
        ENGINES[settings.engine or engine_for(config, files)].check_config(config, files, label)

    name, reason = settings.engine, "as set by ENGINE"
    chosen: Snapshot | None = None
    if name is None and vllm_choice.is_possible(settings):
        chosen = find_or_make(settings, timeline, check_config)  # vLLM reads to another place than the others
        name, reason = _engine_of(chosen, settings)
        if name == "vllm":  # which understands more variables
            secrets = {name: getattr(settings, name) for name in ("hf_token", "engine_cache_key", "api_key")}
            settings = replace(Settings.from_env(engine="vllm"), **secrets)  # the environment has them no more
    target = ENGINES[name].target if name else "device"
    loader: Loader | None = None
    if name and target == "shared":
        loader = import_engine(name).Loader(settings)
    try:
        pending = begin(
            settings, timeline=timeline, target=target, while_filling=while_filling, check_config=check_config
        )
        if chosen is not None and chosen.key == pending.snapshot.key:
            note_outcome(timeline, chosen)
        try:
            if name is None:
                name, reason = engine_for(pending.snapshot.config(), pending.snapshot.manifest.paths), "by the model"
            logger.info("the engine is %s: %s", name, reason)
            if settings.adapters and name not in _WITH_ADAPTERS:
                raise InvalidSetting(
                    f"MODEL_ADAPTERS is set, and the engine {name} serves none: unset it, or use {_WITH_ADAPTERS[0]}"
                )
            loader = loader or import_engine(name).Loader(settings)
            return loader.load(pending, import_server)
        except BaseException:
            pending.in_use.end()
            raise
    except BaseException:
        if loader is not None:
            loader.cancel()
        raise


def _engine_of(snapshot: Snapshot, settings: Settings) -> tuple[EngineName, str]:
    """The engine for a snapshot if ENGINE is not set and vLLM is possible, and why."""
    config = snapshot.config()
    name = engine_for(config, snapshot.manifest.paths)
    if name == "text" and (architecture := vllm_choice.architecture_served(settings, config)):
        return "vllm", f"it is installed, there is a GPU, and it has {architecture}; ENGINE=text takes transformers"
    return name, "by the model"


def _failed(reason: str, code: int) -> int:
    print(f"start failed: {one_line(reason, LINE_CHARACTERS)}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
