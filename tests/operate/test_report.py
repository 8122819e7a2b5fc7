"""The page of `modelstore report`: what it says, that it loads nothing, and how it looks in a real browser."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from modelstore.operate import drawings, report
from modelstore.operate.fleet import Compressed
from modelstore.timeline import SPAN_KINDS, Span, Timeline, sections, shared_s
from modelstore.volume import history
from modelstore.volume.layout import Layout
from tests.conftest import Cli
from tests.support.browser import WHY_NOT, looked_at
from tests.support.hub import Hub
from tests.support.models import write_model

NOON = 1_796_040_000.0  # 2026-11-30 12:00 UTC


def record(at: float, ready_s: float = 10.0, **changes: Any) -> dict[str, Any]:
    """A warm start that reads and imports at the same time, then builds."""
    spans = [
        {"name": "read", "start": 0.0, "end": ready_s * 0.8, "bytes": 10**9},
        {"name": "import", "start": 0.0, "end": ready_s * 0.2, "detail": "torch"},
        {"name": "build", "start": ready_s * 0.8, "end": ready_s},
        {"name": "ready", "start": ready_s, "end": ready_s},
    ]
    start = {
        "at": at,
        "worker": "pod-1",
        "model": "@chat",
        "commit": "a" * 40,
        "dtype": "float16",
        "reason": "it was there",
    }
    return (
        start
        | {"processors": 8, "error": "", "outcome": "hit", "waited_for": "", "kind": "start", "spans": spans}
        | changes
    )


def model(name: str, size_bytes: int, **changes: Any) -> dict[str, Any]:
    key = {"repo_id": name, "commit": "b" * 40, "dtype": "float16", "files": 3, "bytes": size_bytes, "idle_s": 60}
    return key | {"complete": True, "problem": "", "pinned": False, "aliases": [], "in_use_by": []} | changes


def space(**changes: Any) -> dict[str, Any]:
    kinds = {"models": 30 * 10**9, "staging": 2 * 10**9, "quarantine": 0, "trash": 0, "promised": 0}
    taken = {"root": "/runpod-volume/modelstore", "quota": 60 * 10**9, "taken": 32 * 10**9, "free": 28 * 10**9}
    return taken | {"kinds": kinds, "evictable": 8 * 10**9} | changes


FAILED = {"error": "HubUnavailable: the Hub could not be reached", "outcome": "", "spans": []}
MANY = [
    *(record(NOON + hour * 4 * 3600, 8 + hour % 7) for hour in range(29)),
    *(record(NOON + day * 86400, worker=f"pod-{day}", model=f"org/{day}", **FAILED) for day in range(4)),
    record(NOON + 100, 70, outcome="downloaded"),
    record(NOON + 200, 4, kind="swap"),
]
MODELS = [
    model("org/chat-7b-instruct", 14 * 10**9, aliases=["chat"], in_use_by=["pod-1"]),
    model("stabilityai/stable-diffusion-xl-base-1.0", 7 * 10**9, pinned=True),
    model("org/a-model-with-a-very-long-name-that-must-wrap-somewhere", 10**9, problem="model.safetensors: missing"),
]


def page(records: list[dict[str, Any]], models: list[dict[str, Any]] = MODELS, **of_space: Any) -> str:
    return report.html(
        models,
        space(**of_space),
        sorted(records, key=lambda each: each["at"]),
        made_at=NOON + 6 * 86400,
        compressed_form=lambda _commit, _dtype: Compressed(0.67, 1.0),
    )


class Page(HTMLParser):
    """What a page is made of; fails if tags do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _tag, attributes in self.seen if name in (attributes.get("class") or "").split()]


