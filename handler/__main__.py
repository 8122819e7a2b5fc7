"""Start a worker: the read first, then the imports, then the model, then jobs.

    MODEL_ID=org/name python -m handler [--rp_serve_api | --test_input JSON]

Arguments are the RunPod SDK's. A start that fails exits with the error's code and its reason as the last line.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from modelstore.errors import ModelStoreError
from modelstore.settings import Settings
from modelstore.timeline import Timeline
from modelstore.warmstart import begin, without_collecting

if TYPE_CHECKING:
    from modelstore.reader import Reading

logger = logging.getLogger("handler")


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        with without_collecting():
            serve = start()
    except ModelStoreError as error:
        return _failed(f"{type(error).__name__}: {error}", error.exit_code)
    except Exception as error:
        logger.exception("the start failed")
        return _failed(f"{type(error).__name__}: {' '.join(str(error).split())[:2000]}", 1)
    serve()
    return 0


def start() -> Callable[[], None]:
    """Load the engine, log the timeline; returns what serves jobs."""
    settings = Settings.from_env()
    timeline = Timeline(worker=settings.worker_id, model=str(settings.model), dtype=settings.dtype)

    def import_engine() -> None:
        with timeline.span("import"):
            import handler.engines.text
            import handler.worker  # noqa: F401

    def import_sdk() -> None:
        with timeline.span("import"):
            import runpod  # noqa: F401  last, because nothing before needs it

    def beside_a_download(reading: Reading) -> object:
        import_engine()
        from modelstore.tensors import place_early

        weights = place_early(reading, timeline)
        import_sdk()
        return weights

    begun = begin(settings, timeline=timeline, meanwhile=beside_a_download)
    import_engine()
    from handler.engines.several import Several
    from handler.engines.text import TextEngine
    from handler.worker import serve

    def load_another(wanted: Settings) -> TextEngine:
        return begin(wanted, timeline=Timeline()).load(TextEngine.load)

    own = begun.load(partial(TextEngine.load, meanwhile=import_sdk))
    engine = Several(own, settings, load_another)
    timeline.mark("ready")
    print(timeline.log_line(), file=sys.stderr, flush=True)
    return partial(serve, engine, settings, timeline.as_json())


def _failed(reason: str, code: int) -> int:
    print(f"start failed: {reason[:3000]}", file=sys.stderr, flush=True)  # RunPod cuts lines at 4096 characters
    return code


if __name__ == "__main__":
    sys.exit(main())
