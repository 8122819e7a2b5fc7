"""`modelstore report`: one HTML page, complete in itself, about a volume and the starts from it; or the same as text.

The page loads nothing and runs no script: tables and drawings (SVG) that a browser shows at any width, light or dark.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from modelstore.timeline import SPAN_KINDS, label_of, total_s, verdict, waterfall
from modelstore.units import ago, size

_WATERFALLS = 40
NO_STARTS = "No start has been recorded yet: start a worker with this volume, or run `modelstore warm REF`."
_OUTCOMES: Mapping[str, str] = {
    "hit": "#2b8a3e",
    "waited": "#d9480f",
    "resumed": "#b08900",
    "downloaded": "#e8890c",
    "failed": "#c92a2a",
}
_STYLE = """
:root { color-scheme: light dark; --line: #8885; --faint: #888; --card: #8881; }
* { box-sizing: border-box }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem }
h1 { font-size: 1.4rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
p { margin: .3rem 0 } .faint { color: var(--faint) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .6rem; margin-top: 1rem }
.card { background: var(--card); border-radius: .5rem; padding: .6rem .8rem }
.card b { display: block; font-size: 1.3rem }
svg { display: block; width: 100%; min-width: 26rem; height: auto }
svg text { fill: currentColor; font: 11px system-ui, sans-serif }
.tile { fill-opacity: .8; stroke: Canvas; stroke-width: 2 }
svg .on { fill: #fff }
.start { border-top: 1px solid var(--line); padding: .7rem 0 }
.start h3 { font-size: .95rem; margin: 0; overflow-wrap: anywhere }
.row { display: grid; grid-template-columns: 5.5rem 1fr 4.5rem; gap: .5rem; align-items: center; font-size: .85rem }
.track { background: var(--card); height: .8rem; position: relative; border-radius: .2rem }
.bar { position: absolute; top: 0; bottom: 0; border-radius: .2rem; min-width: 2px }
.right { text-align: right; font-variant-numeric: tabular-nums }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .9rem }
td, th { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); white-space: nowrap }
.keys span { white-space: nowrap }
.key { display: inline-block; width: .7rem; height: .7rem; border-radius: .15rem; margin: 0 .3rem 0 .8rem }
"""


def html(
    models: Sequence[Mapping[str, Any]], space: Mapping[str, Any], starts: Sequence[dict[str, Any]], *, made_at: float
) -> str:
    """The page. `models`, `space`: records of `inventory`; `starts`: records of `history`; `made_at`: seconds since
    1970."""
    body = [
        f"<h1>Model store {escape(space['root'])}</h1>",
        f"<p class=faint>as of {_clock(made_at)} UTC</p>",
        _cards(models, space, starts),
        "<h2>Starts over time</h2>",
        _scatter(starts) if starts else f"<p class=faint>{escape(NO_STARTS)}</p>",
        "<h2>The space on the volume</h2>",
        _treemap(models) if models else "<p class=faint>No models are on the volume: run modelstore seed org/name.</p>",
        _table(models),
        f"<h2>The latest starts</h2>{_keys({kind.name: kind.colour for kind in SPAN_KINDS.values()})}"
        if starts
        else "",
        *[_waterfall(record) for record in reversed(starts[-_WATERFALLS:])],
    ]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>Model store {escape(space['root'])}</title><style>{_STYLE}</style>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def text(record: dict[str, Any], *, width: int) -> str:
    """One start as bars, a line each, in `width` columns, under its verdict."""
    head = f"{_clock(record['at'])} UTC  {record['model']}  {_outcome(record)}  by {record['worker']}"
    return f"{head}\n{verdict(record)}\n{waterfall(record['spans'], width=width)}"


def _cards(models: Sequence[Mapping[str, Any]], space: Mapping[str, Any], starts: Sequence[dict[str, Any]]) -> str:
    good = [total_s(record) for record in starts if not record["error"]]
    hits = sum(record["outcome"] == "hit" for record in starts)
    quota = f" of {size(space['quota'])}" if space["quota"] else ""
    cards = [
        (f"{size(space['taken'])}{quota}", "taken"),
        (size(space["evictable"]), "could be evicted"),
        (str(len(models)), "models"),
        (str(len(starts)), "starts"),
        (f"{hits / len(starts):.0%}" if starts else "–", "found their model there"),
        (f"{_median(good):.1f} s" if good else "–", "median start"),
        (f"{max(good):.1f} s" if good else "–", "slowest start"),
        (str(len(starts) - len(good)), "failed"),
    ]
    return f"<div class=cards>{''.join(f'<div class=card><b>{value}</b>{name}</div>' for value, name in cards)}</div>"


def _scatter(starts: Sequence[dict[str, Any]]) -> str:
    """A point for each start: when, and how long it took."""
    width, height, margin, bottom = 720, 220, 44, 24
    first, last = starts[0]["at"], starts[-1]["at"]
    longest = max([total_s(record) for record in starts] + [0.1]) * 1.08
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = (height - bottom) * (1 - share) + 4
        parts.append(
            f'<line x1="{margin}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" opacity=".15"/>'
        )
        parts.append(f'<text x="{margin - 6}" y="{y + 4:.1f}" text-anchor="end">{longest * share:.1f} s</text>')
    for record in starts:
        x = margin + 8 + (record["at"] - first) / max(last - first, 1.0) * (width - margin - 16)
        y = (height - bottom) * (1 - total_s(record) / longest) + 4
        colour = _OUTCOMES[_outcome(record)]
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" fill-opacity=".75">'
            f"<title>{escape(_tip(record))}</title></circle>"
        )
    parts.append(f'<text x="{margin}" y="{height - 4}">{_clock(first)}</text>')
    parts.append(f'<text x="{width}" y="{height - 4}" text-anchor="end">{_clock(last)}</text>')
    return f"{_keys(_OUTCOMES)}{_drawing(width, height, parts)}"


def _treemap(models: Sequence[Mapping[str, Any]]) -> str:
    """A rectangle for each model, as large as its bytes."""
    width, height = 720, 260
    sized = sorted((model for model in models if model["bytes"]), key=lambda model: -model["bytes"])
    parts = []
    for model, (x, y, w, h) in zip(sized, squarified([m["bytes"] for m in sized], width, height), strict=True):
        used = bool(model["in_use_by"])
        colour = "#2b8a3e" if used else "#1971c2" if model["pinned"] or model["aliases"] else "#8a8f98"
        name = f"{model['repo_id']} {model['dtype']}"
        parts.append(
            f'<rect class=tile x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{colour}">'
            f"<title>{escape(name)}, {size(model['bytes'])}</title></rect>"
        )
        room = int(w / 6.4)
        if h > 34 and room > 6:
            shown = name if len(name) <= room else f"{name[: room - 1]}…"
            parts.append(f'<text class=on x="{x + 6:.1f}" y="{y + 16:.1f}">{escape(shown)}</text>')
            parts.append(f'<text class=on x="{x + 6:.1f}" y="{y + 30:.1f}">{size(model["bytes"])}</text>')
    keys = {"in use": "#2b8a3e", "pinned or aliased": "#1971c2", "may be evicted": "#8a8f98"}
    return f"{_keys(keys)}{_drawing(width, height, parts)}"


def squarified(sizes: Sequence[float], width: float, height: float) -> list[tuple[float, float, float, float]]:
    """Rectangles (x, y, width, height) of areas in proportion to `sizes`, which come largest first, that fill a
    rectangle and are as square as can be (Bruls, Huizing and van Wijk, "Squarified Treemaps", 2000)."""
    scale = width * height / sum(sizes) if sizes else 0.0
    areas = [size * scale for size in sizes]
    placed: list[tuple[float, float, float, float]] = []
    x = y = 0.0
    while areas:
        side = min(width, height)
        row = [areas[0]]
        while len(row) < len(areas) and _worst([*row, areas[len(row)]], side) <= _worst(row, side):
            row.append(areas[len(row)])
        thickness = sum(row) / side if side else 0.0
        at = 0.0
        for area in row:
            length = area / thickness if thickness else 0.0
            placed.append((x, y + at, thickness, length) if width >= height else (x + at, y, length, thickness))
            at += length
        if width >= height:
            x, width = x + thickness, width - thickness
        else:
            y, height = y + thickness, height - thickness
        areas = areas[len(row) :]
    return placed


def _worst(row: Sequence[float], side: float) -> float:
    """The worst ratio of the sides of a row's rectangles."""
    total = sum(row)
    return max(max(side * side * area / total**2, total**2 / (side * side * area)) for area in row) if side else 0.0


