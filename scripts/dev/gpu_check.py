#!/usr/bin/env python3
"""All that a machine with a GPU has to show, in one table, in under 8 minutes: correctness first, then speed.

    python scripts/dev/gpu_check.py [--only NAME ...] [--size 14GB] [--runs 2] [--folder /tmp]
                                    [--write docs/benchmarks/measurements.md]

It needs an NVIDIA GPU that holds the model twice over, torch with CUDA, and four times `--size` in `--folder`; other
loaders are measured if they are installed (`pip install '.[bench]' instanttensor`), a throttled volume if this is root
with cgroup v1. Each check runs by itself: one that fails has its reason in the table, and the exit code is 1. `--only`:
the names of checks, as `suite`, `equal`, `loads`, `starts`, `swaps` and `faults`; all of them by default.
Durations are medians, each of a process of its own; the page cache holds the files.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HERE))

from modelstore.bench import race
from modelstore.bench.checkpoints import make_checkpoint, seeded, snapshot_of
from modelstore.environment import without_secrets
from modelstore.errors import DigestMismatch, DoesNotFit, ProcessFailed
from modelstore.reference import parse_reference
from modelstore.settings import Settings, parse_size
from modelstore.timeline import Timeline, waterfall
from scripts.bench import throttled
from scripts.bench.sections import write_section
from scripts.bench.start import draw

SUITE = [
    "tests/load",
    "tests/test_warmstart.py",
    "tests/test_prefetch.py",
    "tests/handler/test_swap.py",
    "tests/handler/test_multi.py",
    "tests/handler/test_batcher.py",
    "tests/handler/test_warm_up.py",
    "tests/handler/test_main.py",
]
DEVICE = "cuda:0"
CHART = HERE / "docs" / "benchmarks" / "gpu.svg"
CHECKS = ("suite", "equal", "loads", "starts", "swaps", "faults")
SWAPPED_BYTES = 2_000_000_000
SWAPS = 10
JOB = {"input": {"prompt": "a", "max_tokens": 1, "temperature": 0}}


class Check:
    """The lines of the table, and whether all was well."""

    def __init__(self) -> None:
        self.lines = ["| check | seen |", "|---|---|"]
        self.failed = False
        self.began = time.monotonic()

    def run(self, label: str, work: Callable[[], str]) -> None:
        """Add the result of `work`, or the reason why there is none."""
        began = time.monotonic()
        try:
            seen = work()
        except Exception as error:  # the others go on
            self.failed = True
            seen = f"**failed**: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
        seen = seen.replace("|", "\\|")
        self.lines.append(f"| {label} | {seen} |")
        print(f"{time.monotonic() - self.began:5.0f} s  {label} ({time.monotonic() - began:.0f} s): {seen}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS, metavar="NAME", help="the checks to run")
    parser.add_argument("--size", default="14GB", help="of the model in 16 bits")
    parser.add_argument("--runs", type=int, default=2, help="of each loader")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--write", type=Path, help="the document whose section by this script is replaced")
    options = parser.parse_args()
    if options.write is not None and tuple(options.only) != CHECKS:
        parser.error("--write replaces the whole section: leave --only out")
    if why := why_not():
        sys.exit(f"error: {why}")
    check = Check()
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=options.folder) as name:
        folder = Path(name)
        _make_libraries_findable(folder)
        size_bytes = parse_size("--size", options.size)
        if "suite" in options.only:
            check.run("the suite's tests of this path", run_suite)
        checkpoint = make_checkpoint(folder / "float16", size_bytes, "float16")
        snapshot = seeded(folder / "modelstore", checkpoint)
        race.fill_page_cache(folder)
        tables = []
        if "loads" in options.only:
            tables += ["", *loads(check, snapshot, checkpoint, options.runs)]
        if "starts" in options.only:
            tables += ["", *starts(check, folder, checkpoint, size_bytes, options.runs)]
        if "equal" in options.only:
            check.run("tensors, bit for bit safetensors'", lambda: same_tensors(folder, checkpoint))
            check.run("logits, bit for bit `from_pretrained`'s", lambda: same_logits(folder))
        if "swaps" in options.only:
            swaps(check, folder)
        if "faults" in options.only:
            check.run("a flipped bit in a start", lambda: healed(folder))
            check.run("a model that does not fit", lambda: refused(folder, snapshot))
    given = f"--size {options.size} --runs {options.runs}"
    if options.only != CHECKS:
        given = f"--only {' '.join(options.only)} {given}"
    text = [
        f"Measured by `python scripts/dev/gpu_check.py {given}`:",
        f"{gpu()}; {race.environment(options.folder)}.",
        "",
    ]
    lines = "\n".join([*text, *check.lines, *tables])
    print(lines)
    if options.write is not None:
        write_section(options.write, "dev/gpu_check.py", lines)
    sys.exit(check.failed)


def why_not() -> str:
    """Why nothing can be measured here; empty if it can."""
    if not find_spec("torch"):
        return "torch is not installed: pip install '.[worker]'"
    import torch

    return "" if torch.cuda.is_available() else "torch sees no GPU here: run this on a machine with one"


def gpu() -> str:
    """The GPU, its driver, and torch's CUDA."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        device = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        device = "a GPU"
    import torch

    return f"{device}, CUDA {torch.version.cuda}"


