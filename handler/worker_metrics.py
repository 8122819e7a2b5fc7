"""What a worker counts, in Prometheus' text format, for /metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from handler.worker import Worker


class _OfWorker(Collector):
    def __init__(self, worker: Worker, waiting: int) -> None:
        self._worker = worker
        self._waiting = waiting

    def collect(self) -> Iterator[Metric]:
        """The metrics at this moment."""
        status = self._worker.status()
        jobs = CounterMetricFamily("modelstore_worker_jobs", "Jobs that ended", labels=["outcome"])
        for outcome, count in status["jobs"].items():
            if outcome != "running":
                jobs.add_metric([outcome], count)
        yield jobs
        yield GaugeMetricFamily("modelstore_worker_running_jobs", "Jobs that run", status["jobs"]["running"])
        yield GaugeMetricFamily(
            "modelstore_worker_waiting_requests", "Requests that wait for their turn", self._waiting
        )
        yield GaugeMetricFamily("modelstore_worker_uptime_seconds", "Seconds since it was ready", status["uptime_s"])
        start = GaugeMetricFamily("modelstore_worker_start_seconds", "Seconds of its start", labels=["span"])
        seconds: dict[str, float] = {}
        for span in (status["timeline"] or {}).get("spans", ()):
            seconds[span["name"]] = seconds.get(span["name"], 0.0) + span["end"] - span["start"]
        for name, value in seconds.items():
            start.add_metric([name], round(value, 3))
        yield start
        model = GaugeMetricFamily(
            "modelstore_worker_model", "The model that it serves", labels=["model", "commit", "dtype"]
        )
        model.add_metric([str(status[name]) for name in ("model", "commit", "dtype")], 1)
        yield model


def as_text(worker: Worker, waiting: int) -> str:
    """The metrics; `waiting`: so many requests wait for their turn."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_OfWorker(worker, waiting))
    return generate_latest(registry).decode()
