#!/usr/bin/env python3
"""The cost of comparing block checksums while reading.

    python scripts/bench/verify.py [--size 1GB] [--runs 9] [--write docs/reliability.md]

A snapshot with random weights is loaded (`load_tensors` on the CPU, whole: opened, read, compared, made tensors) with
and without comparing, in turn, in one process: from the page cache, from a local disk and, as root with FUSE and
MooseFS's Debian packages, from a MooseFS mount, the last two with the file evicted from the page cache before each.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HERE))

from modelstore import ModelStore, load_tensors
from modelstore.load.reader import start_reading
from modelstore.settings import Settings, parse_size
from modelstore.volume.header import TensorInfo, encode_header
from modelstore.volume.snapshots import Snapshot
from scripts.bench.sections import write_section
from tests.support.moosefs import MooseFS, why_not


@dataclass(frozen=True)
class ActiveSequence:
    where: str
    with_s: float
    without_s: float
    ratio: float
    spread: tuple[float, float]


def write_checkpoint(folder: Path, size_bytes: int) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float16"}')
    count = max(1, size_bytes >> 25)
    infos = tuple(TensorInfo(f"{n:04d}", "F16", (1 << 24,), n << 25, (n + 1) << 25) for n in range(count))
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(encode_header(infos, {"format": "pt"}))
        for _n in range(count):
            file.write(rng.bytes(1 << 25))


def load_s(snapshot: Snapshot, *, verify: bool, cold: bool) -> float:
    if cold:
        fd = os.open(snapshot.path / "model.safetensors", os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    began = time.monotonic()
    reading = start_reading(snapshot, verify=verify)
    load_tensors(snapshot, "cpu", reading=reading)
    took_s = time.monotonic() - began
    reading.close()
    return took_s


def measure(where: str, snapshot: Snapshot, runs: int, *, cold: bool) -> ActiveSequence:
    pairs = []
    for run in range(runs + 1):
        order = (True, False) if run % 2 else (False, True)
        took = {verify: load_s(snapshot, verify=verify, cold=cold) for verify in order}
        if run:  # the first only warms up
            pairs.append((took[True], took[False]))
            print(f"{where}, run {run}: {took[True]:.3f} s with, {took[False]:.3f} s without", file=sys.stderr)
    ratios = sorted(with_s / without_s for with_s, without_s in pairs)
    return ActiveSequence(
        where,
        statistics.median(pair[0] for pair in pairs),
        statistics.median(pair[1] for pair in pairs),
        statistics.median(ratios),
        (ratios[0], ratios[-1]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1GB")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    size = parse_size("--size", options.size)
    rows = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_checkpoint(folder / "model", size)

        def seeded(root: Path) -> Snapshot:
            return ModelStore(root, settings=Settings(root=root)).ensure(f"file://{folder}/model")

        local = seeded(folder / "store")
        rows.append(measure("page cache", local, options.runs, cold=False))
        rows.append(measure("local disk, cold", local, options.runs, cold=True))
        if why_not():
            print(f"no MooseFS: {why_not()}", file=sys.stderr)
        else:
            moosefs = stack.enter_context(MooseFS.running(hosts=1))
            rows.append(measure("MooseFS, cold", seeded(moosefs.hosts[0].mount / "store"), options.runs, cold=True))
    lines = [
        f"Measured by `python scripts/bench/verify.py --size {options.size} --runs {options.runs}`:",
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, Linux {platform.release()}, "
        f"Python {platform.python_version()}.",
        "",
        "| read from | with checking, median s | without | GB/s | with / without, pair by pair | min to max |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate, spread = f"{size / row.with_s / 1e9:.2f}", f"{row.spread[0]:.2f} to {row.spread[1]:.2f}"
        cells = (row.where, f"{row.with_s:.3f}", f"{row.without_s:.3f}", rate, f"{row.ratio:.3f}", spread)
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        write_section(options.write, "bench/verify.py", text)


if __name__ == "__main__":
    main()
