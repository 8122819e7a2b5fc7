"""`modelstore report`: one HTML page, complete in itself, about a volume and the starts from it; or the same as text.

The page loads nothing and runs no script: texts, tables and bars that a browser shows at any width, light or dark. From
the top: a verdict, four figures, the starts over time, where the time of warm starts goes, the failures, the latest
starts, and the volume. `drawings.py` has the drawings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from modelstore.operate import drawings, fleet
from modelstore.operate.drawings import look_of, mark
from modelstore.timeline import SPAN_KINDS, outcome_of, total_s, verdict, waterfall
from modelstore.units import ago, clock, counted, first_names, size, variant

_SHOWN_STARTS = 40
NO_STARTS = "No start has been recorded yet: start a worker with this volume, or run `modelstore warm REF`."
_NO_MODELS = "No models are on the volume: run modelstore seed org/name."
_KINDS = {
    "engine-caches": ("engines' compiled code", "#7048e8"),
    "staging": ("unfinished downloads", "#b08900"),
    "quarantine": ("damaged snapshots, in quarantine", "#d63939"),
    "trash": ("trash", "#8a8f98"),
    "promised": ("promised to running downloads", "#7048e8"),
}
# The colours of texts and surfaces, light and dark; a test compares their contrast.
PALETTES: Mapping[str, Mapping[str, str]] = {
    "light": {
        "page": "#ffffff",
        "text": "#1c1e21",
        "faint": "#5b616b",
        "line": "#d3d7dd",
        "card": "#f3f4f6",
        "track": "#e4e7eb",
        "bad": "#b42318",
    },
    "dark": {
        "page": "#16181c",
        "text": "#e8eaed",
        "faint": "#a6adb8",
        "line": "#3a3f48",
        "card": "#20242a",
        "track": "#2c3138",
        "bad": "#ff8a80",
    },
}
_STYLE = """
* { box-sizing: border-box }
html { color-scheme: light dark; background: var(--page); color: var(--text); -webkit-text-size-adjust: 100% }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 68rem; padding: 1rem }
h1 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
p { margin: .3rem 0 } .faint, .keys, .chart b { color: var(--faint) } .bad { color: var(--bad) }
.verdict { font-size: 1.35rem; line-height: 1.3; margin: .6rem 0 1rem; text-wrap: balance }
.cards { display: grid; grid-template-columns: repeat(2, 1fr); gap: .6rem }
.card { background: var(--card); border-radius: .5rem; font-size: .87rem; overflow-wrap: anywhere;
  padding: .6rem .8rem }
.card b { display: block; font-size: 1.35rem; line-height: 1.25 } .card .track { margin: .35rem 0 }
.track { background: var(--track); border-radius: .2rem; display: block; height: .8rem; overflow: hidden;
  position: relative }
.track i { height: 100%; min-width: 1px; position: absolute; top: 0 }
.right { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap }
.keys { display: flex; flex-wrap: wrap; font-size: .82rem; gap: .1rem .9rem; margin: .4rem 0 }
.dot { border-radius: .15rem; display: inline-block; height: .7rem; width: .7rem }
.mark { height: 12px; vertical-align: -1px; width: 12px }
.chart { margin-left: 2.6rem } .chart b { font-size: .8rem; font-weight: 400; white-space: nowrap }
.chart i { font-style: normal }
.plot { height: 11rem; margin-top: 1rem; position: relative }
.plot .mark, .lane .mark { margin: 0 0 -6px -6px; position: absolute }
.h { border-top: 1px solid var(--line); left: 0; position: absolute; right: 0 }
.h b { position: absolute; right: 100%; margin-right: .4rem; transform: translateY(-55%) }
.lane { background: var(--card); border-radius: .2rem; height: 1.5rem; margin-top: .5rem; position: relative }
.lane b { position: absolute; right: 100%; margin-right: .4rem; line-height: 1.5rem }
.times { height: 1.5rem; position: relative }
.v { border-left: 1px solid var(--line); height: .4rem; position: absolute }
.v b { left: 0; position: absolute; top: .35rem; transform: translateX(-50%) }
.v.first b { transform: none } .v.last b { transform: translateX(-100%) }
.share, .span { align-items: center; display: grid; font-size: .87rem; gap: 0 .7rem; margin: .25rem 0;
  grid-template-columns: 1fr auto }
