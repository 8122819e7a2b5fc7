"""The starts of a fleet together: the seconds that were paid for, what they were spent on, and the one change that
would have saved most of them.

A worker is billed from the start of its process, so a start costs all its seconds until it is ready. Each estimate of a
change is made of the recorded spans alone; its text has the figures.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelstore.errors import ModelStoreError
from modelstore.reference import parse_reference
from modelstore.timeline import outcome_of, sections, shared_s, total_s
from modelstore.units import counted
from modelstore.volume.preferred_form import compressed_read_s

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Compressed:
    """The compressed form of a plain snapshot: its share of the plain bytes, and the seconds in which one processor
    decodes them."""

    share: float
    decoding_s: float


CompressedForm = Callable[[str, str], Compressed | None]
"""The compressed form of a plain snapshot, by commit and dtype; None if it is not known."""

_MAKING = ("download", "wait", "convert", "verify", "publish")
_REPLACED_WITHIN_S = 600.0
_FLEET = 2  # workers: one start of another model tells nothing
_PROMPT_S = 2.0  # from ready to the first job, if that was waited for
_PLAIN = re.compile(r"[\w./@ -]+")
_WORTH_S = 1.0
_WORTH = 0.05  # of all seconds
_GAIN = 0.95  # of the bytes: what is stored in more is not worth decoding


@dataclass(frozen=True, slots=True)
class Totals:
    """Of all starts: `seconds` that were billed, by the name of the step in `by_step`, with those between steps; and
    medians of the seconds to the first token, since the process began and since the request, None if none is known."""

    starts: int
    failed: int
    seconds: float
    by_step: Mapping[str, float]
    first_token_s: float | None
    request_s: float | None

    @property
    def text(self) -> str:
        """One line."""
        largest = sorted(self.by_step.items(), key=lambda item: -item[1])[:4]
        steps = ", ".join(f"{seconds:.1f} s {name}" for name, seconds in largest if seconds >= 0.05)
        line = f"{counted(self.starts, 'start')} took {self.seconds:.1f} s of workers' time ({steps})"
        if self.request_s is not None:
            return f"{line}; {self.request_s:.1f} s from the request to the first token, the median"
        if self.first_token_s is not None:
            return f"{line}; the first token came {self.first_token_s:.1f} s after the process began, the median"
        return line


@dataclass(frozen=True, slots=True)
class Change:
    """Something to do, the seconds that it would have saved, and the figures that this was computed from."""

    action: str
    saved_s: float
    because: str

    def text(self, of_s: float) -> str:
        """One line; `of_s`: all seconds."""
        return f"{self.action} would have saved about {self.saved_s:.0f} of {of_s:.0f} s: {self.because}"


def totals(records: Sequence[Record]) -> Totals:
    """Of records of `history`, swaps aside."""
    starts = [record for record in records if record["kind"] == "start"]
    by_step = seconds_by_step(starts)
    seconds = sum(map(total_s, starts))
    by_step["between these steps"] = max(seconds - sum(by_step.values()), 0.0)
    jobs = [record["first_job"] for record in starts if was_waited_for(record)]
    waits = [wait for record in starts if (wait := request_s(record)) is not None]
    return Totals(
        starts=len(starts),
        failed=sum(bool(record["error"]) for record in starts),
        seconds=seconds,
        by_step=by_step,
        first_token_s=statistics.median(job["first_token"] for job in jobs) if jobs else None,
        request_s=statistics.median(waits) if waits else None,
    )


def seconds_by_step(records: Sequence[Record]) -> dict[str, float]:
    """Seconds by the name of a step, of all records together."""
    by_step: dict[str, float] = {}
    for record in records:
        for name, seconds in shared_s(record["spans"]).items():
            by_step[name] = by_step.get(name, 0.0) + seconds
    return by_step


def was_waited_for(record: Record) -> bool:
    """Whether the first job was there by the time that the worker was ready; else it came to one that idled."""
    first: Mapping[str, float] = record.get("first_job") or {}
    return bool(first) and first["taken"] - total_s(record) <= _PROMPT_S


def request_s(record: Record) -> float | None:
    """Seconds from the first request to its first token; None if the time in the queue is not known."""
    first: Mapping[str, float] = record.get("first_job") or {}
    if "queued_s" not in first:
        return None
    return first["queued_s"] + first["first_token"] - first["taken"]


def best_change(records: Sequence[Record], compressed_form: CompressedForm) -> Change | None:
    """The change that would have saved most; None if none is worth it."""
    starts = [record for record in records if record["kind"] == "start" and not record["error"]]
    changes = [_seed(starts), _compress(starts, compressed_form), _keep_code(starts), _swap(starts, records)]
    best = max((change for change in changes if change is not None), key=lambda change: change.saved_s, default=None)
    least = max(_WORTH_S, _WORTH * sum(map(total_s, starts)))
    return best if best is not None and best.saved_s >= least else None


def _seed(starts: Sequence[Record]) -> Change | None:
    seconds: dict[tuple[str, str], float] = {}
    late: Counter[tuple[str, str]] = Counter()
    for record in starts:
        if outcome_of(record) != "hit":
            key = (record["model"], record["dtype"])
            late[key] += 1
            times = shared_s(record["spans"])
            seconds[key] = seconds.get(key, 0.0) + sum(times.get(name, 0.0) for name in _MAKING)
    if not seconds:
        return None
    model, dtype = max(seconds, key=lambda key: seconds[key])
    return Change(
        _command("seed", model, "--dtype", dtype) or f"Seeding {model} before the launch",
        seconds[model, dtype],
        f"{late[model, dtype]} of {counted(len(starts), 'start')} waited that long for a model that was not on "
        "the volume",
    )


def _command(name: str, model: str, *options: str) -> str:
    """A command to copy, in backquotes; empty if the recorded name, which any neighbour can write, is no model's."""
    try:
        reference = parse_reference(model)
    except ModelStoreError:
        return ""
    if reference.kind != "hub" or not _PLAIN.fullmatch(" ".join((model, *options))):
        return ""
    return f"`{' '.join(('modelstore', name, model, *options))}`"


