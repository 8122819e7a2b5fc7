"""The state of a volume as Prometheus metrics: to a text file, or on a port.

Everything is read from the volume when it is asked for, so any machine that mounts it can serve them, for the whole
fleet. Starts and events are those on record, of the last thirty days.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest, start_http_server, write_to_textfile
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from modelstore.operate import inventory
from modelstore.settings import Settings
from modelstore.timeline import OUTCOMES, total_s
from modelstore.volume import history
from modelstore.volume.layout import Layout

_STARTS = 5_000


class _OfVolume(Collector):
    def __init__(self, layout: Layout, settings: Settings) -> None:
        self._layout = layout
        self._settings = settings

    def describe(self) -> list[Metric]:
        """Nothing ahead of time: the volume is read when it is asked for."""
        return []

    def collect(self) -> Iterator[Metric]:
        yield from _of_starts(history.starts(self._layout, limit=_STARTS))
        yield _counted("modelstore_events", "Evictions and verification failures on record", "kind", self._events())
        space = inventory.space(self._layout, self._settings)
        kinds = GaugeMetricFamily("modelstore_bytes", "Bytes on the volume, by kind", labels=["kind"])
        for kind, size in space["kinds"].items():
            kinds.add_metric([kind], size)
        yield kinds
        yield GaugeMetricFamily("modelstore_taken_bytes", "Bytes of the store", value=space["taken"])
        yield GaugeMetricFamily(
            "modelstore_evictable_bytes", "Bytes that an eviction would free", value=space["evictable"]
        )
        if space["quota"] is not None:
            yield GaugeMetricFamily("modelstore_quota_bytes", "MODELSTORE_QUOTA", value=space["quota"])
        yield GaugeMetricFamily("modelstore_snapshots", "Published snapshots", value=len(space["snapshots"]))

    def _events(self) -> Counter[str]:
        counted = Counter(dict.fromkeys(history.EVENTS, 0))
        counted.update(event["kind"] for event in history.events(self._layout))
        return counted


def _of_starts(starts: list[dict[str, Any]]) -> Iterator[Metric]:
    outcomes = Counter(dict.fromkeys((*OUTCOMES, "failed"), 0))
    seconds: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    starts = [record for record in starts if record["kind"] == "start"]
    for record in starts:
        outcomes["failed" if record["error"] else record["outcome"] or "hit"] += 1
        for span in record["spans"]:
            seconds[span["name"]] += span["end"] - span["start"]
            moved[span["name"]] += span.get("bytes", 0)
    yield _counted("modelstore_starts", "Starts on record", "outcome", outcomes)
    yield _counted("modelstore_start_seconds", "Seconds of the starts on record", "span", seconds)
    yield _counted("modelstore_start_bytes", "Bytes that the starts on record moved", "span", +moved)
    times = sorted(total_s(record) for record in starts if not record["error"])
    ready = GaugeMetricFamily("modelstore_ready_seconds", "How long starts on record took", labels=["quantile"])
    for quantile in (0.5, 0.95) if times else ():
        ready.add_metric([str(quantile)], times[min(int(quantile * len(times)), len(times) - 1)])
    yield ready


def _counted(name: str, meaning: str, label: str, values: Counter[Any]) -> Metric:
    metric = GaugeMetricFamily(name, meaning, labels=[label])
    for value, count in sorted(values.items()):
        metric.add_metric([value], round(count, 6))
    return metric


def _registry(layout: Layout, settings: Settings) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_OfVolume(layout, settings))
    return registry


def as_text(layout: Layout, settings: Settings) -> str:
    """The metrics in Prometheus' text format."""
    return generate_latest(_registry(layout, settings)).decode()


def write(layout: Layout, settings: Settings, path: Path) -> None:
    """The same into a file, replaced as a whole, as node_exporter's textfile collector wants it."""
    write_to_textfile(str(path), _registry(layout, settings))


def serve(layout: Layout, settings: Settings, port: int, *, address: str) -> Any:
    """Answer scrapes on a port of `address`, in threads; returns the server. Raises OSError if the port is taken, or
    the address is none of this machine's."""
    server, _thread = start_http_server(port, addr=address, registry=_registry(layout, settings))
    return server