.share .track, .span .track { grid-column: 1 / -1; grid-row: 2 }
details, .failure, .model { border-top: 1px solid var(--line); padding: .4rem 0 }
summary { cursor: pointer; display: grid; font-size: .87rem; gap: 0 .7rem; grid-template-columns: 1fr auto;
  list-style: none }
summary::-webkit-details-marker { display: none } summary .track { grid-column: 1 / -1; height: 1rem }
summary > span:first-child, .model b, .failure { overflow-wrap: anywhere }
details[open] { padding-bottom: .8rem } details p { font-size: .87rem }
.model { display: grid; font-size: .87rem; gap: .1rem .7rem; grid-template-columns: 1fr auto }
.model .track, .model .faint { grid-column: 1 / -1 } .model b { font-weight: 600 }
@media (min-width: 700px) {
  .cards { grid-template-columns: repeat(4, 1fr) }
  .share, .span { grid-template-columns: 17rem 1fr 8rem } .share .track, .span .track { grid-column: 2; grid-row: 1 }
  summary { grid-template-columns: 17rem 1fr 4.5rem } summary .track { grid-column: 2; grid-row: 1; align-self: center }
  .model { grid-template-columns: 15rem 1fr 5.5rem 14rem; align-items: center }
  .model .track { grid-column: 2; grid-row: 1 } .model .faint { grid-column: 4; grid-row: 1 }
}
"""


def html(
    models: Sequence[Mapping[str, Any]],
    space: Mapping[str, Any],
    records: Sequence[dict[str, Any]],
    *,
    made_at: float,
    compressed_form: fleet.CompressedForm,
) -> str:
    """The page. `models`, `space`: records of `inventory`; `records`: of starts and swaps, of `history`; `made_at`:
    seconds since 1970; `compressed_form`: see `fleet`."""
    starts = [record for record in records if record["kind"] == "start"]
    warm = [record for record in starts if outcome_of(record) == "hit"]
    body = [
        f"<h1>Model store {escape(space['root'])}</h1>",
        f"<p class=faint>as of {clock(made_at)} UTC</p>",
        f"<p class=verdict>{escape(_verdict(starts, warm))}{_damage(models)}</p>",
        _cards(space, starts, warm),
    ]
    if records:
        body += ["<h2>Starts over time</h2>", drawings.marks_key(records), drawings.over_time(records)]
    if starts:
        body += ["<h2>The time that was paid for</h2>", _fleet(records, compressed_form)]
    if warm:
        body += ["<h2>Where the time of warm starts goes</h2>", _time_of(warm)]
    body += [_failures(records), _latest(records), "<h2>The volume</h2>", _volume(models, space)]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>Model store {escape(space['root'])}</title><style>{_palettes()}{_STYLE}</style>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def text(record: dict[str, Any], *, width: int) -> str:
    """One start as bars, a line each, in `width` columns, under its verdict."""
    head = f"{clock(record['at'])} UTC  {record['model']}  {look_of(record)}  by {record['worker']}"
    first = f"; {text}" if (text := first_token(record)) else ""
    return f"{head}\n{verdict(record)}{first}\n{waterfall(record['spans'], width=width)}"


def first_token(record: Mapping[str, Any]) -> str:
    """When the first token came, in words; empty if no job was recorded."""
    if not fleet.was_waited_for(record):
        return ""
    wait = fleet.request_s(record)
    since = "" if wait is None else f", {wait:.1f} s after its request"
    return f"first token after {record['first_job']['first_token']:.1f} s{since}"


def _palettes() -> str:
    def variables(palette: Mapping[str, str]) -> str:
        return ";".join(f"--{name}:{colour}" for name, colour in palette.items())

    dark = f"@media (prefers-color-scheme: dark){{:root{{{variables(PALETTES['dark'])}}}}}"
    return f":root{{{variables(PALETTES['light'])}}}{dark}"


def _verdict(starts: Sequence[Mapping[str, Any]], warm: Sequence[Mapping[str, Any]]) -> str:
    """The page in a sentence."""
    if not starts:
        return NO_STARTS
    failed = sum(bool(record["error"]) for record in starts)
    if len(starts) == 1:
        sentence = "The only start failed" if failed else "The only start succeeded"
    else:
        sentence = f"{failed or 'None'} of {len(starts)} starts failed"
    if not warm:
        return f"{sentence}; no warm start has been recorded."
    seconds = fleet.seconds_by_step(warm)
    kind = max(seconds, key=lambda name: seconds[name], default="")
    phrase = SPAN_KINDS[kind].general if kind in SPAN_KINDS else kind
    share = seconds.get(kind, 0.0) / (sum(seconds.values()) or 1.0)
    part = f", {'most' if share > 0.5 else 'the largest part'} of it {phrase}" if phrase else ""
    return f"{sentence}; a typical warm start takes {_quantile(warm, 0.5):.1f} s{part}."


def _damage(models: Sequence[Mapping[str, Any]]) -> str:
    damaged = sum(bool(model["problem"]) or not model["complete"] for model in models)
    return (
        f" <span class=bad>{counted(damaged, 'model')} on the volume {'is' if damaged == 1 else 'are'} damaged.</span>"
        if damaged
        else ""
    )


def _cards(space: Mapping[str, Any], starts: Sequence[Mapping[str, Any]], warm: Sequence[Mapping[str, Any]]) -> str:
    failed = sum(bool(record["error"]) for record in starts)
    good = len(starts) - failed
    evictable = f"an eviction would free {size(space['evictable'])}"
    if space["quota"]:
        used = f"<b>{size(space['taken'])}</b>of {size(space['quota'])}{drawings.quota_bar(space)}{evictable}"
    else:
        used = f"<b>{size(space['taken'])}</b>taken, without a quota; {evictable}"
    median = "<b>–</b>no warm start yet"
    if warm:
        median = f"<b>{_quantile(warm, 0.5):.1f} s</b>median of {counted(len(warm), 'warm start')}; "
        median += f"95th percentile {_quantile(warm, 0.95):.1f} s"
    hits = f"<b>{len(warm) / good:.0%}</b>found the model on the volume, of {good} that did not fail" if good else ""
    cards = [
        used,
        median,
        hits or "<b>–</b>no start that did not fail",
        f"<b{' class=bad' if failed else ''}>{failed}</b>failed, of {counted(len(starts), 'start')}",
    ]
    return f"<div class=cards>{''.join(f'<div class=card>{card}</div>' for card in cards)}</div>"


def _fleet(records: Sequence[Mapping[str, Any]], compressed_form: fleet.CompressedForm) -> str:
    """The seconds of all starts, and the change that would have saved most of them."""
    whole = fleet.totals(records)
    change = fleet.best_change(records, compressed_form)
    advice = ""
    if change is not None:
        text = re.sub("`([^`]*)`", r"<code>\1</code>", escape(change.text(whole.seconds)))
        advice = f"<p><b>{text}.</b></p>"
    first = (
        "" if whole.first_token_s is None else f" The first token came after {whole.first_token_s:.1f} s, the median."
    )
    if whole.request_s is not None:
        first = f" From the request to the first token it took {whole.request_s:.1f} s, the median."
    about = (
        f"{counted(whole.starts, 'start')} took {whole.seconds:.1f} s of workers' time until they were ready, which is "
        f"billed.{first} Time that several steps share is divided among them."
    )
    return f"{advice}{drawings.shares(whole.by_step)}<p class=faint>{about}</p>"


def _time_of(warm: Sequence[Mapping[str, Any]]) -> str:
    seconds = {name: each / len(warm) for name, each in fleet.totals(warm).by_step.items()}
    about = f"Seconds of a warm start, the mean of {len(warm)}. Time that several steps share is divided among them."
    return f"{drawings.shares(seconds)}<p class=faint>{about}</p>"


def _failures(records: Sequence[Mapping[str, Any]]) -> str:
    """The failures, those with the same error as one, the latest first."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in reversed(records):
        if record["error"]:
            groups.setdefault(record["error"], []).append(record)
    rows = []
    for error, alike in groups.items():
        models = _some(record["model"] or "no model" for record in alike)
        times = f"{clock(alike[0]['at'])} UTC"
        times = times if len(alike) == 1 else f"{len(alike)} times, last {times}, first {clock(alike[-1]['at'])}"
        rows.append(
            f"<div class=failure>{mark('failed')} <b>{escape(models)}</b>: {escape(error)}"
            f"<p class=faint>{times}, by {escape(_some(record['worker'] for record in alike))}</p></div>"
        )
    return f"<h2>Failures</h2>{''.join(rows)}" if rows else ""


