#!/usr/bin/env python3
"""The first run on an empty volume: one worker against a plain handler, and eight workers at once.

    python scripts/bench/first_run.py [--size 4GB] [--fleet 2GB] [--rate 50MB] [--runs 5] [--write DOCUMENT]

An fp32 checkpoint of --size in eight shards, from a hub on the same machine: as fast as it goes; and for eight workers
one of --fleet, at --rate a second over all connections, as a network would be. Every process is timed from its start:
ours to ready, theirs to the end of `save_pretrained`. Floors: the imports, of one process and of eight at once.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HERE))

from modelstore.bench.checkpoints import make_checkpoint
from modelstore.bench.race import Entrant, Sample, environment, race, run_contender, run_worker
from modelstore.settings import parse_size
from scripts.bench.sections import write_section
from tests.support.hub import hub_process

REPO, FLEET = "bench/fp32", "bench/fleet"
WORKERS = 8

THEIRS = """
import sys, torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM
endpoint, repo, target = sys.argv[1:]
path = snapshot_download(repo, endpoint=endpoint, cache_dir=target + "/cache")
AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16).save_pretrained(target + "/model")
"""


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def empty_volume(folder: Path) -> Iterator[Path]:
    volume = Path(tempfile.mkdtemp(dir=folder))
    try:
        yield volume
    finally:
        shutil.rmtree(volume)


def imports(checkpoint: Path, workers: int = 1) -> Sample:
    """The last one's seconds for all that a worker imports."""
    with ThreadPoolExecutor(workers) as pool:
        started = [pool.submit(run_contender, "start_floor", checkpoint, "cpu") for _worker in range(workers)]
        return max((worker.result() for worker in started), key=lambda sample: sample.seconds)


def theirs(folder: Path, endpoint: str) -> Sample:
    with empty_volume(folder) as volume:
        began = time.monotonic()
        command = ["env", f"HF_HOME={volume}/home", "HF_HUB_DISABLE_PROGRESS_BARS=1", sys.executable, "-c", THEIRS]
        subprocess.run([*command, endpoint, REPO, str(volume)], check=True, capture_output=True)
        return Sample(time.monotonic() - began)


def ours(folder: Path, endpoint: str, repo: str = REPO, workers: int = 1) -> Sample:
    """The last one's seconds to ready."""
    with empty_volume(folder) as volume, ThreadPoolExecutor(workers) as pool:
        prefix = ("env", f"HF_ENDPOINT={endpoint}")
        started = [pool.submit(run_worker, volume / "modelstore", repo, prefix) for _worker in range(workers)]
        return max((worker.result()[0] for worker in started), key=lambda sample: sample.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="4GB", help="of the fp32 checkpoint for one worker")
    parser.add_argument("--fleet", default="2GB", help="of the fp32 checkpoint for eight")
    parser.add_argument("--rate", default="50MB", help="of the hub's network for the eight workers, a second")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the volume lies")
    parser.add_argument("--write", type=Path, help="the document whose section by this script is replaced")
    options = parser.parse_args()
    size, fleet_size = parse_size("--size", options.size), parse_size("--fleet", options.fleet)
    with tempfile.TemporaryDirectory(prefix="bench-first-run-", dir=options.folder) as name:
        folder = Path(name)
        hub = folder / "hub"
        make_checkpoint(hub / REPO, size // 2, "float32", shard_bytes=size // 8)
        make_checkpoint(hub / FLEET, fleet_size // 2, "float32", shard_bytes=fleet_size // 8)
        with hub_process(hub) as endpoint:
            alone = race(
                [
                    Entrant("floor: the necessary imports", lambda: imports(hub / REPO)),
                    Entrant("snapshot_download, from_pretrained, save_pretrained", lambda: theirs(folder, endpoint)),
                    Entrant("`python -m handler` on an empty volume, ready", lambda: ours(folder, endpoint)),
                ],
                options.runs,
                report,
            )
        with hub_process(hub, bytes_per_s=parse_size("--rate", options.rate)) as endpoint:
            fleet = race(
                [
                    Entrant(f"floor: {WORKERS} times the imports at once", lambda: imports(hub / FLEET, WORKERS)),
                    Entrant("one worker, ready", lambda: ours(folder, endpoint, FLEET)),
                    Entrant(f"{WORKERS} workers, the last one ready", lambda: ours(folder, endpoint, FLEET, WORKERS)),
                ],
                options.runs,
                report,
                warm_up=False,
            )
        place = environment(folder)
    given = " ".join(f"--{name} {getattr(options, name)}" for name in ("size", "fleet", "rate", "runs"))
    lines = [f"Measured by `python scripts/bench/first_run.py {given}`:", f"{place}.", ""]
    tables = ((f"fp32 checkpoint of {options.size}", alone), (f"{options.fleet} at {options.rate}/s", fleet))
    for title, results in tables:
        lines += [f"**{title}**", "", "| | median s | min to max |", "|---|---|---|"]
        lines += [f"| {result.label} | {result.median:.2f} | {result.spread} |" for result in results]
        lines += [""]
    first, last = (
        statistics.median(a / b for a, b in zip(results[2].seconds, results[1].seconds, strict=True))
        for results in (alone, fleet)
    )
    lines += [f"First run, ours / theirs, pair by pair: {first:.2f}. "]
    lines[-1] += f"{WORKERS} workers on an empty volume, the last one / one alone: {last:.2f}."
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        write_section(options.write, "bench/first_run.py", text)


if __name__ == "__main__":
    main()
