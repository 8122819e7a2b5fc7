"""Real processes, real signals: many seeders at once, and one that is killed. The hub counts the served bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from modelstore.store import ModelStore
from modelstore.volume.verify import verify_snapshot
from tests.support.checkpoints import random_tensors, weights_bytes, write_repo
from tests.support.hub import Hub

SEED = [sys.executable, "-m", "modelstore", "seed", "org/name", "--json"]


def start(env: dict[str, str], *arguments: str, quiet: bool = True) -> subprocess.Popen[str]:
    """A seeder. A shell's background job ignores Ctrl-C, and so would what it starts: this one does not."""
    return subprocess.Popen(
        ["env", "--default-signal=INT", *SEED, *(["--quiet"] if quiet else []), *arguments],
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    record: dict[str, Any] = json.loads(out)
    return record


def wait_for_share(hub: Hub, total: int, share: float) -> None:
    deadline = time.monotonic() + 60
    while hub.served.total_bytes < total * share:
        assert time.monotonic() < deadline, "the download did not get there"
        time.sleep(0.01)


@pytest.mark.parametrize("shards", [1, 4])
def test_eight_seeders_at_once_download_the_model_once(
    hub: Hub, store: ModelStore, store_env: dict[str, str], shards: int
) -> None:
    repo = write_repo(hub.folder / "org" / "name", random_tensors(16, (1024, 1024)), shards=shards)
    hub.faults.bytes_per_s = 40e6
    processes = [start(store_env | {"RUNPOD_POD_ID": f"w{i}"}) for i in range(8)]
    records = [finish(process) for process in processes]
    served = sum(size for name, size in hub.served.bytes.items() if name.endswith(".safetensors"))
    assert served == weights_bytes(repo)
    assert sorted(record["status"] for record in records) == ["downloaded", *["waited"] * 7]
    assert len({record["path"] for record in records}) == 1
    assert sum(record["downloaded_bytes"] for record in records) == hub.served.total_bytes
    snapshot = store.lookup("org/name")
    assert snapshot is not None
    assert verify_snapshot(snapshot).ok


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_seeder_that_is_killed_at_60_percent_is_resumed_by_another(
    hub: Hub, store: ModelStore, store_env: dict[str, str], shards: int, sent: signal.Signals
) -> None:
    # Large enough for a tenth of it to be more than eight connections' buffers, which count as served and are lost.
    repo = write_repo(hub.folder / "org" / "name", random_tensors(32, (1024, 1024)), shards=shards)
    total = weights_bytes(repo)
    hub.faults.bytes_per_s = 30e6
    first = start(store_env)
    wait_for_share(hub, total, 0.6)
    first.send_signal(sent)
    _out, err = first.communicate(timeout=240)
    assert first.returncode != 0
    assert "Traceback" not in err
    assert not store.layout.models.exists()
    hub.faults.bytes_per_s = 0
    record = finish(start(store_env))
    assert record["status"] == "resumed"
    assert hub.served.total_bytes <= 1.1 * total
    assert record["downloaded_bytes"] < 0.6 * total
    snapshot = store.lookup("org/name")
    assert snapshot is not None
    assert verify_snapshot(snapshot).ok


@pytest.mark.parametrize("others", [(), ("org/second", "org/third")], ids=["one", "three at once"])
def test_ctrl_c_stops_a_slow_download_at_once_and_says_that_bytes_are_kept(
    hub: Hub, store_env: dict[str, str], others: tuple[str, ...]
) -> None:
    for name in others:
        write_repo(hub.folder / name, random_tensors(12, (1024, 1024), seed=len(name)))
    repo = write_repo(hub.folder / "org" / "name", random_tensors(12, (1024, 1024)), shards=2)
    hub.faults.bytes_per_s = 1e6  # most of a minute is left
    process = start(store_env, *others)
    wait_for_share(hub, weights_bytes(repo), 0.1)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    _out, err = process.communicate(timeout=240)
    assert time.monotonic() - sent < 10.0
    assert process.returncode == 130
    assert err.strip().splitlines() == ["interrupted: downloaded bytes are kept, the same command goes on from there"]
    assert hub.served.total_bytes < 0.5 * weights_bytes(repo)


def test_a_waiter_takes_over_from_a_killed_holder_within_seconds(
    hub: Hub, store: ModelStore, store_env: dict[str, str]
) -> None:
    repo = write_repo(hub.folder / "org" / "name", random_tensors(12, (1024, 1024)))
    total = weights_bytes(repo)
    hub.faults.bytes_per_s = 15e6
    holder = start(store_env | {"RUNPOD_POD_ID": "holder"})
    wait_for_share(hub, total, 0.2)
    hub.faults.bytes_per_s = 0.5e6  # the holder must not end while the waiter imports, however long that takes
    waiter = start(store_env | {"RUNPOD_POD_ID": "waiter"}, quiet=False)
    assert waiter.stderr
    assert any("waiting for" in line for line in waiter.stderr)
    hub.faults.bytes_per_s = 15e6
    holder.kill()
    holder.communicate()
    before = hub.served.total_bytes
    killed = time.monotonic()
    while hub.served.total_bytes <= before + (1 << 20):
        # The lease is 30 s. The waiter imports what downloads before its first request: two seconds on a busy machine.
        assert time.monotonic() - killed < 5.0
        time.sleep(0.01)
    record = finish(waiter)
    assert record["status"] == "resumed"
    assert hub.served.total_bytes <= 1.1 * total
    assert store.lookup("org/name") is not None


def test_seeding_uses_bounded_memory(hub: Hub, store_env: dict[str, str]) -> None:
    """Peak memory does not follow the checkpoint: 256 MB of weights here, far more than what seeding may add."""
    write_repo(hub.folder / "org" / "small", random_tensors(1, (64, 64)))
    write_repo(hub.folder / "org" / "name", random_tensors(1, (8192, 8192)))
    peaks = [peak_bytes(store_env, name) for name in ("org/small", "org/name")]
    assert peaks[1] < peaks[0] + 300e6
    assert peaks[1] < 500e6


def peak_bytes(env: dict[str, str], name: str) -> float:
    code = (
        "import re, sys; from modelstore.store import ModelStore; ModelStore.from_env().ensure(sys.argv[1]);"
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name], env=os.environ | env, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def test_seeding_needs_neither_torch_nor_transformers(hub: Hub, store_env: dict[str, str]) -> None:
    write_repo(hub.folder / "org" / "name", shards=2)
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'accelerate', 'runpod')));"
        "sys.argv = ['modelstore', 'seed', 'org/name']; from modelstore.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | store_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_token_is_nowhere_on_the_volume_and_in_no_output(
    hub: Hub, store_env: dict[str, str], tmp_path: Path
) -> None:
    write_repo(hub.folder / "org" / "name", shards=2)
    hub.gated.add("org/name")
    done = subprocess.run(
        [*SEED[:-1], "--debug"],
        env=os.environ | store_env | {"HF_TOKEN": hub.token},
        capture_output=True,
        text=True,
        check=True,
    )
    assert hub.token not in done.stdout + done.stderr
    assert "s3cr3t" not in done.stdout + done.stderr
    for path in (tmp_path / "volume").rglob("*"):
        if path.is_file():
            assert hub.token.encode() not in path.read_bytes()