def _make_libraries_findable(folder: Path) -> None:
    """fastsafetensors opens `libcudart.so`, and torch's packages have it with a version in its name alone."""
    roots = [Path(path) for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    for library in (path for root in roots for path in root.glob("nvidia/*/lib/libcudart.so.*")):
        links = folder / "lib"
        links.mkdir(exist_ok=True)
        (links / "libcudart.so").symlink_to(library)
        os.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, (str(links), os.environ.get("LD_LIBRARY_PATH"))))
        return


def run_suite() -> str:
    """The closing line of pytest, and the names of the tests that failed."""
    if not find_spec("pytest"):
        return "not run: pytest is not installed"
    workers = ["-n", "8"] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-rf", *workers, *SUITE]
    done = subprocess.run(command, cwd=HERE, env=without_secrets(), capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()]
    names = [line.split(" - ")[0].removeprefix("FAILED ") for line in lines if line.startswith("FAILED ")]
    if done.returncode:
        raise ProcessFailed(f"{lines[-1]}: {', '.join(names)}")
    return lines[-1]


def same_tensors(folder: Path, checkpoint: Path) -> str:
    """Compare each tensor on the GPU; the stored dtype is the checkpoint's."""
    import torch
    from safetensors.torch import load_file

    from modelstore import load_tensors

    ours = load_tensors(_snapshot(folder), DEVICE)
    count = 0
    for path in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(path, DEVICE).items():
            if not torch.equal(ours[name], tensor):
                raise ProcessFailed(f"{name} differs")
            count += 1
    if count != len(ours):
        raise ProcessFailed(f"{len(ours)} tensors instead of {count}")
    return f"{count} tensors equal"


def same_logits(folder: Path) -> str:
    """Compare the logits of a small model of the same kind, so that both are on the GPU at once."""
    import torch
    from transformers import AutoModelForCausalLM

    from modelstore import load_model

    checkpoint = _small(folder)
    ours = load_model(_snapshot(folder, "small-store"), DEVICE)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16, device_map=DEVICE)
    tokens = torch.arange(64, device=DEVICE)[None]
    with torch.inference_mode():
        if not torch.equal(ours(tokens).logits, theirs(tokens).logits):
            raise ProcessFailed("they differ")
    return "equal"


