"""Whether vLLM serves a model if ENGINE is not set: it is installed, there is a GPU, and it has the model's class."""

from __future__ import annotations

import ast
import logging
import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modelstore.load.memory import gpus
from modelstore.settings import Settings

logger = logging.getLogger(__name__)

_TABLES = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS")  # of vllm/model_executor/models/registry.py
_ASK_S = 20.0


def is_possible(settings: Settings) -> bool:
    """Whether there is a GPU and a vLLM."""
    return bool(gpus(settings.visible_gpus)) and _package(settings.vllm_python) is not None


def architecture_served(settings: Settings, config: Mapping[str, Any]) -> str:
    """The model's class, if vLLM has one for it; else empty."""
    package = _package(settings.vllm_python)
    known = _architectures(package) if package is not None else frozenset()
    named = config.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    return next((name for name in names if name in known), "")


def _package(python: Path | None) -> Path | None:
    """The folder of vLLM's package, in this environment or that of another interpreter; it is not imported."""
    if python is None:
        spec = find_spec("vllm")
        places = spec.submodule_search_locations if spec is not None else None
        return Path(next(iter(places))) if places else None
    code = "from importlib.util import find_spec; print(find_spec('vllm').submodule_search_locations[0])"
    try:
        process = subprocess.run(
            [python, "-c", code], cwd="/", capture_output=True, text=True, timeout=_ASK_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return Path(process.stdout.strip())


def _architectures(package: Path) -> frozenset[str]:
    """The names in vLLM's tables of models, read from their source: to import it takes seconds."""
    path = package / "model_executor" / "models" / "registry.py"
    try:
        tree = ast.parse(path.read_text())
    except (OSError, SyntaxError, ValueError) as error:
        logger.info("vLLM's models are not known, so ENGINE has to name it: %s", error)
        return frozenset()
    names: set[str] = set()
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        is_table = any(isinstance(target, ast.Name) and target.id in _TABLES for target in targets)
        if is_table and isinstance(value := getattr(node, "value", None), ast.Dict):
            names |= {key.value for key in value.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
    return frozenset(names)
