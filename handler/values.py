"""The values of a request's fields, each checked against its type and its limits. Pure functions.

Each raises JobError whose text names the field, the limit and the value. A field that is null is a field that is not
there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handler.errors import invalid, shown


def flag(data: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """A switch. Raises JobError."""
    value = default if data.get(name) is None else data[name]
    if not isinstance(value, bool):
        raise invalid(f"{name} must be true or false, not {shown(value)}")
    return value


def integer(data: Mapping[str, Any], name: str, default: int, *, at_least: int, at_most: int) -> int:
    """A whole number within limits. Raises JobError."""
    value = default if data.get(name) is None else data[name]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value <= at_most:
        raise invalid(f"{name} must be an integer between {at_least} and {at_most}, not {shown(value)}")
    return value


def number(
    data: Mapping[str, Any],
    name: str,
    default: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float,
) -> float:
    """A number within limits. Raises JobError."""
    value = default if data.get(name) is None else data[name]
    usable = isinstance(value, int | float) and not isinstance(value, bool) and value <= at_most
    if not usable or (at_least is not None and value < at_least) or (above is not None and value <= above):
        low = f"at least {at_least:g}" if at_least is not None else f"above {above:g}"
        raise invalid(f"{name} must be a number {low} and at most {at_most:g}, not {shown(value)}")
    return float(value)


def token_ids(value: object, name: str, *, at_most: int) -> tuple[int, ...]:
    """A list of token ids, of at most so many. Raises JobError."""
    usable = isinstance(value, list) and len(value) <= at_most
    if not usable or not all(type(token) is int and 0 <= token < 1 << 31 for token in value):  # type: ignore[attr-defined]
        raise invalid(f"{name} must be a list of at most {at_most} token ids, each 0 or more, not {shown(value)}")
    return tuple(value)  # type: ignore[arg-type]


def objects(data: Mapping[str, Any], name: str, *, at_most: int) -> tuple[Mapping[str, Any], ...]:
    """A list of objects, of at most so many. Raises JobError."""
    value = [] if data.get(name) is None else data[name]
    if not isinstance(value, list) or len(value) > at_most or not all(isinstance(each, dict) for each in value):
        raise invalid(f"{name} must be a list of at most {at_most} objects, not {shown(value)}")
    return tuple(value)