def _compress(starts: Sequence[Record], compressed_form: CompressedForm) -> Change | None:
    reads: dict[tuple[str, str, str], list[tuple[float, float, int]]] = {}
    for record in starts:
        if any("plain_bytes" in span for span in record["spans"]) or "processors" not in record:
            continue
        times = sections(record["spans"])
        reading = [(end - begin, {name for name, _detail in kinds}) for begin, end, kinds in times]
        read_s = sum(seconds for seconds, names in reading if "read" in names)
        alone_s = sum(seconds for seconds, names in reading if "read" in names <= {"read", "transfer"})
        if alone_s:
            key = (record["model"], record["commit"], record["dtype"])
            reads.setdefault(key, []).append((read_s, alone_s, record["processors"]))
    waits = {key: sum(alone_s for _read_s, alone_s, _on in each) for key, each in reads.items()}
    longest = max(waits, key=lambda key: waits[key], default=None)
    if longest is None or waits[longest] < _WORTH_S:
        return None
    model, commit, dtype = longest
    form = compressed_form(commit, dtype)
    if form is None or form.share > _GAIN:
        return None
    saved_s = 0.0
    for read_s, alone_s, on in reads[longest]:
        takes_s = compressed_read_s(read_s * form.share, form.decoding_s, on=on)
        saved_s += alone_s * max(0.0, 1 - takes_s / read_s)
    return Change(
        _command("compress", model) or f"Compressing {model}",
        saved_s,
        f"its starts did nothing but read for {waits[longest]:.1f} s, and compressed it has {form.share:.0%} of the "
        f"bytes, which one processor decodes in {form.decoding_s:.1f} s",
    )


def _keep_code(starts: Sequence[Record]) -> Change | None:
    seconds: dict[str, list[float]] = {}
    for record in starts:
        compiled = shared_s(record["spans"]).get("compile", 0.0)
        if compiled:
            seconds.setdefault(record["model"], []).append(compiled)
    # The first time has to be paid, and what is much shorter was restored.
    again = {model: [each for each in times if each >= max(times) / 2] for model, times in seconds.items()}
    saved = {model: sum(times) - max(times) for model, times in again.items()}
    model = max(saved, key=lambda name: saved[name], default=None)
    if model is None or not saved[model]:
        return None
    return Change(
        "`MODELSTORE_ENGINE_CACHE`, which keeps compiled code on the volume,",
        saved[model],
        f"{counted(len(again[model]), 'start')} of {model} compiled for {sum(again[model]):.1f} s together",
    )


def _swap(starts: Sequence[Record], records: Sequence[Record]) -> Change | None:
    """Starts that only changed the model: those of several workers, soon after a model took the place of another one
    for good. How long a swap takes has to be known."""
    swaps = [total_s(record) for record in records if record["kind"] == "swap" and not record["error"]]
    best: Change | None = None
    for model in dict.fromkeys(record["model"] for record in starts) if swaps else ():
        began = next(record["at"] for record in starts if record["model"] == model)
        again = [r for r in starts if r["model"] == model and began <= r["at"] <= began + _REPLACED_WITHIN_S]
        former = _former(starts, model, began)
        if former is None or model.startswith("@") or len({record["worker"] for record in again}) < _FLEET:
            continue
        saved_s = sum(max(total_s(record) - statistics.median(swaps), 0.0) for record in again)
        if best is None or saved_s > best.saved_s:
            best = Change(
                "An alias (`MODEL_ID=@name`, `modelstore alias set name …`)",
                saved_s,
                f"{counted(len(again), 'worker')} started anew when {former} gave way to {model}",
            )
    return best


def _former(starts: Sequence[Record], model: str, began: float) -> str | None:
    """The model that several workers had started with before, and none since."""
    workers: dict[str, set[str]] = {}
    for record in starts:
        workers.setdefault(record["model"], set()).add(record["worker"])
    since = {record["model"] for record in starts if record["at"] >= began}
    return next((name for name in workers if name not in since and len(workers[name]) >= _FLEET), None)
