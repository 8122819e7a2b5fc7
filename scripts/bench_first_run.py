#!/usr/bin/env python3
"""The first run on an empty volume: one worker against what the seed documents do, and eight workers at once.

    python scripts/bench_first_run.py [--size 1GB] [--runs 5] [--rate 100MB] [--write docs/benchmarks.md]

An fp32 checkpoint of --size in eight shards, from a hub on the same machine: as fast as it goes, and for eight workers
at --rate a second over all connections, as a network would be. Every process is timed from its start: ours to ready,
theirs to the end of `save_pretrained`.
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

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))

from modelstore.bench import Contender, Sample, environment, make_checkpoint, race, run_worker  # noqa: E402
from modelstore.settings import parse_size  # noqa: E402
from scripts.sections import write_section  # noqa: E402
from tests.hub import hub_process  # noqa: E402

REPO = "bench/fp32"
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


def theirs(folder: Path, endpoint: str) -> Sample:
    with empty_volume(folder) as volume:
        began = time.monotonic()
        command = ["env", f"HF_HOME={volume}/home", "HF_HUB_DISABLE_PROGRESS_BARS=1", sys.executable, "-c", THEIRS]
        subprocess.run([*command, endpoint, REPO, str(volume)], check=True, capture_output=True)
        return Sample(time.monotonic() - began)


def ours(folder: Path, endpoint: str, workers: int = 1) -> Sample:
    """The last one's seconds to ready."""
    with empty_volume(folder) as volume, ThreadPoolExecutor(workers) as pool:
        prefix = ("env", f"HF_ENDPOINT={endpoint}")
        started = [pool.submit(run_worker, volume / "modelstore", REPO, prefix) for _worker in range(workers)]
        return max((worker.result()[0] for worker in started), key=lambda sample: sample.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1GB", help="of the fp32 checkpoint")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rate", default="100MB", help="of the hub's network for the eight workers, a second")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the volume lies")
    parser.add_argument("--write", type=Path, help="the document whose section by this script is replaced")
    options = parser.parse_args()
    size, rate = parse_size("--size", options.size), parse_size("--rate", options.rate)
    with tempfile.TemporaryDirectory(prefix="bench-first-run-", dir=options.folder) as name:
        folder = Path(name)
        make_checkpoint(folder / "hub" / REPO, size // 2, "float32", shard_bytes=size // WORKERS)
        with hub_process(folder / "hub") as endpoint:
            alone = race(
                [
                    Contender("snapshot_download, from_pretrained, save_pretrained", lambda: theirs(folder, endpoint)),
                    Contender("`python -m handler` on an empty volume, ready", lambda: ours(folder, endpoint)),
                ],
                options.runs,
                report,
            )
        with hub_process(folder / "hub", bytes_per_s=rate) as endpoint:
            fleet = race(
                [
                    Contender("one worker", lambda: ours(folder, endpoint)),
                    Contender(f"{WORKERS} workers, the last one", lambda: ours(folder, endpoint, WORKERS)),
                ],
                options.runs,
                report,
                warm_up=False,
            )
        place = environment(folder)
    given = " ".join(f"--{name} {getattr(options, name)}" for name in ("size", "runs", "rate"))
    lines = [f"Measured by `python scripts/bench_first_run.py {given}`:", f"{place}.", ""]
    lines += ["| | median s | min to max |", "|---|---|---|"]
    lines += [f"| {result.label} | {result.median:.2f} | {result.spread} |" for result in (*alone, *fleet)]
    first, last = (
        statistics.median(a / b for a, b in zip(x.seconds, y.seconds, strict=True))
        for x, y in ((alone[1], alone[0]), (fleet[1], fleet[0]))
    )
    lines += ["", f"First run, ours / theirs, pair by pair: {first:.2f}. "]
    lines[-1] += f"Eight workers at {options.rate}/s, the last one / one alone: {last:.2f}."
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        write_section(options.write, "bench_first_run.py", text)


if __name__ == "__main__":
    main()
