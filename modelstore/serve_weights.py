"""Serve a model's weights to vLLM on this host, under its own command: see `load/vllm_plugin.py`.

    python -m modelstore.serve_weights org/name

Finds the snapshot on the volume or makes it, prints a line of JSON (the folder, the socket, the dtype) once the small
files are there, and reads on. The memory is given back when all ranks have loaded; the snapshot stays in use, and the
folder in place, until standard input ends, as it does with the process that has started this one.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from modelstore.dtypes import DTYPES
from modelstore.errors import ModelStoreError, ProcessFailed
from modelstore.load.model_folder import ModelFolder
from modelstore.load.reader import Reading
from modelstore.load.weights_socket import WeightsServer, shared_files
from modelstore.logs import log_to_stderr
from modelstore.pending_start import PendingStart
from modelstore.reference import parse_reference
from modelstore.runtime import runtime_folder
from modelstore.settings import Settings
from modelstore.timeline import Timeline
from modelstore.volume import history
from modelstore.volume.layout import Layout, SnapshotKey
from modelstore.warmstart import begin

_IDLE_S = 10.0  # without a rank, after one has loaded: several engines of one server start beside each other
_UNUSED_S = 600.0  # without a rank that has loaded: vLLM reads the weights by itself
_POLL_S = 0.5


def main() -> int:
    log_to_stderr(logging.INFO, "%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        settings = replace(Settings.from_env(), model=parse_reference(sys.argv[1]))
        timeline = Timeline(worker=settings.worker_id, model=sys.argv[1], dtype=settings.dtype or "")
        served = _Served(begin(settings, timeline=timeline, target="shared"))
        try:
            served.run()
            threading.Event().wait()  # the snapshot stays in use
        finally:
            served.close()
    except ModelStoreError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


class _Served:
    """A start whose weights are served at a socket, in a folder; it says so on standard output, and reads on."""

    def __init__(self, pending: PendingStart) -> None:
        """Raises what ended the reading, if the damage cannot be mended."""
        self._in_use = pending.in_use
        self._timeline, self._layout = pending.timeline, Layout(pending.settings.root)
        self._reading: Reading | None = pending.reading
        self._key: SnapshotKey | None = None
        self._folder: ModelFolder | None = None
        self._server: WeightsServer | None = None
        self._place = TemporaryDirectory(prefix="weights-", dir=runtime_folder())
        try:
            pending.load(self._read)
        except BaseException:
            self.close()
            raise

    def run(self) -> None:
        """Return when all have loaded, and their memory is theirs alone."""
        assert self._server is not None
        read_at = time.monotonic()
        while time.monotonic() - max(self._server.idle_since, read_at) < (
            _IDLE_S if self._server.is_idle else _UNUSED_S
        ):
            time.sleep(_POLL_S)
        self._server.close()
        if self._reading is not None:
            self._reading.close()
            self._reading.release_memory()
        self._reading = None
        self._timeline.mark("ready")
        history.add(self._layout, self._timeline)

    def close(self) -> None:
        """Remove the folder, and give the rest back."""
        if self._server is not None:
            self._server.close()
        if self._reading is not None:
            self._reading.close()
        self._place.cleanup()
        if self._folder is not None:
            self._folder.close()
        self._in_use.end()

    def _read(self, pending: PendingStart) -> None:
        """Serve the start's reading until all has arrived; called again with another if that was damaged."""
        snapshot = pending.snapshot
        if self._key not in (None, snapshot.key):
            raise ProcessFailed(f"{self._key} was damaged, and its name leads to {snapshot.key} now: start vLLM again")
        self._key = snapshot.key
        self._reading, self._in_use = pending.reading, pending.in_use
        files = shared_files(snapshot, pending.reading)
        if self._server is None:
            self._folder = ModelFolder(snapshot, pending.reading)
            if not files:
                self._folder.check_plain()
            socket = Path(self._place.name) / "socket"
            self._server = WeightsServer(socket, self._folder.path)
            dtype = DTYPES[snapshot.key.dtype].torch_name
            print(json.dumps({"folder": str(self._folder.path), "socket": str(socket), "dtype": dtype}), flush=True)
        self._server.serve(pending.reading, files)
        pending.reading.wait_all()
        self._timeline.add(pending.reading.as_span(self._timeline))


def _end_with_parent() -> None:
    """End the process when the one that started it, and holds the other end of standard input, has ended."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
