"""What a fill knows of the model types of transformers and the models of diffusers, without importing either.

The table, `model_types.json`, is made by `scripts/dev/model_types.py`, whose docstring explains its entries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any

_EVERYWHERE = frozenset({"weight", "bias", "gamma", "beta", "weight_g", "weight_v", "original0", "original1"})


def is_known(model_type: object) -> bool:
    """Whether transformers had this model type when the table was made."""
    return isinstance(model_type, str) and model_type in _table()["model_types"]


def generates(class_name: str) -> bool | None:
    """Whether a class of transformers generates text; None if it is not in the table."""
    return _classes().get(class_name)


def type_generates(model_type: str) -> bool:
    """Whether a class of this type generates text; True for a type that is not in the table."""
    return not is_known(model_type) or any(_table()["model_types"][model_type].get("classes", {}).values())


def unbuildable(model_type: str) -> str:
    """Why the table may miss weights of a known type; empty if it does not."""
    return str(_table()["model_types"][model_type].get("unbuildable", ""))


def kept_patterns(model_types: Collection[str], *, float16: bool) -> set[str]:
    """Patterns of the weights that these known types keep in float32; `float16`: also those that bfloat16 lets go."""
    patterns: set[str] = set()
    for name in model_types:
        entry = _table()["model_types"][name]
        patterns |= {*entry.get("both", ()), *(entry.get("float16", ()) if float16 else ())}
    return patterns


def is_unloaded(tensor: str, model_types: Collection[str]) -> bool:
    """Whether no class of these known types loads a tensor of this name, told by its last part; False if that cannot be
    told."""
    name = tensor.rpartition(".")[2]
    entries = [_table()["model_types"][model_type] for model_type in model_types]
    if not entries or name in _EVERYWHERE:
        return False
    return not any("unbuildable" in entry or name in entry.get("names", ()) for entry in entries)


def is_tied(tensor: str, model_types: Collection[str]) -> bool:
    """Whether a weight of this name is, in one of these known types, another weight under a second name."""
    patterns = [p for name in model_types for p in _table()["model_types"][name].get("tied", ())]
    return any(re.search(f"(^|\\.)(?:{pattern.lstrip('^')})", tensor) for pattern in patterns)


def kept_parts(class_name: str) -> list[str] | None:
    """The parts of names that a model of diffusers keeps in float32; None for one that is not in the table."""
    kept: list[str] | None = _table()["diffusers_classes"].get(class_name)
    return kept


def model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """The `model_type` of a config and of the configs inside it."""
    if isinstance(name := config.get("model_type"), str) and name:
        yield name
    for value in config.values():
        if isinstance(value, dict):
            yield from model_types(value)


@cache
def _classes() -> dict[str, bool]:
    return {
        name: answer for entry in _table()["model_types"].values() for name, answer in entry.get("classes", {}).items()
    }


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(resources.files("modelstore").joinpath("model_types.json").read_bytes())
    return table