def loads(check: Check, snapshot: Path, checkpoint: Path, runs: int) -> list[str]:
    """Loading alone, every competitor in turn; the table, and the ratios in `check`."""
    entrants = race.load_contenders(snapshot, checkpoint, device=DEVICE, cold=False)
    entrants = [entrant for entrant in entrants if "VolumeCache" not in entrant.label]
    for name, label in (
        ("load_modelstore_unverified", "modelstore `load_tensors`, checksums not compared"),
        ("load_modelstore_by_torch", "modelstore `load_tensors`, copied by torch"),
    ):
        entrants.append(race.Entrant(label, lambda name=name: race.run_contender(name, snapshot, DEVICE)))  # type: ignore[misc]
    stored = sum(path.stat().st_size for path in snapshot.glob("*.safetensors"))
    results: list[race.Measured] = []

    def ratios() -> str:
        results.extend(race.race(entrants, runs, _show, warm_up=False))
        ours = next(each for each in results if each.label == "modelstore `load_tensors`")
        pinned = next(each for each in results if "pinned" in each.label)
        if ours.missing:
            raise ProcessFailed(ours.missing)
        others = [each for each in results[2:] if not each.missing and not each.label.startswith("modelstore")]
        best = min(others, key=lambda each: each.median)
        return (
            f"{stored / ours.median / 1e9:.1f} GB/s, {pinned.median / ours.median:.2f} of the pinned rate, "
            f"{best.median / ours.median:.2f} times as fast as the best other loader ({best.label}); "
            f"host memory {ours.peak_bytes / 1e9:.1f} GB"
        )

    check.run("loading, checksums on, page cache", ratios)
    return race.table(results, stored, floors=2) if results else []


def starts(check: Check, folder: Path, checkpoint: Path, size_bytes: int, runs: int) -> list[str]:
    """Whole starts, to the last byte on the GPU, to ready and to the first answer, against a plain handler; the table,
    the waterfall, and the chart beside the document."""
    root, model = folder / "modelstore", f"file://{checkpoint}"
    lines: list[str] = []

    def warm() -> str:
        entrants = race.start_contenders(root, {"float16": checkpoint}, device=DEVICE)
        entrants = [replace(entrant, cold=()) for entrant in entrants]
        race.run_worker(root, model)  # so that the page cache holds the libraries
        results = race.race(entrants, runs, _show, warm_up=False)
        _read, imports, ready, answered, plain = results
        if ready.missing or plain.missing:
            raise ProcessFailed(ready.missing or plain.missing)
        stored = sum(path.stat().st_size for path in snapshot_of(root).glob("*.safetensors"))
        lines.extend([*race.table(results, stored, floors=2), "", "```", waterfall(ready.spans, width=100), "```"])
        if find_spec("matplotlib"):
            draw({f"{gpu()}, {stored / 1e9:.1f} GB in the page cache": results}, CHART)
        _ready, cold = race.run_worker(root, model, ("env", "MODELSTORE_WARM_UP=0"))
        return (
            f"last byte on the GPU {_end(ready, 'transfer'):.1f} s, torch imported "
            f"{_end(ready, 'import', 'torch'):.1f} s, ready {ready.median:.1f} s "
            f"({ready.median / imports.median:.2f} of the imports'), answered and ended {answered.median:.1f} s "
            f"({answered.median / plain.median:.2f} of a plain handler's first forward), "
            f"{cold.seconds:.1f} s without the warm-up"
        )

    check.run("a start, page cache warm", warm)
    if throttled.why_not():

        def cold() -> str:
            race.drop_page_cache(snapshot_of(root))
            floor = race.run_contender("load_floor", snapshot_of(root), DEVICE).seconds
            race.drop_page_cache(snapshot_of(root))
            ready, _answered = race.run_worker(root, model)
            return f"ready {ready.seconds:.1f} s, {ready.seconds / floor:.2f} of reading once ({floor:.1f} s)"

        check.run("a start, the weights not in the page cache, from the local disk", cold)
        return lines

    def slow() -> str:
        with throttled.throttled(2 * size_bytes + (4 << 30), (1000 << 20,), folder) as volume:
            slow_root = volume.mount / "modelstore"
            shutil.copytree(root, slow_root)
            race.drop_page_cache(slow_root)
            floor = race.run_contender("load_floor", snapshot_of(slow_root), DEVICE, volume.prefix(1000 << 20)).seconds
            race.drop_page_cache(slow_root)
            ready, _answered = race.run_worker(slow_root, model, volume.prefix(1000 << 20))
            return f"ready {ready.seconds:.1f} s, {ready.seconds / floor:.2f} of reading once ({floor:.1f} s)"

    check.run("a start on a volume of 1 GB/s", slow)
    return lines


