"""Whether a model can be served at all, told from its config before its weights are downloaded, and again at a start.

The table of `model_types.py` answers without an import; transformers is asked only about a type that is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from modelstore.errors import NotServable
from modelstore.model_types import generates, is_known

CheckConfig = Callable[[Mapping[str, Any], Collection[str], str], None]
"""Gets a model's config, its files by path, and its name in messages; raises NotServable."""

_MODULES_INDEX = "modules.json"  # of sentence-transformers


def check_nothing(_config: Mapping[str, Any], _files: Collection[str], _label: str) -> None:
    """For an engine that knows by itself which models it serves."""


def check_loadable(config: Mapping[str, Any], _files: Collection[str], label: str) -> None:
    """Raise NotServable if transformers has no model of this config's type."""
    name = config.get("model_type")
    if not isinstance(name, str) or not name or is_known(name) or config.get("auto_map"):
        return
    try:
        from transformers import CONFIG_MAPPING
    except ModuleNotFoundError:
        return
    if name not in CONFIG_MAPPING:
        raise NotServable(f"{label}: model type {name!r} is unknown to transformers {_version()}: upgrade transformers")


def check_generates_text(config: Mapping[str, Any], files: Collection[str], label: str) -> None:
    """Raise NotServable if the model generates no text."""
    check_loadable(config, files, label)
    if _MODULES_INDEX in files:
        raise NotServable(
            f"{label} is an embedding model and generates no text: name a language model, or load the folder that "
            "`modelstore path` prints with sentence-transformers"
        )
    if not config:
        raise NotServable(f"{label} has no config.json, which names its class: name a language model")
    named = config.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    known = {name: answer for name in names if (answer := generates(name)) is not None}
    if known and not any(known.values()):
        raise NotServable(
            f"{label} is an encoder or another model without a language head ({names[0]}) and generates no text: "
            "name a language model"
        )


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # it takes 10 ms, for an error alone

    try:
        return version("transformers")
    except PackageNotFoundError:
        return "here"
