"""`vllm serve`, with its imports done before the model is known.

    python vllm_server.py < one line, a JSON list of the arguments

Runs as a file, under the interpreter that has vLLM, which need not have anything of ours. Nothing of vLLM is used but
its command: its options and its routes are the documented ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_NEEDED = ("vllm.v1.engine.async_llm", "vllm.entrypoints.openai.api_server", "vllm.entrypoints.cli.serve")


def main() -> int:
    sys.path.pop(0)  # our own files, whose names are not for vLLM to find
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        return 1  # the parent has ended meanwhile
    from vllm.entrypoints.cli.main import main as vllm

    for name in _NEEDED:
        with contextlib.suppress(ImportError):  # names move from release to release: `serve` does its own imports
            importlib.import_module(name)
    line = sys.stdin.readline()
    if not line:
        return 0
    sys.argv = ["vllm", *json.loads(line)]
    vllm()
    return 0


if __name__ == "__main__":
    sys.exit(main())
