"""Serve a model's weights to vLLM on this host, under its own command: see `load/vllm_plugin.py`.

    python -m modelstore.serve_weights org/name

Finds the snapshot on the volume or makes it, prints a line of JSON (the folder, the socket, the dtype) once the small
files are there, and reads on. The memory is given back when every rank has loaded; the snapshot stays in use, and the
folder in place, until standard input ends, as it does with the process that has started this one.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from modelstore.dtypes import DTYPES
from modelstore.errors import ModelStoreError
from modelstore.load.model_folder import ModelFolder, runtime_folder
from modelstore.load.reader import Reading
from modelstore.load.weights_socket import WeightsServer, shared_files
from modelstore.logs import log_to_stderr
from modelstore.reference import parse_reference
from modelstore.settings import Settings
from modelstore.timeline import Timeline
from modelstore.volume import history
from modelstore.volume.layout import Layout
from modelstore.warmstart import PendingStart, begin

logger = logging.getLogger(__name__)


def main() -> int:
    log_to_stderr(logging.INFO, "%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        settings = replace(Settings.from_env(), model=parse_reference(sys.argv[1]))
        timeline = Timeline(worker=settings.worker_id, model=sys.argv[1], dtype=settings.dtype or "")
        with _Served(begin(settings, timeline=timeline, target="shared")):
            threading.Event().wait()
    except ModelStoreError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


class _Served:
    """A start whose weights are served at a socket, in a folder; it says so on standard output, and reads on."""

    def __init__(self, pending: PendingStart) -> None:
        """Raises what ended the reading, if the damage cannot be mended."""
        snapshot = pending.snapshot
        self._in_use = pending.in_use
        self._timeline, self._layout = pending.timeline, Layout(pending.settings.root)
        self._reading: Reading | None = pending.reading
        self._loaded = 0
        self._folder: ModelFolder | None = None
        self._place = TemporaryDirectory(prefix="weights-", dir=runtime_folder())
        try:
            self._folder = ModelFolder(snapshot, pending.reading)
            socket = Path(self._place.name) / "socket"
            self._server = WeightsServer(socket, self._folder.path, loaded=self._take_loaded)
            dtype = DTYPES[snapshot.key.dtype].torch_name
            print(json.dumps({"folder": str(self._folder.path), "socket": str(socket), "dtype": dtype}), flush=True)
            pending.load(self._read)
        except BaseException:
            self._close()
            raise
        self._in_use = pending.in_use

    def __enter__(self) -> None: ...

    def __exit__(self, *_error: object) -> None:
        self._server.close()
        self._close()

    def _read(self, pending: PendingStart) -> None:
        """Serve the start's reading until all has arrived; called again with another if that was damaged."""
        self._reading = pending.reading
        self._server.serve(pending.reading, shared_files(pending.snapshot, pending.reading))
        pending.reading.wait_all()
        self._timeline.add(pending.reading.as_span(self._timeline))

    def _take_loaded(self, ranks: int) -> None:
        self._loaded += 1
        if self._loaded == ranks and self._reading is not None:
            self._server.close()
            self._reading.close()
            self._reading = None  # its memory is free when the last rank has let go of it
            self._timeline.mark("ready")
            history.add(self._layout, self._timeline)

    def _close(self) -> None:
        if self._reading is not None:
            self._reading.close()
        self._place.cleanup()
        if self._folder is not None:
            self._folder.close()
        self._in_use.end()


def _end_with_parent() -> None:
    """End the process when the one that started it, and holds the other end of standard input, has ended."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
