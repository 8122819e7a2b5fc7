"""torch.compile of an engine's model before a worker takes jobs (MODELSTORE_COMPILE).

Small jobs, greedy and with a fixed seed, have the model compiled. Code that another worker compiled for the same facts
is restored before (`engines/compiled_code.py`), and has to give the answer that it gave there. Nothing here ends a
start: a model that cannot be compiled, or that answers otherwise with restored code, runs as it is.
"""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import json
import logging
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from handler.engines import ENGINES, Compiles, Engine
from handler.engines.compiled_code import CompiledCode
from handler.errors import Code
from handler.worker import Worker
from modelstore.environment import set_variables
from modelstore.settings import EngineName, Settings
from modelstore.timeline import Timeline
from modelstore.volume.layout import SnapshotKey

logger = logging.getLogger(__name__)

_LIMIT_S = 1800.0  # for each job: compiling takes longer than any other
_COMPILERS = ("c++", "g++", "clang++")
_LIBRARIES = ("torch", "triton", "transformers", "diffusers", "accelerate", "peft", "numpy", "runpod-modelstore")


def compile_model(engine: Engine, settings: Settings, timeline: Timeline) -> None:
    """Have an engine's model compiled, if MODELSTORE_COMPILE says so, and leave the code for the next worker, if
    MODELSTORE_ENGINE_CACHE does."""
    if not settings.compile:
        return
    status = engine.status()
    name: EngineName = status["engine"]
    reason = _obstacle(engine, name, str(status.get("memory", {}).get("device", "cpu")))
    if reason:
        logger.warning("the model is not compiled, and runs as it is: %s", reason)
        return
    assert isinstance(engine, Compiles)
    with timeline.span("compile"):
        code = CompiledCode.of(settings)
        try:
            if code is not None:
                atexit.register(code.close)
                set_variables(code.environment)
                code.restore(SnapshotKey(status["model"], status["commit"], status["dtype"]), _facts(name))
            engine.compile()
            answer, error = asyncio.run(_answered(engine, settings, ENGINES[name].compile_jobs))
        except Exception as failure:  # of torch, or of the model's library: of any class
            answer, error = "", {"error": f"{type(failure).__name__}: {failure}"}
        if error is None and (code is None or code.is_right(answer)):
            if code is not None:
                code.publish(answer)
            return
        engine.run_uncompiled()
        logger.warning("the model runs as it is: %s", error or "with restored code it answers otherwise than without")
        if code is not None and code.is_restored and _is_of_the_code(error):
            code.quarantine()


def _is_of_the_code(error: Mapping[str, Any] | None) -> bool:
    """Whether a wrong answer, or an error, tells that restored code is bad for every worker."""
    return error is None or error.get("code") not in (Code.OOM, Code.TIMEOUT)


def _obstacle(engine: Engine, name: EngineName, device: str) -> str:
    """Why a model cannot be compiled; empty if nothing is known against it."""
    if not isinstance(engine, Compiles):
        return f"the engine {name} does not compile by MODELSTORE_COMPILE"
    if device == "cpu" and not any(map(shutil.which, _COMPILERS)):
        return "torch.compile needs a C++ compiler for the CPU: install g++"
    if device != "cpu" and find_spec("triton") is None:
        return "torch.compile needs triton for the GPU: install it"
    return ""


def _facts(name: EngineName) -> Mapping[str, Any]:
    """What compiled code depends on, beside the machine and the model."""
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return {"engine": name, "versions": versions}


async def _answered(
    engine: Engine, settings: Settings, jobs: Sequence[Mapping[str, Any]]
) -> tuple[str, Mapping[str, Any] | None]:
    """A digest of an engine's answers to these jobs, and the output of the first that fails."""
    worker = Worker(engine, replace(settings, max_job_s=_LIMIT_S), may_upload=False)
    digest = hashlib.sha256()
    for each in jobs:
        output = await worker.handle({"id": "compile", "input": dict(each)})
        if "error" in output:
            return "", output
        digest.update(json.dumps(output, sort_keys=True).encode())
    return digest.hexdigest(), None