def _table(models: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for model in sorted(models, key=lambda model: -model["bytes"]):
        kept = ", ".join(
            [*(f"@{name}" for name in model["aliases"]), *(["pinned"] if model["pinned"] else []), *model["in_use_by"]]
        )
        cells = (
            model["repo_id"],
            model["commit"][:12],
            model["dtype"],
            size(model["bytes"]),
            "never" if model["idle_s"] is None else ago(model["idle_s"]),
            kept,
        )
        rows.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("model", "commit", "dtype", "size", "last used", "kept by"))
    return f"<div class=scroll><table><tr>{head}</tr>{''.join(rows)}</table></div>" if rows else ""


def _waterfall(record: dict[str, Any]) -> str:
    total = total_s(record) or 1.0
    rows = []
    for span in record["spans"]:
        length = span["end"] - span["start"]
        if length < 0.005 and span["name"] != "ready":
            continue
        at, wide = 100 * span["start"] / total, 100 * length / total
        seconds = span["end"] if span["name"] == "ready" else length
        colour = SPAN_KINDS[span["name"]].colour if span["name"] in SPAN_KINDS else "#888"
        rows.append(
            f"<div class=row><span>{escape(label_of(span))}</span><span class=track>"
            f'<span class=bar style="left:{min(at, 99.5):.2f}%;width:{wide:.2f}%;background:{colour}"></span></span>'
            f"<span class=right>{seconds:.2f} s</span></div>"
        )
    return (
        f"<div class=start><h3>{escape(record['model'])} · {_outcome(record)} · {total:.1f} s</h3>"
        f"<p>{escape(verdict(record))}</p>"
        f"<p class=faint>{_clock(record['at'])} UTC, worker {escape(record['worker'])}, "
        f"{escape(record['dtype'])}, {escape(record['reason'])}</p>{''.join(rows)}</div>"
    )


def _keys(colours: Mapping[str, str]) -> str:
    keys = "".join(
        f'<span><i class=key style="background:{colour}"></i>{name}</span> ' for name, colour in colours.items()
    )
    return f'<p class="faint keys">{keys}</p>'


def _drawing(width: int, height: int, parts: Sequence[str]) -> str:
    return f'<div class=scroll><svg viewBox="0 0 {width} {height}" role=img>{"".join(parts)}</svg></div>'


def _tip(record: dict[str, Any]) -> str:
    return f"{_clock(record['at'])} {record['model']} {record['worker']}: {verdict(record)}"


def _outcome(record: dict[str, Any]) -> str:
    return "failed" if record["error"] else record["outcome"] if record["outcome"] in _OUTCOMES else "hit"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