def _some(names: Iterable[str]) -> str:
    """The first three different names, and how many more there are."""
    return first_names(list(dict.fromkeys(names)))


def _latest(records: Sequence[dict[str, Any]]) -> str:
    """The latest starts that did not fail, as bars on one scale; their spans are folded."""
    shown = [record for record in reversed(records) if not record["error"]][:_SHOWN_STARTS]
    if not shown:
        return ""
    scale_s = max(map(total_s, shown)) or 1.0
    rows = []
    for record in shown:
        name = f"{mark(look_of(record))} {clock(record['at'])[5:]} {escape(record['model'])}"
        about = f"worker {record['worker']}, {record['dtype']}, commit {record['commit'][:12]}, {record['reason']}"
        about += f"; {first}" if (first := first_token(record)) else ""
        rows.append(
            f"<details><summary><span>{name}</span><span class=right>{total_s(record):.1f} s</span>"
            f"{drawings.stacked(record, scale_s)}</summary><p>{escape(verdict(record))}</p>"
            f"<p class=faint>{clock(record['at'])} UTC, {look_of(record)}, {escape(about)}</p>"
            f"{drawings.spans_of(record)}</details>"
        )
    earlier = sum(not record["error"] for record in records) - len(shown)
    note = f"<p class=faint>{earlier} earlier ones: modelstore history --limit {len(records)}</p>" if earlier else ""
    return (
        f"<h2>The latest starts</h2>{drawings.steps_key(shown)}{''.join(rows)}{note}"
        "<p class=faint>All bars are on one scale. Choose a start to see its steps.</p>"
    )


