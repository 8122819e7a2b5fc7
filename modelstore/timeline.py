"""The spans of one start: how long each step took, and why.

    {"worker": "…", "model": "org/name", "commit": "…", "dtype": "float16", "outcome": "hit", "reason": "…",
     "pid": 7, "processors": 8,
     "spans": [{"name": "read", "start": 0.41, "end": 5.9, "bytes": 1700000000, "bytes_per_s": 309653916.2}]}

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
from itertools import pairwise
from typing import Any, Literal, get_args

from modelstore.processors import processors

SpanName = Literal[
    "lookup",
    "wait",
    "download",
    "verify",
    "convert",
    "publish",
    "read",
    "import",
    "transfer",
    "build",
    "adapter",
    "engine",
    "pause",
    "compile",
    "warmup",
    "ready",
]
Outcome = Literal["hit", "downloaded", "copied", "resumed", "waited"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
Kind = Literal["start", "swap"]  # of a process, or of a running worker's model


_SHOWN_S = 0.05  # a shorter time reads as 0.0 s


@dataclass(frozen=True, slots=True)
class SpanKind:
    """A kind of span: the phrase that describes the step, with its detail in place of {}, and its colour."""

    name: SpanName
    phrase: str
    colour: str
    no_detail: str = ""

    @property
    def general(self) -> str:
        """The phrase without a detail."""
        return self.no_detail or self.phrase


SPAN_KINDS: Mapping[str, SpanKind] = {
    kind.name: kind
    for kind in (
        SpanKind("lookup", "looking for the model on the volume and at the Hub", "#8a8f98"),
        SpanKind("wait", "waiting for worker {}'s download", "#d9480f", "waiting for another worker's download"),
        SpanKind("download", "fetching the model's files from their source", "#c76f00"),
        SpanKind("convert", "converting to the storage dtype", "#b08900"),
        SpanKind("verify", "comparing the snapshot with its manifest", "#7c6f00"),
        SpanKind("publish", "publishing the snapshot", "#5c7c3f"),
        SpanKind("read", "reading the weights from the volume", "#2b8a3e"),
        SpanKind("import", "importing {}", "#1971c2", "importing libraries"),
        SpanKind("build", "building the model", "#7048e8"),
        SpanKind("adapter", "fetching and comparing the adapter {}", "#a06a1f", "fetching and comparing adapters"),
        SpanKind("engine", "starting the engine's server ({})", "#2c8a57", "starting the engine's server"),
        SpanKind("transfer", "moving weights {}", "#0b8494", "moving the weights to the GPU"),
        SpanKind("pause", "letting running answers end, and exchanging the models", "#a85d3a"),
        SpanKind("compile", "compiling the model, or restoring its code", "#5c940d"),
        SpanKind("warmup", "answering a first small job", "#ae3ec9"),
        SpanKind("ready", "ready", "#c2255c"),
    )
}


@dataclass(slots=True)
class Span:
    """One stretch of a start; times in seconds since the process began, `size_bytes` if bytes moved.

    `detail`: the library of an import. `plain_bytes`, `decoding_s`: of a read of compressed weights, the bytes that
    they hold, and the seconds in which threads decoded them, all threads together.
    """

    name: SpanName
    start: float
    end: float
    size_bytes: int | None = None
    detail: str = ""
    plain_bytes: int | None = None
    decoding_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        record: dict[str, Any] = {"name": self.name, "start": round(self.start, 4), "end": round(self.end, 4)}
        if self.detail:
            record["detail"] = self.detail
        if self.size_bytes is not None:
            record["bytes"] = self.size_bytes
            record["bytes_per_s"] = round(self.size_bytes / max(self.end - self.start, 1e-6), 1)
        if self.plain_bytes is not None:
            record |= {"plain_bytes": self.plain_bytes, "decoding_s": round(self.decoding_s, 3)}
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
    volume_mode: str = ""  # as MODELSTORE_VOLUME says, if it does
    kind: Kind = "start"
    began: float = field(default_factory=lambda: _process_began())
    _spans: list[Span] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def now(self) -> float:
        """Seconds since the process began."""
        return time.monotonic() - self.began

    @contextmanager
    def span(self, name: SpanName, detail: str = "") -> Iterator[Span]:
        """Record the block under `name`; it may set the span's `size_bytes`. A block that raises is recorded too."""
        span = Span(name, self.now(), 0.0, detail=detail)
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
            **({"volume_mode": self.volume_mode} if self.volume_mode else {}),
            **({"kind": self.kind} if self.kind != "start" else {}),
            "pid": os.getpid(),
            "processors": processors(),
            "spans": [span.as_json() for span in self.spans],
        }

    def log_line(self) -> str:
        """The record as one line; RunPod cuts log lines at 4096 characters, a start's record is far below."""
        return json.dumps({"timeline": self.as_json()}, separators=(",", ":"))

    def waterfall(self, *, width: int = 60) -> str:
        """The spans drawn as bars: see the function of this name."""
        return waterfall([span.as_json() for span in self.spans], width=width)