def _end(result: race.Measured, name: str, detail: str | None = None) -> float:
    """The end of a kind of span in the last run, in seconds since the process began."""
    ends = [each["end"] for each in result.spans if each["name"] == name and detail in (None, each.get("detail"))]
    return max(ends, default=float("nan"))


def swaps(check: Check, folder: Path) -> None:
    """Ten swaps of models that fit together: the time, and the memory of the GPU and of the host after each."""
    import torch

    from handler.engines.text import TextEngine
    from modelstore.warmstart import begin

    names = []
    for number in range(2):
        checkpoint = make_checkpoint(folder / f"swapped-{number}", SWAPPED_BYTES, "float16")
        seeded(folder / "swap-store", checkpoint)
        names.append(f"file://{checkpoint}")

    def work() -> str:
        settings = Settings(root=folder / "swap-store", model=parse_reference(names[0]), worker_id="gpu-check")
        free_before = torch.cuda.mem_get_info()[0]
        engine = begin(settings, timeline=Timeline()).load(TextEngine.load)
        seconds, used, pauses = [], [], 0
        for number in range(SWAPS):
            began = time.monotonic()
            timeline = engine.swap(names[1 - number % 2])
            seconds.append(time.monotonic() - began)
            used.append(free_before - torch.cuda.mem_get_info()[0])
            pauses += sum(span.name == "pause" for span in timeline.spans)
            del timeline
        engine.close()
        del engine
        gc.collect()
        torch.cuda.empty_cache()
        match = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
        return (
            f"{min(seconds):.2f} to {max(seconds):.2f} s, {pauses} with a pause; on the GPU "
            f"{min(used) / 1e9:.2f} to {max(used) / 1e9:.2f} GB after each, "
            f"{(free_before - torch.cuda.mem_get_info()[0]) / 1e9:.2f} GB after close; "
            f"host memory of its own then {int(match[1]) * 1024 / 1e9 if match else 0:.2f} GB"
        )

    check.run(f"{SWAPS} swaps of {SWAPPED_BYTES / 1e9:g} GB", work)


def healed(folder: Path) -> str:
    """Flip a bit of a small snapshot: the load refuses it, and a worker's start makes it again."""
    from modelstore import load_tensors

    _small(folder)
    root = folder / "small-store"
    path = next(snapshot_of(root).glob("*.safetensors"))
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    try:
        load_tensors(_snapshot(folder, "small-store"), DEVICE)
        raise ProcessFailed("the load took it")
    except DigestMismatch:
        pass
    ready, _answered = race.run_worker(root, f"file://{folder}/small")
    return f"DigestMismatch; the worker's start healed it in {ready.seconds:.1f} s"


def refused(folder: Path, snapshot: Path) -> str:
    """Take most of the GPU's memory, and start the large model."""
    import torch

    from modelstore.warmstart import begin

    gc.collect()
    torch.cuda.empty_cache()
    free, _total = torch.cuda.mem_get_info()
    taken = torch.empty(free - (2 << 30), dtype=torch.uint8, device=DEVICE)
    record = json.loads((snapshot / "manifest.json").read_text())
    settings = Settings(root=folder / "modelstore", model=parse_reference(f"file://{folder}/float16"))
    try:
        pending = begin(replace(settings, worker_id="gpu-check"), timeline=Timeline())
        pending.reading.close()
        raise ProcessFailed(f"the start of {record.get('repo_id')} took it")
    except DoesNotFit as error:
        return f"DoesNotFit: {error}"
    finally:
        del taken
        torch.cuda.empty_cache()


def _show(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _small(folder: Path) -> Path:
    """A smaller checkpoint, and a store with it, made when it is first asked for."""
    if not (folder / "small-store" / "models").is_dir():
        shutil.rmtree(folder / "small", ignore_errors=True)
        seeded(folder / "small-store", make_checkpoint(folder / "small", 700_000_000, "float16"))
    return folder / "small"


def _snapshot(folder: Path, root: str = "modelstore") -> Any:
    from modelstore.volume.manifest import parse_manifest
    from modelstore.volume.snapshots import Snapshot

    path = snapshot_of(folder / root)
    return Snapshot(path, parse_manifest((path / "manifest.json").read_bytes(), where=str(path)))


if __name__ == "__main__":
    main()
