"""The spans of one start: what took how long, and why.

    {"worker": "…", "model": "org/name", "commit": "…", "dtype": "float16", "outcome": "hit", "reason": "…",
     "pid": 7, "spans": [{"name": "read", "start": 0.41, "end": 5.9, "bytes": 1700000000, "bytes_per_s": 309653916.2}]}

Times are seconds since the process began (the kernel's record of it, not the first line of Python), so that the
interpreter's own start shows. Spans may overlap: reading runs beside importing. Standard library only.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

SpanName = Literal[
    "lookup", "wait", "download", "verify", "convert", "publish", "read", "import", "transfer", "build", "ready"
]
Outcome = Literal["hit", "downloaded", "resumed", "waited"]


@dataclass(slots=True)
class Span:
    """One stretch of a start; times in seconds since the process began, `size_bytes` where bytes moved."""

    name: SpanName
    start: float
    end: float
    size_bytes: int | None = None

    def as_json(self) -> dict[str, Any]:
        record: dict[str, Any] = {"name": self.name, "start": round(self.start, 4), "end": round(self.end, 4)}
        if self.size_bytes is not None:
            record["bytes"] = self.size_bytes
            record["bytes_per_s"] = round(self.size_bytes / max(self.end - self.start, 1e-6), 1)
        return record


@dataclass(slots=True)
class Timeline:
    """Collects spans from any thread; `as_json` is the record that each start logs."""

    worker: str = ""
    model: str = ""
    commit: str = ""
    dtype: str = ""
    outcome: Outcome | None = None
    reason: str = ""
    waited_for: str = ""
    began: float = field(default_factory=lambda: _process_began())
    _spans: list[Span] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def now(self) -> float:
        """Seconds since the process began."""
        return time.monotonic() - self.began

    @contextmanager
    def span(self, name: SpanName) -> Iterator[Span]:
        """Record the block under `name`; set `size_bytes` on what it yields. A block that raises is recorded too."""
        span = Span(name, self.now(), 0.0)
        try:
            yield span
        finally:
            span.end = self.now()
            self.add(span)

    def add(self, span: Span) -> None:
        """Record a span that was measured elsewhere."""
        with self._lock:
            self._spans.append(span)

    def mark(self, name: SpanName) -> None:
        """Record a moment: a span without length."""
        now = self.now()
        self.add(Span(name, now, now))

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans so far, by start."""
        with self._lock:
            return tuple(sorted(self._spans, key=lambda span: (span.start, span.end)))

    def as_json(self) -> dict[str, Any]:
        """The record, ready for `json.dumps`."""
        return {
            "worker": self.worker,
            "model": self.model,
            "commit": self.commit,
            "dtype": self.dtype,
            "outcome": self.outcome,
            "reason": self.reason,
            **({"waited_for": self.waited_for} if self.waited_for else {}),
            "pid": os.getpid(),
            "spans": [span.as_json() for span in self.spans],
        }

    def log_line(self) -> str:
        """The record as one line; RunPod cuts log lines at 4096 characters, a start's record is far below."""
        return json.dumps({"timeline": self.as_json()}, separators=(",", ":"))

    def waterfall(self, *, width: int = 60) -> str:
        """The spans drawn as bars: see the function of this name."""
        return waterfall([span.as_json() for span in self.spans], width=width)


def waterfall(spans: Sequence[Mapping[str, Any]], *, width: int = 60) -> str:
    """A record's spans drawn as bars over one time axis, a line each, in `width` columns; under 10 ms is left out.

    Each line ends with how long the span took; `ready`, which is a moment, with when it was.
    """
    spans = [span for span in spans if span["end"] - span["start"] >= 0.01 or span["name"] == "ready"]
    total = max((span["end"] for span in spans), default=0.0) or 1.0
    label = max((len(span["name"]) for span in spans), default=0)
    bar = max(10, width - label - 10)
    lines = []
    for span in spans:
        took = span["end"] - span["start"]
        first = int(span["start"] / total * bar)
        length = min(max(1, round(took / total * bar)), bar - first or 1)
        drawn = f"{span['name']:<{label}} {' ' * first}{'█' * length}".ljust(label + bar + 2)
        lines.append(f"{drawn}{span['end'] if span['name'] == 'ready' else took:6.2f} s")
    return "\n".join(lines)


def _process_began() -> float:
    """When this process began, on the monotonic clock; now, where the kernel does not say (not Linux)."""
    now = time.monotonic()
    try:
        with open("/proc/self/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    except (OSError, AttributeError, ValueError, IndexError):
        return now
    return now - max(0.0, since_boot - ticks / os.sysconf("SC_CLK_TCK"))
