"""A command on a terminal of its own, with an answer to its question."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time


def on_terminal(arguments: list[str], env: dict[str, str], *, answer: str, timeout_s: float = 60) -> str:
    """All that `modelstore` with these arguments prints on a terminal; `answer` is typed when it asks."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "modelstore", *arguments],
        stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | env | {"COLUMNS": "200"}, close_fds=True,
    )  # fmt: skip
    os.close(theirs)
    shown, answered, until = b"", False, time.monotonic() + timeout_s
    try:
        while time.monotonic() < until:
            ready, _, _ = select.select([ours], [], [], 0.1)
            try:
                data = os.read(ours, 65536) if ready else b""
            except OSError:  # the other end is closed
                break
            shown += data
            if not answered and b"[y/N]" in shown:
                os.write(ours, f"{answer}\n".encode())
                answered = True
            if not ready and process.poll() is not None:
                break
        process.wait(timeout_s)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return shown.decode(errors="replace").replace("\r\n", "\n")
