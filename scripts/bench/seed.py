#!/usr/bin/env python3
"""Seeding against its competitors, each in a process of its own, in turn, from the same local hub.

    python scripts/bench/seed.py [--size 1GB] [--runs 5] [--peak 20GB] [--folder DIR] [--write DOCUMENT]

Two checkpoints of one Llama with random weights, in shards: fp32 of --size, and fp16 of half of that.
Competitors: huggingface_hub.snapshot_download alone, and followed by the conversion of a plain handler:
from_pretrained in fp16, then save_pretrained. Floor: the same bytes over one plain socket into a file. Whole processes
are timed, imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HERE))

from modelstore.settings import parse_size
from modelstore.volume.header import TensorInfo, encode_header
from scripts.bench.sections import write_section

FLOOR = """
import http.client, json, sys, urllib.parse, urllib.request
endpoint, repo, target = sys.argv[1:]
tree = json.load(urllib.request.urlopen(f"{endpoint}/api/models/{repo}/tree/main?recursive=true"))
for entry in tree:
    with urllib.request.urlopen(f"{endpoint}/{repo}/resolve/main/{entry['path']}") as response:
        with open(f"{target}/{entry['path']}", "wb") as file:
            buffer = memoryview(bytearray(1 << 20))
            while size := response.readinto(buffer):
                file.write(buffer[:size])
"""

DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
endpoint, repo, target = sys.argv[1:]
print(snapshot_download(repo, endpoint=endpoint, cache_dir=target))
"""

DOWNLOAD_AND_SAVE = """
import sys, torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM
endpoint, repo, target = sys.argv[1:]
path = snapshot_download(repo, endpoint=endpoint, cache_dir=target + "/cache")
AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16).save_pretrained(target + "/model")
"""

OURS = """
import sys
from pathlib import Path
from modelstore import ModelStore, Settings
endpoint, repo, target = sys.argv[1:]
root = Path(target) / "modelstore"
print(ModelStore(root, settings=Settings(root=root, hf_endpoint=endpoint)).ensure(repo).status)
"""

HIT = """
import statistics, sys, time
from pathlib import Path
from modelstore import ModelStore, Settings
root, repo = sys.argv[1:]
store = ModelStore(root, settings=Settings(root=Path(root), hf_endpoint="http://127.0.0.1:9"))
times = []
for _ in range(200):
    began = time.perf_counter()
    assert store.ensure(repo).status == "present"
    times.append(time.perf_counter() - began)
print(statistics.median(times))
"""

COMPETITORS = {
    "floor: one socket into a file": FLOOR,
    "snapshot_download": DOWNLOAD,
    "snapshot_download, from_pretrained, save_pretrained": DOWNLOAD_AND_SAVE,
    "modelstore seed": OURS,
}


