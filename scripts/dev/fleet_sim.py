#!/usr/bin/env python3
"""A fleet on one volume, simulated from the spans of real starts: a first run, 100 workers at once, a swap of an alias.

    python scripts/dev/fleet_sim.py [--history FILE] [--workers 1 8 32 100] [--model 16GB] [--volume 1GB] [--hub 500MB]
                                    [--check] [--write docs/benchmarks/measurements.md]

`--history` is the output of `modelstore history --json`; without it a worker of this machine is started. Its medians
say how long a worker imports, what it does after imports and reads, and how fast one worker reads at most. Each worker
has a host of its own; all share the volume's rate evenly, and one of them downloads. `--check` starts 8 real workers at
once on a volume that is throttled to 200 MiB/s, as root with cgroup v1, and simulates the same, with this machine's
processors shared by all 8.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HERE))

from modelstore.bench.checkpoints import make_checkpoint, seeded, snapshot_of
from modelstore.bench.race import drop_page_cache, environment, run_worker
from modelstore.processors import processors
from modelstore.settings import parse_size
from modelstore.timeline import total_s
from scripts.bench import throttled
from scripts.bench.sections import write_section

_CHECKED_WORKERS = 8
_CHECKED_RATE = 200 << 20
_CHECKED_BYTES = 500_000_000


@dataclass(frozen=True, slots=True)
class Spans:
    """A worker alone. `before_s`: of its own until the read begins; `import_s`: of imports beside the read; `after_s`:
    from the last of both to ready; `read_per_s`: the most bytes a second that one worker reads."""

    before_s: float
    import_s: float
    after_s: float
    read_per_s: float


def spans_of(records: Sequence[dict[str, Any]]) -> Spans:
    """The medians of warm starts. Raises ValueError if there is none."""
    each = [
        _spans_of(record)
        for record in records
        if record["kind"] == "start" and record["outcome"] == "hit" and not record["error"]
        if any(span["name"] == "read" for span in record["spans"])
    ]
    if not each:
        raise ValueError("the history has no warm start: start a worker again")
    columns = zip(*((one.before_s, one.import_s, one.after_s, one.read_per_s) for one in each), strict=True)
    return Spans(*map(statistics.median, columns))


def _spans_of(record: dict[str, Any]) -> Spans:
    reads = [span for span in record["spans"] if span["name"] == "read"]
    begin = min(span["start"] for span in reads)
    read_end = max(span["end"] for span in reads)
    # What needs the weights comes after both: building the model ends with the read at the earliest.
    imports_end = max((span["end"] for span in record["spans"] if span["name"] == "import"), default=begin)
    size_bytes = sum(span.get("bytes", 0) for span in reads)
    return Spans(
        before_s=begin,
        import_s=imports_end - begin,
        after_s=max(total_s(record) - max(read_end, imports_end), 0.0),
        read_per_s=size_bytes / max(read_end - begin, 1e-6),
    )


@dataclass
class Work:
    """An amount of seconds or bytes at a shared resource, at most `most` a second, begun once `after` are done."""

    resource: str
    amount: float
    most: float = 1.0
    after: Sequence[Work] = ()
    ended: float | None = None

    @property
    def can_run(self) -> bool:
        return self.ended is None and all(each.ended is not None for each in self.after)


@dataclass
class Simulation:
    """Work that shares resources evenly. `capacity`: units a second of each resource; without, each has its own."""

    capacity: dict[str, float]
    works: list[Work] = field(default_factory=list)

    def add(self, work: Work) -> Work:
        self.works.append(work)
        return work

    def run(self) -> None:
        """Give every piece of work the time of its end."""
        now = 0.0
        left = {id(work): work.amount for work in self.works}
        while running := [work for work in self.works if work.can_run]:
            rates = self._rates(running)
            step = min(left[id(work)] / rates[id(work)] for work in running)
            now += step
            for work in running:
                left[id(work)] -= step * rates[id(work)]
                if left[id(work)] <= 1e-9 * max(work.amount, 1.0):
                    work.ended = now

    def _rates(self, running: Iterable[Work]) -> dict[int, float]:
        """Each gets an even part; what one cannot use goes to the others."""
        rates: dict[int, float] = {}
        by_resource: dict[str, list[Work]] = {}
        for work in running:
            by_resource.setdefault(work.resource, []).append(work)
        for name, works in by_resource.items():
            rest = self.capacity.get(name, float("inf"))
            for position, work in enumerate(sorted(works, key=lambda each: each.most)):
                rates[id(work)] = min(work.most, rest / (len(works) - position))
                rest -= rates[id(work)]
        return rates


@dataclass(frozen=True, slots=True)
class Fleet:
    """What all workers share: the volume and the Hub, in bytes a second; `processors`, if they are on one machine."""

    volume_per_s: float
    hub_per_s: float
    processors: float | None = None

    def simulation(self) -> Simulation:
        capacity = {"volume": self.volume_per_s, "hub": self.hub_per_s}
        return Simulation(capacity | ({"processor": self.processors} if self.processors else {}))


def scale_up(workers: int, size_bytes: float, spans: Spans, fleet: Fleet) -> list[float]:
    """Seconds to ready of workers that start at once, the model on the volume."""
    simulation = fleet.simulation()
    ready = []
    for _ in range(workers):
        before = simulation.add(Work("processor", spans.before_s))
        imports = simulation.add(Work("processor", spans.import_s, after=[before]))
        read = simulation.add(Work("volume", size_bytes, spans.read_per_s, after=[before]))
        ready.append(simulation.add(Work("processor", spans.after_s, after=[imports, read])))
    simulation.run()
    return [work.ended or 0.0 for work in ready]


def first_run(workers: int, size_bytes: float, spans: Spans, fleet: Fleet) -> list[float]:
    """Seconds to ready if the volume is empty: one worker downloads, takes the bytes as they come, and publishes; the
    others import meanwhile, and read then."""
    simulation = fleet.simulation()
    download = Work("hub", size_bytes, fleet.hub_per_s)
    ready = []
    for number in range(workers):
        before = simulation.add(Work("processor", spans.before_s))
        imports = simulation.add(Work("processor", spans.import_s, after=[before]))
        if number == 0:
            download.after = [before]
            bytes_there = simulation.add(download)
        else:
            bytes_there = simulation.add(Work("volume", size_bytes, spans.read_per_s, after=[before, download]))
        ready.append(simulation.add(Work("processor", spans.after_s, after=[imports, bytes_there])))
    simulation.run()
    return [work.ended or 0.0 for work in ready]


def swap(workers: int, size_bytes: float, spans: Spans, fleet: Fleet) -> list[float]:
    """Seconds until each running worker serves the model that its alias names now; the former one answers meanwhile."""
    simulation = fleet.simulation()
    reads = [simulation.add(Work("volume", size_bytes, spans.read_per_s)) for _ in range(workers)]
    simulation.run()
    return [read.ended or 0.0 for read in reads]


SCENARIOS: dict[str, Callable[[int, float, Spans, Fleet], list[float]]] = {
    "first run, the volume empty": first_run,
    "all start at once, the model there": scale_up,
    "an alias is repointed": swap,
}


def table(counts: Sequence[int], size_bytes: float, spans: Spans, fleet: Fleet) -> list[str]:
    """A row for each scenario and number of workers."""
    lines = ["| | workers | first ready s | median s | last s | workers' seconds |", "|---|---|---|---|---|---|"]
    for label, scenario in SCENARIOS.items():
        for count in counts:
            seconds = scenario(count, size_bytes, spans, fleet)
            paid = "" if scenario is swap else f"{sum(seconds):.0f}"
            row = f"{min(seconds):.1f} | {statistics.median(seconds):.1f} | {max(seconds):.1f} | {paid}"
            lines.append(f"| {label} | {count} | {row} |")
    return lines


def measured_alone(folder: Path) -> tuple[list[dict[str, Any]], float]:
    """Three starts on this machine, one after the other, and the processor's seconds of one with all its processes."""
    checkpoint = make_checkpoint(folder / "alone", _CHECKED_BYTES, "float16")
    seeded(folder / "alone-store", checkpoint)
    records, used = [], []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        drop_page_cache(snapshot_of(folder / "alone-store"))
        sample, _answered = run_worker(folder / "alone-store", f"file://{checkpoint}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        records.append({"kind": "start", "outcome": "hit", "error": "", "spans": list(sample.spans)})
    return records, statistics.median(used)


def checked(folder: Path, spans: Spans, used_s: float) -> list[str]:
    """8 real workers at once on a throttled volume, beside the simulation of that. `used_s`: the processor's seconds
    of one, which they wait for here: readers and libraries' threads count, too."""
    if reason := throttled.why_not():
        return [f"The check against real workers: not run ({reason})."]
    with throttled.throttled(4 << 30, (_CHECKED_RATE,), folder) as volume:
        checkpoint = make_checkpoint(volume.mount / "model", _CHECKED_BYTES, "float16")
        root = volume.mount / "modelstore"
        stored = sum(path.stat().st_size for path in seeded(root, checkpoint).glob("*.safetensors"))
        drop_page_cache(snapshot_of(root))
        seconds: list[float] = []
        lock = threading.Lock()

        def work() -> None:
            sample, _answered = run_worker(root, f"file://{checkpoint}", volume.prefix(_CHECKED_RATE))
            with lock:
                seconds.append(sample.seconds)

        threads = [threading.Thread(target=work) for _ in range(_CHECKED_WORKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    fleet = Fleet(_CHECKED_RATE, 1.0, processors=processors())
    busy = replace(spans, import_s=max(used_s - spans.before_s - spans.after_s, 0.0))
    expected = scale_up(_CHECKED_WORKERS, stored, busy, fleet)
    lines = [
        f"Checked: {_CHECKED_WORKERS} real workers of {stored / 1e9:.2f} GB at once on a volume of "
        f"{_CHECKED_RATE >> 20} MiB/s, all on {processors()} processors, of which one takes {used_s:.1f} s:",
        "",
        "| | first ready s | median s | last s |",
        "|---|---|---|---|",
    ]
    for label, values in (("simulated", expected), ("measured", seconds)):
        lines.append(f"| {label} | {min(values):.1f} | {statistics.median(values):.1f} | {max(values):.1f} |")
    lines.append("")
    lines.append(f"Simulated / measured: median {statistics.median(expected) / statistics.median(seconds):.2f}.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--history", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 32, 100])
    parser.add_argument("--model", default="16GB")
    parser.add_argument("--volume", default="1GB", help="a second, for all workers together")
    parser.add_argument("--hub", default="500MB", help="a second, for the worker that downloads")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--write", type=Path, help="the document whose section by this script is replaced")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fleet-", dir=options.folder) as name:
        folder = Path(name)
        measured, used_s = measured_alone(folder) if options.check or not options.history else ([], 0.0)
        records = json.loads(options.history.read_text()) if options.history else measured
        try:
            spans = spans_of(records)
        except ValueError as error:
            sys.exit(f"error: {error}")
        size_bytes = parse_size("--model", options.model)
        volume, hub = parse_size("--volume", options.volume), parse_size("--hub", options.hub)
        # One worker alone was slowed by its own disk, if it was read cold; a fleet's volume has its own rate.
        alone = Spans(spans.before_s, spans.import_s, spans.after_s, max(spans.read_per_s, volume))
        lines = [
            f"Simulated by `python scripts/dev/fleet_sim.py --model {options.model} --volume {options.volume} --hub "
            f"{options.hub}{' --check' if options.check else ''}`:",
            f"{environment(folder)}. One worker alone: {spans.before_s:.1f} s until the read begins, "
            f"{spans.import_s:.1f} s of imports, {spans.after_s:.1f} s after both.",
            "",
            *table(options.workers, size_bytes, alone, Fleet(volume, hub)),
        ]
        if options.check:
            lines += ["", *checked(folder, spans_of(measured), used_s)]
    text = "\n".join(lines)
    print(text)
    if options.write is not None:
        write_section(options.write, "dev/fleet_sim.py", text)


if __name__ == "__main__":
    main()
