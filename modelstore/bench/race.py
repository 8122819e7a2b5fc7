"""Loading and starting, measured on the volume that a user has: ours, the others', and the physical floor.

Every entrant runs in a process of its own, in turn, with the page cache emptied of its files before each run if
the cold case is meant. Checkpoints are made on the spot: a Llama with random weights and a small tokenizer.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modelstore.bench.checkpoints import make_checkpoint, seeded, snapshot_of
from modelstore.bench.loaders import LOAD
from modelstore.environment import without_secrets
from modelstore.errors import ModelStoreError, NoSpace, ProcessFailed
from modelstore.mount import check_place
from modelstore.units import size
from modelstore.volume import durable

NEEDS = {
    "runai": "runai_model_streamer",
    "fastsafetensors": "fastsafetensors",
    "instanttensor": "instanttensor",
    "volume_cache": "runpod",
}
_CUDA_ONLY = ("instanttensor", "safetensors_prefetch")
_CPU_ONLY = ("safetensors_copied",)  # on a GPU every loader's tensors are held
_PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "runpod",
    "runai-model-streamer",
    "fastsafetensors",
    "instanttensor",
    "numpy",
)
_TIMES = 7  # the space of the benchmark, by the size of the model


@dataclass(slots=True)
class Measured:
    """One contender's runs; seconds, and the most host memory in bytes that one took."""

    label: str
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    spans: list[dict[str, Any]] = field(default_factory=list)
    missing: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_json(self) -> dict[str, Any]:
        """The record that `bench --json` prints."""
        record: dict[str, Any] = {"label": self.label, "missing": self.missing}
        if not self.missing:
            record |= {"median_s": self.median, "min_s": min(self.seconds), "max_s": max(self.seconds)}
            record |= {"peak_bytes": self.peak_bytes, "seconds": self.seconds}
        return record

    @property
    def spread(self) -> str:
        return f"{min(self.seconds):.2f} to {max(self.seconds):.2f}"


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of a contender."""

    seconds: float
    peak_bytes: int = 0
    spans: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class Entrant:
    """A name for tables, how to run it once, and the folders to drop from the page cache before (none: leave them)."""

    label: str
    run: Callable[[], Sample]
    cold: tuple[Path, ...] = ()
    missing: str = ""


def race(
    contenders: Iterable[Entrant], runs: int, report: Callable[[str], None], *, warm_up: bool = True
) -> list[Measured]:
    """Run them in turn, `runs` times each, with `warm_up` after one round that does not count.

    One that fails is left out from then on, with the reason. Raises ModelStoreError if a floor fails.
    """
    running = list(contenders)
    results = [Measured(contender.label, missing=contender.missing) for contender in running]
    for number in range(0 if warm_up else 1, runs + 1):
        for contender, result in zip(running, results, strict=True):
            if result.missing:
                continue
            for folder in contender.cold:
                drop_page_cache(folder)
            try:
                sample = contender.run()
            except ModelStoreError as error:
                if contender.label.startswith("floor"):
                    raise
                result.missing = str(error)
                report(result.missing)
                continue
            if number:
                result.seconds.append(sample.seconds)
                result.peak_bytes = max(result.peak_bytes, sample.peak_bytes)
                result.spans = list(sample.spans)
                report(f"run {number} of {runs}: {contender.label}: {sample.seconds:.2f} s")
    return results


def load_contenders(
    snapshot: Path, checkpoint: Path, *, device: str, cold: bool, prefix: Sequence[str] = ()
) -> list[Entrant]:
    """The floor first, then ours, then the others. `prefix`: a command that runs another, such as a throttle."""

    def contender(name: str, label: str, folder: Path) -> Entrant:
        needs = NEEDS.get(name, "torch")
        missing = "" if find_spec(needs) else f"{needs} is not installed"
        if name in _CUDA_ONLY and device == "cpu":
            missing = "for CUDA alone"
        elif name == "safetensors_prefetch" and not missing and not _can_prefetch():
            missing = f"safetensors {version('safetensors')} has none"
        touched = (folder, folder.parent / ".cache") if name == "volume_cache" else (folder,)
        run = f"load_{name}"
        return Entrant(label, lambda: run_contender(run, folder, device, prefix), touched if cold else (), missing)

    floor = "floor" if cold else "floor_cached"
    entrants = [contender(floor, "floor: the bytes read once", snapshot)]
    if device != "cpu":
        entrants.append(contender("floor_to_device", "floor: pinned memory to the GPU", snapshot))
    for name, label in LOAD.items():
        if device == "cpu" or name not in _CPU_ONLY:
            entrants.append(contender(name, label, snapshot if name == "modelstore" else checkpoint))
    return entrants


def _can_prefetch() -> bool:
    from safetensors import safe_open

    return hasattr(safe_open, "prefetch")


def run_contender(name: str, folder: Path, device: str, prefix: Sequence[str] = ()) -> Sample:
    """One run in a process of its own. Raises ModelStoreError with its last line if it fails."""
    device = "cuda:0" if device == "cuda" else device  # some loaders want the number
    command = [*prefix, sys.executable, "-m", "modelstore.bench.loaders", name, device, str(folder)]
    process = subprocess.run(command, env=without_secrets(), capture_output=True, text=True, check=False)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"it exited with {process.returncode}"]
        raise ProcessFailed(f"{name} failed: {lines[-1][-400:]}")
    record = json.loads(process.stdout.strip().splitlines()[-1])
    return Sample(record["seconds"], record["peak_bytes"], record.get("spans", ()))


def run_worker(root: Path, model: str, prefix: Sequence[str] = ()) -> tuple[Sample, Sample]:
    """`python -m handler` with one job: to ready as its own timeline says, and to the end of the process, answered."""
    job = json.dumps({"input": {"prompt": "a", "max_tokens": 1, "temperature": 0}})
    settings = ["env", f"MODEL_ID={model}", f"MODELSTORE_ROOT={root}"]
    began = time.monotonic()
    process = subprocess.run(
        [*prefix, *settings, sys.executable, "-m", "handler", "--test_input", job],
        env=without_secrets(),
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - began
    line = next((line for line in process.stderr.splitlines() if line.startswith('{"timeline"')), None)
    if process.returncode or line is None:
        raise ProcessFailed(f"the worker failed: {process.stderr.strip()[-400:]}")
    spans = json.loads(line)["timeline"]["spans"]
    ready = next(span["start"] for span in spans if span["name"] == "ready")
    return Sample(ready, spans=spans), Sample(seconds, spans=spans)


def drop_page_cache(folder: Path) -> None:
    """Let the page cache forget every file below a folder."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            durable.sync_path(path)
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def fill_page_cache(folder: Path) -> None:
    """Let the page cache hold every file below a folder."""
    buffer = bytearray(8 << 20)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def environment(folder: Path) -> str:
    """The machine and the volume of the measurement, in one line."""
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    kind = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=False).stdout
    packages = []
    for name in _PACKAGES:
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({cpu[1].strip() if cpu else platform.machine()}), "
        f"Linux {platform.release()}, {kind.strip()}, Python {platform.python_version()}, {', '.join(packages)}"
    )