@pytest.mark.slow
def test_the_page_is_whole_and_loads_nothing(hub: Hub, cli: Cli, tmp_path: Path, store_env: dict[str, str]) -> None:
    layout = Layout(Path(store_env["MODELSTORE_ROOT"]))
    write_model(hub.folder / "org" / "name", seed=1)
    cli("seed", "org/name")
    evil = "<script>alert(1)</script>"
    timeline = Timeline(worker=evil, model=evil, outcome="hit", began=time.monotonic() - 5)
    for span in (Span("import", 0.1, 3), Span("read", 0.5, 4, 10**9), Span("ready", 4.2, 4.2)):
        timeline.add(span)
    history.add(layout, timeline)
    history.add(layout, Timeline(model=evil), error=f"Broken: {evil}")
    out = tmp_path / "page.html"
    told = cli.json("report", "--out", str(out))
    assert told == {"path": str(out), "starts": 2, "models": 1}
    text = out.read_text()
    shown = Page(text)
    assert {"script", "link", "img", "iframe"}.isdisjoint({tag for tag, _attributes in shown.seen})
    assert not re.search(r"(?:src|href)=|url\(|https?://", text)
    assert evil in shown.words, "as text"
    assert "1.0 s of 4.2 s reading the weights from the volume at 286 MB/s; 2.5 s more at the same time" in shown.words
    assert shown.open == []
    assert "1 of 2 starts failed; a typical warm start takes 4.2 s, most of it" in shown.words


@pytest.mark.slow
def test_an_empty_store_has_a_page_too(cli: Cli, tmp_path: Path) -> None:
    cli("report", "--out", str(tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text()
    assert "No start has been recorded yet: start a worker with this volume" in text
    assert "No models are on the volume: run modelstore seed" in text
    assert "run `modelstore warm REF`" in cli("report", "--text").stdout


@pytest.mark.slow
def test_a_page_that_cannot_be_written_is_one_line(cli: Cli) -> None:
    assert cli("report", "--out", "/dev/null/page.html", code=1).stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        (
            MANY,
            "4 of 34 starts failed; a typical warm start takes 11.0 s, most of it reading the weights from the volume.",
        ),
        ([record(NOON)], "The only start succeeded; a typical warm start takes 10.0 s, most of it reading"),
        ([record(NOON, **FAILED)], "The only start failed; no warm start has been recorded."),
        ([record(NOON), record(NOON + 1)], "None of 2 starts failed; a typical"),
        ([record(NOON, kind="swap")], "No start has been recorded yet"),
    ],
    ids=["many", "one", "one that failed", "two", "a swap alone"],
)
def test_the_verdict_comes_first(records: list[dict[str, Any]], sentence: str) -> None:
    shown = Page(page(records))
    assert sentence in shown.words
    assert shown.words.index(sentence) < shown.words.index("The volume")


def test_the_four_figures() -> None:
    shown = Page(page(MANY))
    assert len(shown.of_class("card")) == 4
    for words in (
        "32.00 GBof 60.00 GBan eviction would free 8.00 GB",
        "11.0 smedian of 29 warm starts; 95th percentile 14.0 s",
        "97%found the model on the volume, of 30 that did not fail",
        "4failed, of 34 starts",
    ):
        assert words in shown.words
    assert "taken, without a quota" in Page(page(MANY, quota=None, free=None)).words


def test_failures_have_a_row_of_their_own_and_are_grouped() -> None:
    text = page(MANY)
    plot, _lane, lane = text.partition("<div class=lane>")
    assert plot.count("<title>") == 1 + 31, "the page's, and the tip of each start on the plane"
    assert lane.partition("<div class=times>")[0].count("<svg class=mark") == 4
    shown = Page(text)
    assert len(shown.of_class("failure")) == 1
    assert "org/3, org/2, org/1 and 1 more: HubUnavailable" in shown.words
    assert "4 times, last 2026-12-03 12:00 UTC, first 2026-11-30 12:00" in shown.words


def test_the_volume_is_bars_against_the_quota() -> None:
    shown = Page(page(MANY))
    widths = [
        style["style"] or "" for tag, style in shown.seen if tag == "i" and "left:0;" in (style.get("style") or "")
    ]
    assert any("width:23.33%" in width for width in widths), "14 of 60 GB"
    for words in (
        "unfinished downloads",
        "damaged: model.safetensors: missing",
        "@chat, in use by pod-1",
        "free28.00 GB",
    ):
        assert words in shown.words


