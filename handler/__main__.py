"""Start a worker: the read first, then the imports, then the model, then jobs.

    MODEL_ID=org/name python -m handler [--rp_serve_api | --test_input JSON]

Arguments are the RunPod SDK's. A start that fails exits with the error's code and its reason as the last line.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from handler.privileges import become_owner_of
from modelstore.errors import ModelStoreError, NotFound
from modelstore.logs import LINE_CHARACTERS, log_to_stderr, take_library_logs
from modelstore.settings import EngineName, Settings, forget_hub_tokens
from modelstore.startup import without_collecting
from modelstore.timeline import Timeline
from modelstore.units import one_line
from modelstore.volume import history
from modelstore.volume.layout import Layout
from modelstore.warmstart import Begun, begin

if TYPE_CHECKING:
    from handler.engines import Engine
    from modelstore.load.reader import Reading
    from modelstore.volume.snapshots import Snapshot

_MODULES: Mapping[EngineName, str] = {"text": "text", "diffusion": "diffusion", "vllm": "vllm_engine"}

logger = logging.getLogger("handler")


def main() -> int:
    log_to_stderr(logging.INFO, "%(levelname)s %(name)s: %(message)s")
    try:
        with without_collecting():
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
    """Load the engine, log the timeline, keep it on the volume; returns what serves jobs."""
    settings = Settings.from_env()
    forget_hub_tokens()
    become_owner_of(settings.root)
    timeline = Timeline(worker=settings.worker_id, model=str(settings.model), dtype=settings.dtype)
    layout = Layout(settings.root)
    try:
        engine = _loaded(settings, timeline)
        from handler.worker import serve
    except BaseException as error:
        history.add(layout, timeline, error=f"{type(error).__name__}: {error}")
        raise
    timeline.mark("ready")
    print(timeline.log_line(), file=sys.stderr, flush=True)
    history.add(layout, timeline)
    return partial(serve, engine, settings, timeline.as_json())


def _loaded(settings: Settings, timeline: Timeline) -> Engine:
    def import_engine(name: EngineName) -> None:
        with timeline.span("import"):
            try:
                import_module(f"handler.engines.{_MODULES[name]}")
            except ModuleNotFoundError as error:
                extra = "worker" if name == "text" else name
                raise NotFound(f"{error.name} is not installed: pip install 'runpod-modelstore[{extra}]'") from error
            import handler.worker  # noqa: F401

            take_library_logs()

    def import_sdk() -> None:
        with timeline.span("import"):
            import runpod  # noqa: F401  last, because nothing before needs it

    def beside_a_download(reading: Reading) -> object:
        import_engine(settings.engine or "text")  # what it will be is known only with the model's own index
        from modelstore.load.tensors import place_early

        weights = place_early(reading, timeline)
        import_sdk()
        return weights

    if settings.engine == "vllm":
        logger.info("the engine is vllm: as set by ENGINE")
        import_engine("vllm")
        return _with_vllm(settings, timeline, import_sdk)
    begun = begin(settings, timeline=timeline, meanwhile=beside_a_download)
    name = settings.engine or _engine_for(begun.snapshot)
    logger.info("the engine is %s: %s", name, "as set by ENGINE" if settings.engine else "by what the snapshot holds")
    import_engine(name)
    return (_drawing if name == "diffusion" else _writing)(begun, import_sdk)


def _engine_for(snapshot: Snapshot) -> EngineName:
    """A pipeline has an index; anything else is a model."""
    return "diffusion" if snapshot.manifest.file("model_index.json") else "text"


def _writing(begun: Begun, meanwhile: Callable[[], None]) -> Engine:
    from handler.engines.batcher import free_memory
    from handler.engines.chat_template import Renderer
    from handler.engines.multi import Several
    from handler.engines.text import TextEngine

    renderer = Renderer()

    def load_another(wanted: Settings) -> TextEngine:
        free_memory()  # what torch keeps for itself would count as taken
        begun = begin(wanted, timeline=Timeline())
        try:
            return begun.load(partial(TextEngine.load, renderer=renderer))
        except BaseException:
            begun.in_use.end()
            raise

    own = begun.load(partial(TextEngine.load, meanwhile=meanwhile, renderer=renderer))
    renderer.start()
    return Several(own, begun.settings, load_another)


def _with_vllm(settings: Settings, timeline: Timeline, meanwhile: Callable[[], None]) -> Engine:
    from handler.engines.vllm_engine import Server, VllmEngine

    server = Server(settings.vllm_python)  # it imports vLLM beside all that follows
    try:
        begun = begin(settings, timeline=timeline, into="shared")
        meanwhile()
        try:
            return begun.load(partial(VllmEngine.load, server))
        except BaseException:
            begun.in_use.end()
            raise
    except BaseException:
        server.end()
        raise


def _drawing(begun: Begun, meanwhile: Callable[[], None]) -> Engine:
    from handler.engines.diffusion import DiffusionEngine

    return begun.load(partial(DiffusionEngine.load, meanwhile=meanwhile))


def _failed(reason: str, code: int) -> int:
    print(f"start failed: {one_line(reason, LINE_CHARACTERS)}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