def table(results: Sequence[Measured], size_bytes: int, floors: int = 1) -> list[str]:
    """A table in Markdown: medians, spread, rate, and ratios to the larger of the first `floors` rows."""
    floor = max(result.median for result in results[:floors])
    lines = ["| | median s | min to max | GB/s | of the floor | peak memory GB |", "|---|---|---|---|---|---|"]
    for result in results:
        if result.missing:
            lines.append(f"| {result.label} | not measured: {result.missing} | | | | |")
            continue
        peak = f"{result.peak_bytes / 1e9:.2f}" if result.peak_bytes else ""
        lines.append(
            f"| {result.label} | {result.median:.2f} | {result.spread} | {size_bytes / result.median / 1e9:.2f} "
            f"| {result.median / floor:.2f} | {peak} |"
        )
    return lines


def bench_volume(
    place: Path, *, size_bytes: int, runs: int, device: str, report: Callable[[str], None]
) -> dict[str, list[Measured]]:
    """The usual questions about a volume: loading, cold and from the page cache, and a worker's start.

    Everything is made in a new folder in `place`, and removed with it. Raises RootUnusable or NoSpace if that cannot
    be, and InvalidSetting for a size that is too small.
    """
    folder = place / f".modelstore-bench-{secrets.token_hex(4)}"
    check_place(folder)
    if place.is_dir() and (free := shutil.disk_usage(place).free) < _TIMES * size_bytes:
        raise NoSpace(
            f"{place} has {size(free)} free, and a model of {size(size_bytes)} takes {_TIMES} times that: "
            "use a smaller --size",
            free_bytes=free,
        )
    durable.make_folder(folder)
    try:
        with durable.mapped_errors(folder):
            report(f"making checkpoints of {size_bytes / 1e9:g} GB in {folder}")
            checkpoints = {
                dtype: make_checkpoint(folder / dtype, size_bytes, dtype) for dtype in ("float16", "float32")
            }
        checkpoint = checkpoints["float16"]
        snapshot = seeded(folder / "modelstore", checkpoint)
        if find_spec("runpod"):
            run_contender("prepare_volume_cache", checkpoint, "cpu")
        results = {"loading, cold": race(load_contenders(snapshot, checkpoint, device=device, cold=True), runs, report)}
        fill_page_cache(folder)
        results["loading, from the page cache"] = race(
            load_contenders(snapshot, checkpoint, device=device, cold=False), runs, report
        )
        if find_spec("runpod"):
            results["start, cold"] = race(
                start_contenders(folder / "modelstore", checkpoints, device=device), runs, report
            )
        return results
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def start_contenders(
    root: Path, checkpoints: dict[str, Path], *, device: str, prefix: Sequence[str] = ()
) -> list[Entrant]:
    """Both floors, our worker to ready and to its first answer, and a plain handler on each checkpoint.

    The first checkpoint is the one that was seeded."""
    seeded_from = next(iter(checkpoints.values()))
    model = f"file://{seeded_from}"
    answers: list[Sample] = []

    def ready() -> Sample:
        answers.clear()
        sample, answer = run_worker(root, model, prefix)
        answers.append(answer)
        return sample

    def answered() -> Sample:
        if not answers:
            raise ProcessFailed("the worker was not ready")
        return answers[0]

    return [
        Entrant(
            "floor: the stored bytes read once",
            lambda: run_contender("load_floor", snapshot_of(root), device, prefix),
            (root,),
        ),
        Entrant("floor: the necessary imports", lambda: run_contender("start_floor", seeded_from, device, prefix)),
        Entrant("`python -m handler`, ready", ready, (root,)),
        Entrant("`python -m handler`, first job answered and process ended", answered),
        *(
            Entrant(
                f"a plain handler, first forward, {dtype} checkpoint",
                lambda folder=folder: run_contender("start_plain", folder, device, prefix),  # type: ignore[misc]
                (folder,),
            )
            for dtype, folder in checkpoints.items()
        ),
    ]