def _volume(models: Sequence[Mapping[str, Any]], space: Mapping[str, Any]) -> str:
    """Each model, and all else that takes space, as a bar against the quota; against what is taken without one."""
    whole = max(space["quota"] or 0, space["taken"], 1)
    rows = [_model_row(model, whole) for model in sorted(models, key=lambda model: -model["bytes"])]
    for kind, (name, colour) in _KINDS.items():
        if count := space["kinds"].get(kind, 0):
            rows.append(_row(f"<b>{name}</b>", count, whole, colour, ""))
    if space["quota"]:
        rows.append(_row("<b>free</b>", space["free"], whole, "transparent", "of the quota"))
    colours = {_colour_of(model): label for model in models for label in [_label_of(model)]}
    key = "".join(
        f'<span><i class=dot style="background:{colour}"></i> {label}</span>' for colour, label in colours.items()
    )
    about = f"Each bar is a part of {'the quota, ' + size(space['quota']) if space['quota'] else 'what is taken'}."
    return (
        f"<p class=keys>{key}</p>{''.join(rows)}<p class=faint>{about}</p>"
        if models or space["taken"]
        else f"<p>{escape(_NO_MODELS)}</p>"
    )


def _label_of(model: Mapping[str, Any]) -> str:
    if model["in_use_by"]:
        return "in use"
    return "kept by an alias or a pin" if model["aliases"] or model["pinned"] else "may be evicted"


def _colour_of(model: Mapping[str, Any]) -> str:
    """The colour of a model's bar: whether it is in use, kept, or may go."""
    return {"in use": "#2b8a3e", "may be evicted": "#8a8f98"}.get(_label_of(model), "#1971c2")


def _model_row(model: Mapping[str, Any], whole: int) -> str:
    kept = [*(f"@{name}" for name in model["aliases"]), *(["pinned"] if model["pinned"] else [])]
    kept += [f"in use by {', '.join(model['in_use_by'])}"] if model["in_use_by"] else []
    problem = model["problem"] or ("" if model["complete"] else "files are missing")
    used = "never used" if model["idle_s"] is None else f"used {ago(model['idle_s'])}"
    about = ", ".join([model["commit"][:12], used, *kept])
    colour = _colour_of(model)
    name = f"<b>{escape(model['repo_id'])}</b> {escape(variant(model))}"
    damaged = f"<br><span class=bad>damaged: {escape(problem)}</span>" if problem else ""
    return _row(name + damaged, model["bytes"], whole, colour, about)


def _row(name: str, count: int, whole: int, colour: str, about: str) -> str:
    return (
        f"<div class=model><span>{name}</span><span class=right>{size(count)}</span>"
        f"{drawings.bar(count / whole, colour)}<span class=faint>{escape(about)}</span></div>"
    )


def _quantile(records: Sequence[Mapping[str, Any]], share: float) -> float:
    """The value that `share` of the starts do not exceed, in seconds."""
    ordered = sorted(map(total_s, records))
    if share == 0.5:
        return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
