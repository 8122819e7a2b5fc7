"""The drawings of the report: marks on a plane of time and seconds, stacked bars, shares of the volume.

All of them are HTML that a style sheet lays out by percentages, so that they fit every width and their texts keep their
size. Each has a text for those who do not see it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from modelstore.timeline import SPAN_KINDS, label_of, outcome_of, sections, total_s, verdict
from modelstore.units import clock, size

# Each outcome has a shape beside its colour.
_SHAPES: Mapping[str, str] = {
    "hit": '<circle cx="6" cy="6" r="4.5"/>',
    "waited": '<path d="M6 1 11 11H1Z"/>',
    "resumed": '<path d="M2.5 2.5h7v7h-7Z" fill="none" stroke-width="2"/>',
    "downloaded": '<path d="M1.5 1.5h9v9h-9Z"/>',
    "copied": '<path d="M6 .5 11.5 6 6 11.5.5 6Z"/>',
    "swap": '<circle cx="6" cy="6" r="4" fill="none" stroke-width="2.2"/>',
    "failed": '<path d="M2 2 10 10M10 2 2 10" fill="none" stroke-width="2.6"/>',
}
COLOURS: Mapping[str, str] = {
    "hit": "#2b8a3e",
    "waited": "#d9480f",
    "resumed": "#b08900",
    "downloaded": "#c76f00",
    "copied": "#1971c2",
    "swap": "#7048e8",
    "failed": "#d63939",
}
_TICK_S = (60, 300, 900, 3600, 3 * 3600, 6 * 3600, 12 * 3600, 86400, 2 * 86400, 7 * 86400, 14 * 86400)
_TICKS = 6
_SHOWN_S = 0.005


def look_of(record: Mapping[str, Any]) -> str:
    """The name of the mark of a start: its outcome, or that it is a swap."""
    outcome = outcome_of(record)
    if outcome != "failed" and record["kind"] == "swap":
        return "swap"
    return outcome if outcome in _SHAPES else "hit"


def mark(look: str, *, style: str = "", tip: str = "") -> str:
    """A mark of 12 pixels."""
    colour = COLOURS[look]
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return (
        f'<svg class=mark viewBox="0 0 12 12" fill="{colour}" stroke="{colour}" stroke-width="0" '
        f'style="{style}" aria-hidden=true>{title}{_SHAPES[look]}</svg>'
    )


def marks_key(records: Iterable[Mapping[str, Any]]) -> str:
    """What each mark means, of those that are used."""
    used = {look_of(record) for record in records}
    return _key((mark(look), look) for look in _SHAPES if look in used)


def over_time(records: Sequence[Mapping[str, Any]]) -> str:
    """A mark for each start: when, and how long it took; failures in a row of their own below."""
    first, last = records[0]["at"], records[-1]["at"]
    margin = max((last - first) * 0.03, 30.0)
    first, last = first - margin, last + margin
    good = [record for record in records if not record["error"]]
    failed = [record for record in records if record["error"]]
    step = round_step(max(map(total_s, good), default=1.0))
    top = step * math.ceil(max(map(total_s, good), default=1.0) / step + 0.01)

    def percent_at(seconds: float) -> float:
        return float(100 * (seconds - first) / (last - first))

    lines = [
        f'<i class=h style="bottom:{100 * y * step / top:.2f}%"><b>{_figure(y * step)} s</b></i>'
        for y in range(round(top / step) + 1)
    ]
    ticks = [_time_tick(percent_at(at), label) for at, label in time_ticks(first, last)]
    marks = [
        mark(
            look_of(each),
            style=f"left:{percent_at(each['at']):.2f}%;bottom:{100 * total_s(each) / top:.2f}%",
            tip=_tip(each),
        )
        for each in good
    ]
    below = [mark("failed", style=f"left:{percent_at(each['at']):.2f}%;bottom:50%", tip=_tip(each)) for each in failed]
    lane = f"<div class=lane><b>failed</b>{''.join(below)}</div>" if failed else ""
    words = (
        f"{len(good)} starts that took up to {max(map(total_s, good), default=0):.1f} s, and {len(failed)} that failed"
    )
    return (
        f'<div class=chart role=img aria-label="{escape(words)}">'
        f"<div class=plot>{''.join(lines)}{''.join(marks)}</div>{lane}<div class=times>{''.join(ticks)}</div></div>"
    )


def _time_tick(percent: float, label: str) -> str:
    """A tick with its label, which at the edges stays inside the drawing."""
    place = " first" if percent < 10 else " last" if percent > 90 else ""
    return f'<i class="v{place}" style="left:{percent:.2f}%"><b>{label}</b></i>'


def round_step(largest: float) -> float:
    """The distance of round ticks, at most six of them: 1, 2 or 5 times a power of ten."""
    power: float = 10.0 ** math.floor(math.log10(max(largest, 1e-3) / _TICKS))
    return next((power * each for each in (1, 2, 5, 10) if largest <= power * each * _TICKS), power * 10)


def time_ticks(first: float, last: float) -> list[tuple[float, str]]:
    """Round times in UTC between two moments, with their labels: a time of day, the day at midnight and at first."""
    step = next((each for each in _TICK_S if (last - first) / each <= _TICKS), None)
    if step is None:
        step = 28 * 86400 * math.ceil((last - first) / (28 * 86400) / _TICKS)
    begin = math.ceil(first / step) * step
    moments = [time.gmtime(at) for at in range(begin, math.floor(last) + 1, step)]
    labels = [time.strftime("%H:%M" if moment.tm_hour or moment.tm_min else "%d %b", moment) for moment in moments]
    if labels and ":" in labels[0]:
        labels[0] = time.strftime("%d %b %H:%M", moments[0])
    return list(zip(range(begin, math.floor(last) + 1, step), labels, strict=True))


def stacked(record: Mapping[str, Any], scale_s: float) -> str:
    """A start as one bar on a scale of so many seconds. Steps at the same time lie above each other."""
    parts = []
    for begin, end, kinds in sections(record["spans"]):
        names = sorted({name for name, _detail in kinds})
        for row, name in enumerate(names):
            parts.append(
                f'<i style="left:{100 * begin / scale_s:.2f}%;width:{100 * (end - begin) / scale_s:.2f}%;'
                f'top:{100 * row / len(names):.0f}%;height:{100 / len(names):.0f}%;background:{colour_of(name)}"></i>'
            )
    return f'<span class=track role=img aria-label="{escape(verdict(record))}">{"".join(parts)}</span>'


def spans_of(record: Mapping[str, Any]) -> str:
    """The spans of a start, a bar each."""
    total = total_s(record) or 1.0
    rows = []
    for span in record["spans"]:
        length = span["end"] - span["start"]
        if length < _SHOWN_S and span["name"] != "ready":
            continue
        at, wide = min(100 * span["start"] / total, 99.5), 100 * length / total
        seconds = span["end"] if span["name"] == "ready" else length
        rows.append(
            f"<div class=span><span>{escape(label_of(span))}</span><span class=track>"
            f'<i style="left:{at:.2f}%;width:{wide:.2f}%;background:{colour_of(span["name"])}"></i></span>'
            f"<span class=right>{seconds:.2f} s</span></div>"
        )
    return "".join(rows)


def shares(seconds: Mapping[str, float]) -> str:
    """Seconds by the name of a step, as bars beside each other's."""
    total = sum(seconds.values()) or 1.0
    rows = []
    for name, each in sorted(seconds.items(), key=lambda item: -item[1]):
        if each / total < _SHOWN_S:
            continue
        phrase = SPAN_KINDS[name].general if name in SPAN_KINDS else name
        rows.append(
            f"<div class=share><span>{escape(phrase)}</span>{bar(each / total, colour_of(name))}"
            f"<span class=right>{each:.1f} s, {each / total:.0%}</span></div>"
        )
    return "".join(rows)