def make_checkpoints(folder: Path, size_bytes: int) -> dict[str, str]:
    """The two repos under `folder`; returns their names by what they are."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers = 2048, max(1, round((size_bytes / 4 - 2 * 32000 * 2048) / 52e6))
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    shard = f"{max(1, size_bytes // 4 // 10**6)}MB"
    model.save_pretrained(folder / "bench" / "fp32", max_shard_size=shard)
    model.to(torch.float16).save_pretrained(folder / "bench" / "fp16", max_shard_size=shard)
    return {"fp32 checkpoint": "bench/fp32", "16-bit checkpoint": "bench/fp16"}


def make_large(folder: Path, size_bytes: int) -> str:
    """An fp32 checkpoint of this size in shards of 4 GB, one random block over and over; returns its name."""
    repo = folder / "bench" / "large"
    repo.mkdir(parents=True)
    (repo / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    block = (np.random.default_rng(0).standard_normal(1 << 24) * 0.02).astype("<f4").tobytes()
    shards = max(1, round(size_bytes / 4e9))
    blocks = max(1, round(size_bytes / shards / len(block)))
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        tensors = tuple(
            TensorInfo(f"{number}.{i}", "F32", (4096, 4096), i * len(block), (i + 1) * len(block))
            for i in range(blocks)
        )
        with (repo / name).open("wb") as file:
            file.write(encode_header(tensors, {"format": "pt"}))
            for _ in tensors:
                file.write(block)
        weight_map |= {tensor.name: name for tensor in tensors}
    (repo / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return "bench/large"


def timed(code: str, endpoint: str, repo: str, folder: Path) -> tuple[float, float]:
    """Wall seconds of one process, and its peak memory in bytes."""
    target = Path(tempfile.mkdtemp(dir=folder))
    tail = "\nimport re; print('peak', re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    env = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HOME": str(target / "home")}
    try:
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code + tail, endpoint, repo, target], env=env, capture_output=True, text=True
        )
        seconds = time.monotonic() - began
        if done.returncode:
            raise SystemExit(done.stderr)
        return seconds, int(done.stdout.split("peak ")[1]) * 1024
    finally:
        shutil.rmtree(target)
        os.sync()  # what one wrote back is not the next one's burden


def hit_seconds(endpoint: str, repo: str, folder: Path) -> float:
    target = Path(tempfile.mkdtemp(dir=folder))
    try:
        subprocess.run([sys.executable, "-c", OURS, endpoint, repo, target], check=True, capture_output=True)
        arguments = [sys.executable, "-c", HIT, str(target / "modelstore"), repo]
        return float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)
    finally:
        shutil.rmtree(target)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def environment(folder: Path) -> str:
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    file_system = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True).stdout.strip()
    names = ("huggingface_hub", "transformers", "torch", "safetensors", "numpy")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({cpu[1].strip() if cpu else platform.machine()}), "
        f"Linux {platform.release()}, {file_system}, Python {platform.python_version()}, {packages}; "
        "the hub is a process on the same machine"
    )


def report(arguments: argparse.Namespace, folder: Path) -> str:
    hub_folder = folder / "hub"
    repos = make_checkpoints(hub_folder, parse_size("--size", arguments.size))
    peak = f" --peak {arguments.peak}" if arguments.peak else ""
    lines = [f"Measured by `python scripts/bench/seed.py --size {arguments.size} --runs {arguments.runs}{peak}`:"]
    lines += [environment(folder) + ".", ""]
    command = [sys.executable, "-m", "tests.support.hub", hub_folder]
    hub = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True)
    try:
        assert hub.stdout is not None
        endpoint = hub.stdout.readline().strip()
        for what, repo in repos.items():
            seconds: dict[str, list[float]] = {name: [] for name in COMPETITORS}
            peaks = dict.fromkeys(COMPETITORS, 0.0)
            timed(FLOOR, endpoint, repo, folder)  # the hub learns its digests, the page cache the files
            for run in range(arguments.runs):
                for name, code in COMPETITORS.items():
                    took, peak = timed(code, endpoint, repo, folder)
                    seconds[name].append(took)
                    peaks[name] = max(peaks[name], peak)
                    print(f"{what}, run {run + 1}: {name}: {took:.2f} s", file=sys.stderr)
            lines += table(what, size_of(hub_folder / repo), seconds, peaks)
        milliseconds = hit_seconds(endpoint, repos["fp32 checkpoint"], folder) * 1000
        if arguments.peak:
            repo = make_large(hub_folder, parse_size("--peak", arguments.peak))
            took, most = timed(OURS, endpoint, repo, folder)
            size = size_of(hub_folder / repo)
            lines += [
                f"Seeding an fp32 checkpoint of {size / 1e9:.1f} GB took {took:.0f} s (once, its digests included on "
            ]
            lines[-1] += f"the hub's side) and at most {most / 1e9:.2f} GB of memory.\n"
        lines += [f"A hit (`store.ensure` on a published snapshot of {what_files(hub_folder)} files): "]
        lines[-1] += f"median {milliseconds:.2f} ms of 200."
    finally:
        hub.terminate()
        hub.wait()
    return "\n".join(lines) + "\n"


def what_files(hub_folder: Path) -> int:
    return len(list((hub_folder / "bench" / "fp32").iterdir()))


def table(what: str, size: int, seconds: dict[str, list[float]], peaks: dict[str, float]) -> list[str]:
    ours = seconds["modelstore seed"]
    rows = [
        f"**{what}, {size / 1e9:.2f} GB**",
        "",
        "| | median s | min to max | GB/s | ours / this, run by run | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, times in seconds.items():
        ratio = statistics.median(mine / other for mine, other in zip(ours, times, strict=True))
        rows.append(
            f"| {name} | {statistics.median(times):.2f} | {min(times):.2f} to {max(times):.2f} | "
            f"{size / statistics.median(times) / 1e9:.2f} | {ratio:.2f} | {peaks[name] / 1e9:.2f} GB |"
        )
    return [*rows, ""]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="1GB", help="of the fp32 checkpoint")
    parser.add_argument("--peak", help="also measure the peak memory of seeding a checkpoint of this size, e.g. 20GB")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the volume lies")
    parser.add_argument("--write", type=Path, help="a document whose section by this script is replaced")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-seed-", dir=arguments.folder))
    try:
        text = report(arguments, folder)
    finally:
        shutil.rmtree(folder)
    print(text)
    if arguments.write:
        write_section(arguments.write, "bench/seed.py", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
