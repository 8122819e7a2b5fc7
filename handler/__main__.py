"""Start a worker: the read first, then the imports, then the model, then jobs.

    MODEL_ID=org/name python -m handler [--rp_serve_api | --test_input JSON]
    MODEL_ID=org/name python -m handler --http [--host ADDRESS] [--port NUMBER]

Without --http, arguments are the RunPod SDK's. A start that fails exits with the error's code and its reason as the
last line.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from handler import readahead
from handler.engine_start import EngineStart
from handler.first_answer import FirstAnswer
from handler.privileges import become_owner_of
from handler.redaction import VolumePaths
from handler.start_failure import tell_waiting_jobs
from modelstore.environment import forget_secrets
from modelstore.errors import ModelStoreError
from modelstore.logs import LINE_CHARACTERS, log_to_stderr
from modelstore.settings import Settings, ineffective
from modelstore.startup import gc_paused
from modelstore.timeline import Timeline
from modelstore.units import one_line
from modelstore.volume import history
from modelstore.volume.layout import Layout

if TYPE_CHECKING:
    from handler.engines import Engine
    from handler.listening import Listening

logger = logging.getLogger("handler")


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
        engine = EngineStart(settings, timeline, "runpod" if listening is None else "uvicorn").load()
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


def _failed(reason: str, code: int) -> int:
    print(f"start failed: {one_line(reason, LINE_CHARACTERS)}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