def verdict(record: Mapping[str, Any]) -> str:
    """Why a start took its time, in words: "12.0 s of 19.0 s waiting for worker abc's download".

    Spans overlap, so the longest one need not have delayed anything. Named is the kind of span that was waited for the
    longest: the time that no other span covers; and then the time that it shared with others.
    """
    if record["error"]:
        return f"failed: {record['error']}"
    alone, shared = _covered_s(record["spans"])
    if not alone and not shared:
        return "nothing was recorded"
    total = total_s(record)
    kind = max(alone, key=lambda each: alone[each], default=None)
    if kind is None or alone[kind] < _SHOWN_S <= max(shared.values(), default=0.0):
        kinds = max(shared, key=lambda each: shared[each])
        phrases = " and ".join(_phrase(each, record) for each in sorted(kinds))
        return f"{shared[kinds]:.1f} s of {total:.1f} s {phrases} at the same time"
    text = f"{alone[kind]:.1f} s of {total:.1f} s {_phrase(kind, record)}{_rate(kind, record)}"
    others = {each: seconds for kinds, seconds in shared.items() if kind in kinds for each in kinds - {kind}}
    other = max(others, key=lambda each: others[each], default=None)
    if other is not None and others[other] >= _SHOWN_S:
        text += f"; {others[other]:.1f} s more at the same time as {_phrase(other, record)}"
    return text


def outcome_of(record: Mapping[str, Any]) -> str:
    """The outcome of a start on record; `failed` if it has an error."""
    return "failed" if record["error"] else str(record["outcome"])


def total_s(record: Mapping[str, Any]) -> float:
    """Seconds from the start of the process to the end of its last span."""
    return max((float(span["end"]) for span in record["spans"]), default=0.0)


def label_of(span: Mapping[str, Any]) -> str:
    """A span's name as a person reads it, with its detail."""
    return f"{span['name']} {span['detail']}" if span.get("detail") else str(span["name"])


def _kind_of(span: Mapping[str, Any]) -> tuple[str, str]:
    return str(span["name"]), str(span.get("detail", ""))


def _rate(kind: tuple[str, str], record: Mapping[str, Any]) -> str:
    """The rate at which a kind of span moved its bytes, as a phrase; empty if it moved none."""
    spans = [span for span in record["spans"] if _kind_of(span) == kind]
    size_bytes = sum(span.get("bytes", 0) for span in spans)
    seconds = sum(float(span["end"] - span["start"]) for span in spans)
    if not size_bytes or not seconds:
        return ""
    plain_bytes = sum(span.get("plain_bytes", 0) for span in spans)
    decoding_s = sum(span.get("decoding_s", 0) for span in spans)
    decoded = f", decoded to {plain_bytes / 1e9:.2f} GB in {decoding_s:.1f} thread-seconds" if plain_bytes else ""
    return f" at {size_bytes / seconds / 1e6:.0f} MB/s{decoded}"


def _covered_s(
    spans: Sequence[Mapping[str, Any]],
) -> tuple[dict[tuple[str, str], float], dict[frozenset[tuple[str, str]], float]]:
    """Seconds that only one kind of span covers, by kind; and seconds that several kinds cover, by their set."""
    alone: dict[tuple[str, str], float] = {}
    shared: dict[frozenset[tuple[str, str]], float] = {}
    for begin, end, kinds in sections(spans):
        if len(kinds) == 1:
            alone[next(iter(kinds))] = alone.get(next(iter(kinds)), 0.0) + end - begin
        else:
            shared[kinds] = shared.get(kinds, 0.0) + end - begin
    return alone, shared


def sections(spans: Sequence[Mapping[str, Any]]) -> Iterator[tuple[float, float, frozenset[tuple[str, str]]]]:
    """The stretches between the ends of spans, with the kinds (name and detail) that cover each; gaps are left out."""
    times = sorted({time for span in spans for time in (span["start"], span["end"])})
    for begin, end in pairwise(times):
        kinds = frozenset(_kind_of(span) for span in spans if span["start"] <= begin and span["end"] >= end)
        if kinds:
            yield begin, end, kinds


def shared_s(spans: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by the name of a span; time that several cover is divided among them."""
    seconds: dict[str, float] = {}
    for begin, end, kinds in sections(spans):
        names = {name for name, _detail in kinds}
        for name in names:
            seconds[name] = seconds.get(name, 0.0) + (end - begin) / len(names)
    return seconds


def _phrase(kind: tuple[str, str], record: Mapping[str, Any]) -> str:
    name, detail = kind
    detail = detail or (str(record.get("waited_for", "")) if name == "wait" else "")
    known = SPAN_KINDS.get(name)
    if known is None:
        return name
    return known.phrase.format(detail) if detail or not known.no_detail else known.no_detail


def waterfall(spans: Sequence[Mapping[str, Any]], *, width: int = 60) -> str:
    """A record's spans drawn as bars over one time axis, a line each, in `width` columns; under 10 ms is left out.

    Each line ends with how long the span took; `ready`, which is a moment, with when it was.
    """
    spans = [span for span in spans if span["end"] - span["start"] >= 0.01 or span["name"] == "ready"]
    total = max((span["end"] for span in spans), default=0.0) or 1.0
    label = max((len(label_of(span)) for span in spans), default=0)
    bar = max(10, width - label - 10)
    lines = []
    for span in spans:
        took = span["end"] - span["start"]
        first = int(span["start"] / total * bar)
        length = min(max(1, round(took / total * bar)), bar - first or 1)
        drawn = f"{label_of(span):<{label}} {' ' * first}{'█' * length}".ljust(label + bar + 2)
        lines.append(f"{drawn}{span['end'] if span['name'] == 'ready' else took:6.2f} s")
    return "\n".join(lines)


def _process_began() -> float:
    """The start of this process on the monotonic clock; now, if the kernel does not say (not Linux)."""
    now = time.monotonic()
    try:
        with open("/proc/self/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    except (OSError, AttributeError, ValueError, IndexError):
        return now
    return now - max(0.0, since_boot - ticks / os.sysconf("SC_CLK_TCK"))