def test_each_drawing_has_a_role_and_a_text() -> None:
    shown = Page(page(MANY))
    drawn = [attributes for _tag, attributes in shown.seen if attributes.get("role") == "img"]
    assert len(drawn) == 1 + 1 + 31, "the quota, the starts over time, and the latest starts"
    assert all(attributes["aria-label"] for attributes in drawn)


@pytest.mark.parametrize(
    ("first", "last", "labels"),
    [
        (NOON, NOON + 3600, ["30 Nov 12:00", "12:15", "12:30", "12:45", "13:00"]),
        (NOON, NOON + 5 * 86400, ["01 Dec", "02 Dec", "03 Dec", "04 Dec", "05 Dec"]),
        (NOON + 30, NOON + 86400, ["30 Nov 18:00", "01 Dec", "06:00", "12:00"]),
        (NOON, NOON + 400 * 86400, None),
    ],
)
def test_ticks_of_time_are_round(first: float, last: float, labels: list[str] | None) -> None:
    ticks = drawings.time_ticks(first, last)
    assert 1 <= len(ticks) <= 7
    assert all(at % 60 == 0 for at, _label in ticks)
    if labels is not None:
        assert [label for _at, label in ticks] == labels


@pytest.mark.parametrize(("largest", "step"), [(0.4, 0.1), (3.0, 0.5), (14.9, 5), (77, 20), (100, 20), (601, 200)])
def test_ticks_of_seconds_are_round(largest: float, step: float) -> None:
    assert drawings.round_step(largest) == pytest.approx(step)


def test_no_second_counts_twice() -> None:
    spans = record(NOON)["spans"]
    assert sum(end - begin for begin, end, _kinds in sections(spans)) == pytest.approx(10)
    assert shared_s(spans) == pytest.approx({"read": 7.0, "import": 1.0, "build": 2.0})


def luminance(colour: str) -> float:
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """As WCAG 2.1 defines it."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_and_drawings_have_contrast(theme: str) -> None:
    palette = report.PALETTES[theme]
    for text in ("text", "faint", "bad"):
        for surface in ("page", "card"):
            assert contrast(palette[text], palette[surface]) >= 4.5, (text, surface)
    for colour in (*drawings.COLOURS.values(), *(kind.colour for kind in SPAN_KINDS.values())):
        assert contrast(colour, palette["page"]) >= 3.0, colour


@pytest.mark.slow
@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("records", [MANY, [record(NOON)], []], ids=["many", "one", "none"])
def test_a_browser_shows_all_of_it_at_each_width(tmp_path: Path, records: list[dict[str, Any]], scheme: str) -> None:
    path = tmp_path / "page.html"
    path.write_text(page(records, MODELS if records else []))
    for width in (390, 768, 1280):
        seen = looked_at(path, width=width, scheme=scheme)
        assert seen["width"] <= width, "nothing is cut"
        assert seen["smallest_text_px"] >= 12
        assert seen["background"] == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 28)"}[scheme]
        assert seen["card_columns"] == (2 if width == 390 else 4)
        assert not seen["texts_outside"], seen["texts_outside"]


def test_the_time_that_was_paid_for_is_told_with_the_best_change() -> None:
    first_job = {"taken": 11.0, "first_token": 11.5, "queued_s": 14.0}
    records = [record(NOON + n, 10.0, first_job=first_job) for n in range(3)]
    words = Page(page(records)).words
    assert "The time that was paid for" in words
    assert "3 starts took 30.0 s of workers' time until they were ready, which is billed." in words
    assert "From the request to the first token it took 14.5 s, the median." in words
    assert "Compressing @chat would have saved about 6 of 30 s" in words, "3 times 6 s of reading alone, a third"
    assert "first token after 11.5 s, 14.5 s after its request" in words
    assert "would have saved" not in Page(page([record(NOON, **FAILED)])).words
