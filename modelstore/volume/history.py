"""The starts of a fleet and the swaps of its workers, a small record each, to show later why one was slow; and events:
evictions and quarantines.

    starts/2026-11-21/1795277497.<worker>.<random>.json    {"at": 1795277497, "error": "", "worker": …, "spans": […],
                                                            "first_job": {"taken": 8.1, "first_token": 8.4}}
    events/2026-11-21/1795277497.evicted.<random>.json     {"at": 1795277497, "kind": "evicted", "repo_id": …, …}

`at` of a start is when the process began, in seconds since 1970 by that host's clock; the rest is the timeline's.
Every writer removes the days that are older than a month, and the oldest records of its day beyond `KEPT_A_DAY`.
Standard library only.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from modelstore.errors import ModelStoreError, UsageError
from modelstore.timeline import Timeline, outcome_of
from modelstore.units import printable
from modelstore.volume import durable, refs, tree
from modelstore.volume.layout import Layout, SnapshotKey

KEPT_DAYS = 30
KEPT_A_DAY = 256  # workers that start and fail in a loop would leave thousands
_RECORD = re.compile(r"\d{1,12}\.[^/]+\.[0-9a-f]{8}\.json")
_MOST_SPANS = 500  # of a record: ours have a few dozen, and a neighbour can write thousands
EVENTS = ("evicted", "quarantined")

logger = logging.getLogger(__name__)


def add(layout: Layout, timeline: Timeline, *, error: str = "") -> Path | None:
    """Keep the record of a start, or of one that failed; returns its file. Best effort: if the volume cannot be
    written, it is lost."""
    began = time.time() - timeline.now()
    record = {"at": round(began, 3), "error": error[:2000], **timeline.as_json()}
    return _keep(layout, layout.starts, quote(timeline.worker, safe="", errors="replace")[:100], record)


def add_first_job(path: Path, first_job: Mapping[str, float]) -> None:
    """Add the first job to the record of a start: `taken` and `first_token`, in seconds since the process began, and
    `queued_s`, its seconds in the queue, if they are known. Best effort."""
    record = _json(path)
    if isinstance(record, dict):
        try:
            durable.write_atomic(path, _encoded({**record, "first_job": dict(first_job)}))
        except (ModelStoreError, OSError) as failed:
            logger.warning("the first answer is not in the volume's history: %s", failed)


def record_event(layout: Layout, kind: str, key: SnapshotKey) -> None:
    """Record an event of a snapshot; `kind` is one of EVENTS. Best effort: if the volume cannot be written, it is
    lost."""
    record = {
        "at": round(time.time(), 3),
        "kind": kind,
        **key.as_json(),
    }
    _keep(layout, layout.events, kind, record)


def events(layout: Layout) -> list[dict[str, Any]]:
    """The events of snapshots, the oldest first; records that cannot be read are left out."""
    records = [_json(path) for day in _days(layout.events) for path in tree.entries(day)]
    return [record for record in records if isinstance(record, dict) and record.get("kind") in EVENTS]


def _encoded(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def _keep(layout: Layout, folder: Path, label: str, record: dict[str, Any]) -> Path | None:
    day = folder / time.strftime("%Y-%m-%d", time.gmtime(record["at"]))
    try:
        refs.check_format(layout)
        tree.check_no_links(layout.root, day)
        is_new_day = not day.exists()
        path = day / f"{int(record['at'])}.{label}.{secrets.token_hex(4)}.json"
        durable.write_atomic(path, _encoded(record))
        records = [path for path in tree.entries(day) if _RECORD.fullmatch(path.name)]
        for path in records[:-KEPT_A_DAY]:  # their names begin with the time
            durable.remove_file(path)
        if is_new_day:
            for old in _days(folder)[:-KEPT_DAYS]:
                durable.remove_tree(old)
    except (ModelStoreError, OSError) as failed:
        logger.warning("this is not in the volume's history: %s", failed)
        return None
    return path


def starts(
    layout: Layout, *, limit: int, model: str | None = None, since: float = 0.0, outcome: str | None = None
) -> list[dict[str, Any]]:
    """The latest records, or the latest of one model and one outcome, the oldest of them first; unreadable ones are
    left out. `since`: seconds since 1970."""

    def is_asked_for(record: dict[str, Any] | None) -> bool:
        return (
            record is not None
            and record["at"] >= since
            and model in (None, record["model"])
            and outcome in (None, outcome_of(record))
        )

    records: list[dict[str, Any]] = []
    for day in reversed(_days(layout.starts)):
        paths = tree.entries(day)  # their names begin with the time
        while paths and (missing := limit - len(records)):
            read = tree.map_concurrently(_read, paths[-missing:])
            records += [record for record in read if record is not None and is_asked_for(record)]
            del paths[-missing:]
    return sorted(records, key=lambda record: record["at"])


def parse_since(text: str) -> float:
    """`90min`, `6h` or `2d` before now, or a day or time in UTC such as `2026-11-26` or `2026-11-26 17:30`, in seconds
    since 1970. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)\s*(s|min|h|d)", text.strip())
    if match:
        return time.time() - float(match[1]) * {"s": 1, "min": 60, "h": 3600, "d": 86400}[match[2]]
    from datetime import UTC, datetime  # a worker never needs it

    try:
        moment = datetime.fromisoformat(text.strip())
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise UsageError(f"--since {text!r} is no time: write it like 6h, 2d or 2026-11-26") from None


def _days(folder: Path) -> list[Path]:
    return [path for path in tree.entries(folder) if len(path.name) == 10 and path.name[:4].isdigit()]


def _json(path: Path) -> Any:
    try:
        return json.loads(durable.read_file(path, 1 << 16))
    except (OSError, ValueError, RecursionError):
        return None


def _read(path: Path) -> dict[str, Any] | None:
    """A record made of checked values only; None if it is damaged."""
    record = _json(path)
    try:
        spans: list[dict[str, Any]] = [
            {"name": printable(str(span["name"])), "start": _seconds(span["start"]), "end": _seconds(span["end"])}
            | ({"detail": printable(str(span["detail"]))} if "detail" in span else {})
            | {name: _natural(span[name]) for name in ("bytes", "plain_bytes") if name in span}
            | ({"decoding_s": _seconds(span["decoding_s"])} if "decoding_s" in span else {})
            for span in record["spans"][:_MOST_SPANS]
        ]
        texts = {name: record[name] for name in ("worker", "model", "commit", "dtype", "reason", "error")}
        texts |= {name: record.get(name) or "" for name in ("outcome", "waited_for")}
        texts["kind"] = "swap" if record.get("kind") == "swap" else "start"
        texts["model"] = "" if texts["model"] == "None" else texts["model"]  # from versions before 0.2
        at = _seconds(record["at"])
        processors = _natural(record.get("processors", 0))
        first = record.get("first_job") or {}
        first_job = {name: _seconds(first[name]) for name in ("taken", "first_token", "queued_s") if name in first}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    if not all(isinstance(text, str) for text in texts.values()) or not all(s["start"] <= s["end"] for s in spans):
        return None
    checked = {"at": at, **{name: printable(text) for name, text in texts.items()}, "spans": spans}
    checked |= {"processors": processors} if processors else {}
    return checked | ({"first_job": first_job} if first_job.keys() >= {"taken", "first_token"} else {})


def _natural(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value < 1e18:
        raise ValueError
    return value


def _seconds(value: object) -> float:
    if not isinstance(value, int | float) or not 0 <= value < 1e11:
        raise ValueError
    return float(value)
