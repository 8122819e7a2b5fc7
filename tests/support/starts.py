"""Records of starts."""

from __future__ import annotations

from typing import Any

from modelstore.timeline import Span, Timeline


def timeline(**changes: Any) -> Timeline:
    made = Timeline(worker="w/1", model="org/name", commit="c" * 40, dtype="float16", outcome="hit", reason="there")
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def with_spans(made: Timeline, *spans: Span) -> Timeline:
    for span in spans:
        made.add(span)
    return made
