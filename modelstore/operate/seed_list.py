"""A list of models that a volume shall hold, as a TOML file that people keep beside their code.

[[model]]
reference = "org/name@main"       # as `modelstore seed` takes it
dtype = "bfloat16"                # from here on, all keys are optional
overflow = "bfloat16"
aliases = ["chat"]
pin = true
compress = true
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelstore.dtypes import OVERFLOWS, Dtype, Overflow, parse_dtype
from modelstore.errors import InvalidReference, InvalidSetting, UsageError
from modelstore.reference import Reference, parse_reference
from modelstore.volume import aliases

_KEYS: Mapping[str, tuple[type, str]] = {
    "reference": (str, "a string"),
    "dtype": (str, "a string"),
    "overflow": (str, " or ".join(OVERFLOWS)),
    "aliases": (list, "a list of names"),
    "pin": (bool, "true or false"),
    "compress": (bool, "true or false"),
}


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A model for the volume, and its names there."""

    reference: Reference
    dtype: Dtype | None = None
    overflow: Overflow = "stop"
    aliases: tuple[str, ...] = ()
    pin: bool = False
    compress: bool | None = None


def read_list(path: Path) -> tuple[ListedModel, ...]:
    """The models that a file names. Raises UsageError with the entry and its error."""
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no TOML file: {error}") from error
    entries = data.pop("model", None)
    if data or not isinstance(entries, list) or not entries:
        extra = f", not {', '.join(data)}" if data else ""
        raise UsageError(f"{path} must hold tables [[model]]{extra}: see `modelstore seed --help`")
    models = []
    for number, entry in enumerate(entries, 1):
        try:
            models.append(_listed_model(entry))
        except (UsageError, InvalidReference, InvalidSetting) as error:
            raise UsageError(f"{path}: model {number}: {error}") from error
    names = [name for model in models for name in model.aliases]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"{path}: the alias {min(twice)} is given to two models")
    return tuple(models)


def _listed_model(entry: Any) -> ListedModel:
    if not isinstance(entry, dict) or "reference" not in entry:
        raise UsageError('it has no reference, as in reference = "org/name"')
    for name, value in entry.items():
        if name not in _KEYS:
            raise UsageError(f"{name} is not known: use {', '.join(_KEYS)}")
        kind, meant = _KEYS[name]
        if not isinstance(value, kind):
            raise UsageError(f"{name} must be {meant}, not {value!r}")
    reference = parse_reference(entry["reference"])
    if reference.kind == "alias":
        raise UsageError(f"{reference} is an alias: name the model itself, and the alias in aliases")
    overflow = entry.get("overflow", "stop")
    if overflow not in OVERFLOWS:
        raise UsageError(f"overflow must be {' or '.join(OVERFLOWS)}, not {overflow!r}")
    return ListedModel(
        reference,
        parse_dtype("dtype", entry["dtype"]) if "dtype" in entry else None,
        overflow,
        tuple(aliases.checked(str(name).removeprefix("@")) for name in entry.get("aliases", [])),
        entry.get("pin", False),
        entry.get("compress"),
    )
