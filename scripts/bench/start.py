#!/usr/bin/env python3
"""Loading and starting against the competitors and the physical floors: the tables of docs/benchmarks/measurements.md.

    python scripts/bench/start.py [--start 1.7GB,4GB] [--load 0.1GB,1GB,4GB] [--runs 5] [--write DOCUMENT]

Volumes: a loop device of its own, throttled to 300 MiB/s and to 1000 MiB/s (as root, with cgroup v1), a real MooseFS
(as root, with its Debian packages) and the page cache. Sizes are those of the 16-bit checkpoint. What is measured and
how is in modelstore/bench/race.py; `modelstore bench` does the same on a volume of yours.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HERE))

from modelstore.bench.checkpoints import make_checkpoint, seeded
from modelstore.bench.race import (
    Entrant,
    Measured,
    drop_page_cache,
    environment,
    fill_page_cache,
    load_contenders,
    race,
    run_contender,
    start_contenders,
    table,
)
from modelstore.settings import parse_size
from modelstore.timeline import SPAN_KINDS
from scripts.bench import throttled as volumes
from scripts.bench.sections import write_section
from tests.support.moosefs import MooseFS, why_not

RATES = {300 << 20: "300 MiB/s", 1000 << 20: "1000 MiB/s"}
DTYPES = ("float16", "bfloat16", "float32")
CHART = "start.svg"


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def starts(folder: Path, size: int, runs: int) -> tuple[list[str], dict[str, list[Measured]]]:
    """Whole starts on the throttled volume; the tables, and what the chart is drawn from."""
    if reason := volumes.why_not():
        return [f"Starts on a throttled volume: not measured ({reason}).", ""], {}
    lines, drawn = [], {}
    with volumes.throttled(6 * size + (4 << 30), tuple(RATES), folder) as volume:
        checkpoints = {dtype: make_checkpoint(volume.mount / dtype, size, dtype) for dtype in DTYPES}
        snapshot = seeded(volume.mount / "modelstore", checkpoints["float16"])
        stored = sum(path.stat().st_size for path in snapshot.glob("*.safetensors"))
        for rate, name in RATES.items():
            report(f"start, {size / 1e9:g} GB, {name}")
            contenders = start_contenders(
                volume.mount / "modelstore", checkpoints, device="cpu", prefix=volume.prefix(rate)
            )
            if not drawn:  # the libraries are in the page cache from then on
                contenders[1].run()
            results = race(contenders, runs, report, warm_up=False)
            drawn[f"{stored / 1e9:.1f} GB in 16 bits, {name}"] = results
            lines += [f"**Start, {stored / 1e9:.2f} GB stored in float16, a volume of {name}**", ""]
            lines += table(results, stored, floors=2)
            ready = next(result for result in results if result.label.endswith("ready"))
            for result in results[4:]:
                pairs = [ours / other for ours, other in zip(ready.seconds, result.seconds, strict=True)]
                lines.append(
                    f"{'' if lines[-1].startswith('Ready') else chr(10)}Ready / {result.label.partition(', ')[2]}: "
                    f"{statistics.median(pairs):.2f}  "
                )
            lines.append("")
    return lines, drawn


def loads(folder: Path, size: int, runs: int, *, cold: bool, where: str) -> list[str]:
    """Loading alone, every competitor in turn, and what comparing checksums costs."""
    report(f"loading, {size / 1e9:g} GB, {where}")
    checkpoint = make_checkpoint(folder / f"checkpoint-{size}", size, "float16")
    snapshot = seeded(folder / f"modelstore-{size}", checkpoint)
    run_contender("prepare_volume_cache", checkpoint, "cpu")
    contenders = load_contenders(snapshot, checkpoint, device="cpu", cold=cold)
    unverified = "modelstore `load_tensors`, checksums not compared"
    contenders.append(
        Entrant(
            unverified,
            lambda: run_contender("load_modelstore_unverified", snapshot, "cpu"),
            (snapshot,) if cold else (),
        )
    )
    if cold:
        drop_page_cache(folder)
    else:
        fill_page_cache(folder)
    results = race(contenders, runs, report)
    ours = next(result for result in results if result.label.startswith("modelstore"))
    owned = [r for r in results[1:-1] if not r.missing and r is not ours and "mapped" not in r.label]
    best = min(owned, key=lambda result: result.median)
    checking = statistics.median(a / b for a, b in zip(ours.seconds, results[-1].seconds, strict=True))
    stored = sum(path.stat().st_size for path in snapshot.glob("*.safetensors"))
    return [
        f"**Loading alone, {stored / 1e9:.2f} GB, {where}**",
        "",
        *table(results, stored),
        "",
        f"Ours is {best.median / ours.median:.2f} times as fast as the best of the others that hold the weights "
        f"afterwards ({best.label}); with and without comparing checksums: {checking:.3f}, pair by pair.",
        "",
    ]


def draw(results: dict[str, list[Measured]], path: Path, *, floors: int = 2) -> None:
    """The starts as bars of spans over one time axis: ours above the others, the floors, which come first, as lines."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "modelstore", "svg.fonttype": "none"}
    from matplotlib import pyplot

    drawn = {span["name"] for measured in results.values() for result in measured for span in result.spans}
    names = ("import", "read", "transfer", "build", "warmup", "lookup")
    colours = {name: SPAN_KINDS[name].colour for name in names if name in drawn}
    figure, axes = pyplot.subplots(len(results), 1, figsize=(9, 2.6 * len(results)), squeeze=False)
    for (title, measured), axis in zip(results.items(), axes[:, 0], strict=True):
        shown = [result for result in measured[floors:] if "ready" in result.label or "plain" in result.label]
        for row, result in enumerate(shown):
            _draw_start(axis, len(shown) - 1 - row, result, colours)
        for floor, style in zip(measured[:floors], (":", "--"), strict=False):
            axis.axvline(floor.median, color="black", linestyle=style, linewidth=1, label=floor.label)
        labels = [result.label.replace("`", "").replace("a plain handler", "plain") for result in shown]
        axis.set_yticks(range(len(shown)), reversed(labels), fontsize=8)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlim(0, 1.08 * max(result.median for result in measured))
        axis.legend(fontsize=7, loc="upper right")  # where ours ends long before the others
    axes[-1, 0].set_xlabel("seconds since the process began (last of the runs)")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    figure.legend(handles, colours, ncols=len(colours), fontsize=8, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def _draw_start(axis: Any, row: int, result: Measured, colours: dict[str, str]) -> None:
    """Spans that overlap lie above each other in their bar: the read runs beside the rest."""
    for span in result.spans:
        if span["name"] in colours:
            below = {"read": 0.3, "transfer": 0.55}.get(span["name"], 0.0)
            beside = below and any(
                other is not span and other["start"] < span["end"] and span["start"] < other["end"]
                for other in result.spans
            )
            axis.barh(
                row + 0.1 - (below if beside else 0.0),
                span["end"] - span["start"],
                left=span["start"],
                height=0.25,
                color=colours[span["name"]],
            )
    axis.text(max(span["end"] for span in result.spans) + 0.05, row, f"{result.median:.1f} s", fontsize=8, va="center")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", default="1.7GB,4GB", help="sizes for whole starts; empty for none")
    parser.add_argument("--load", default="0.1GB,1GB,4GB", help="sizes for loading alone; empty for none")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where images and checkpoints are made"
    )
    parser.add_argument("--write", type=Path, help="the document whose section by this script is replaced")
    parser.add_argument("--section", default="bench/start.py", help="which one, if the document has several")
    options = parser.parse_args()
    start_sizes, load_sizes = (
        [parse_size("size", text) for text in sizes.split(",") if text] for sizes in (options.start, options.load)
    )
    given = " ".join(f"--{name} {shlex.quote(str(getattr(options, name)))}" for name in ("start", "load", "runs"))
    lines = [f"Measured by `python scripts/bench/start.py {given}`:", environment(options.folder) + ".", ""]
    drawn: dict[str, list[Measured]] = {}
    for size in start_sizes:
        more, results = starts(options.folder, size, options.runs)
        lines += more
        drawn |= results
    for size in load_sizes:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder) as folder:
            lines += loads(Path(folder), size, options.runs, cold=False, where="the page cache")
    if why_not():
        lines += [f"Loading from MooseFS: not measured ({why_not()}).", ""]
    else:
        with MooseFS.running(hosts=1) as moosefs:
            for size in load_sizes:
                lines += loads(moosefs.hosts[0].mount, size, options.runs, cold=True, where="MooseFS, cold")
    if drawn and options.write:
        draw(drawn, options.write.parent / CHART)
        lines += ["**On a GPU**", "", "Not measured: none was at hand.", ""]
        lines += [f"![Starts as spans, ours against a plain handler]({CHART})", ""]
    text = "\n".join(lines)
    print(text)
    if options.write:
        write_section(options.write, options.section, text)


if __name__ == "__main__":
    main()