def bar(share: float, colour: str) -> str:
    """A part of a whole."""
    width = 100 * min(share, 1)
    return f'<span class=track><i style="left:0;width:{width:.2f}%;background:{colour}"></i></span>'


def steps_key(records: Iterable[Mapping[str, Any]]) -> str:
    """What each colour of a bar means, of those that are used."""
    used = {span["name"] for record in records for span in record["spans"] if span["end"] - span["start"] >= _SHOWN_S}
    return _key(
        (f'<i class=dot style="background:{kind.colour}"></i>', kind.name)
        for kind in SPAN_KINDS.values()
        if kind.name in used
    )


def colour_of(name: str) -> str:
    """The colour of a kind of span."""
    return SPAN_KINDS[name].colour if name in SPAN_KINDS else "#8a8f98"


def quota_bar(space: Mapping[str, Any]) -> str:
    """The space that is taken, against the quota; empty without one."""
    if not space["quota"]:
        return ""
    share = space["taken"] / space["quota"]
    colour = COLOURS["failed"] if share > 0.95 else COLOURS["copied"]
    words = f"{size(space['taken'])} of {size(space['quota'])} are taken"
    return f'<span role=img aria-label="{escape(words)}">{bar(share, colour)}</span>'


def _key(entries: Iterable[tuple[str, str]]) -> str:
    return f"<p class=keys>{''.join(f'<span>{drawn} {escape(name)}</span>' for drawn, name in entries)}</p>"


def _tip(record: Mapping[str, Any]) -> str:
    return f"{clock(record['at'])} UTC, {record['model']}, worker {record['worker']}: {verdict(record)}"


def _figure(value: float) -> str:
    return f"{value:.1f}" if value % 1 else f"{value:.0f}"
