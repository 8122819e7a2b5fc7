"""Figures and texts as a person reads them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any


def size(count: float) -> str:
    """Bytes for a person."""
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= length:
            return f"{count / length:.2f} {unit}"
    return f"{count / 1e3:.1f} kB" if count >= 1e3 else f"{count:.0f} B"


def counted(count: int, noun: str) -> str:
    """A number of things: `1 model`, `7 models`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def those(count: int, noun: str) -> str:
    """The same, for a question: `this model`, `these 7 models`."""
    return f"this {noun}" if count == 1 else f"these {count} {noun}s"


def printable(text: str) -> str:
    """A foreign text with control and unprintable characters replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def printable_lines(text: str) -> str:
    """The same for a text of several lines."""
    return "\n".join(map(printable, text.split("\n")))


def one_line(text: str, limit: int) -> str:
    """A foreign text, as a log or an error may quote it: one line of at most `limit` characters,
    without control and unprintable characters."""
    if len(text) > limit:
        text = text[: limit - 3] + "..."
    return printable(" ".join(text.split()))


def first_names(names: Sequence[str], most: int = 3) -> str:
    """The first names of many, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def truth(text: str) -> bool | None:
    """`1`, `true`, `yes` or `on` as True, their opposites as False; None for any other text."""
    word = text.strip().lower()
    return True if word in ("1", "true", "yes", "on") else False if word in ("0", "false", "no", "off") else None


def clock(seconds: float) -> str:
    """A moment, in seconds since 1970, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def span(seconds: float) -> str:
    """A length of time for a person, in the largest unit that it rounds to one of."""
    for unit, length, smaller in (("d", 86400, 3600), ("h", 3600, 60), ("min", 60, 1)):
        if round(seconds / smaller) * smaller >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def ago(seconds: float) -> str:
    """A time in the past for a person."""
    return f"{span(seconds)} ago"


def variant(record: Mapping[str, Any]) -> str:
    """The variant in a snapshot's record: `float16`, `float16 compressed`."""
    return f"{record['dtype']}{' compressed' if record.get('compressed') else ''}"
