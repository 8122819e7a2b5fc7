"""The store on a real MooseFS, from several hosts: who downloads, who takes over, and when.

Each seeder is a process that uses one host's mount. Cables are pulled, processes killed and stopped; the hub counts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelstore.settings import Settings
from modelstore.store import ModelStore
from modelstore.verify import verify_snapshot
from tests.checkpoints import random_tensors, weights_bytes, write_repo
from tests.hub import Hub
from tests.moosefs import Host, MooseFS, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"a MooseFS {why_not()}")

LEASE_S = 4.0


@pytest.fixture(scope="module")
def moosefs() -> Iterator[MooseFS]:
    with MooseFS.running(hosts=3) as running:
        yield running


class Fleet:
    """Seeders of one model on the hosts of one MooseFS."""

    def __init__(self, hub: Hub, moosefs: MooseFS, name: str) -> None:
        self.lease_s = LEASE_S
        self.hub = hub
        self.hosts = moosefs.hosts
        self.name = name
        self.processes: list[subprocess.Popen[str]] = []

    def root(self, host: Host) -> Path:
        return host.mount / self.name

    def seed(self, host: Host, worker: str) -> subprocess.Popen[str]:
        env = {
            "MODELSTORE_ROOT": str(self.root(host)),
            "HF_ENDPOINT": self.hub.url,
            "RUNPOD_POD_ID": worker,
            "MODELSTORE_LEASE_S": str(self.lease_s),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "modelstore", "seed", "org/name", "--json"],
            env=os.environ | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def wait_for_bytes(self, count: float) -> None:
        deadline = time.monotonic() + 60
        while self.hub.served.total_bytes < count:
            assert time.monotonic() < deadline, "the download did not get there"
            time.sleep(0.01)

    def wait_for_polling(self, process: subprocess.Popen[str]) -> None:
        """Return once a seeder has said that it waits."""
        assert process.stderr is not None
        while line := process.stderr.readline():
            if "waiting for" in line:
                return
        raise AssertionError("it never waited")

    def seconds_until_generation(self, number: int, host: Host) -> float:
        """From now until a claim of this generation exists, as `host` sees it."""
        began = time.monotonic()
        while not list(self.root(host).glob(f"claims/*/*/{number}")):
            assert time.monotonic() - began < 60, "nobody took over"
            time.sleep(0.02)
        return time.monotonic() - began

    def wait_until_published(self, host: Host) -> None:
        deadline = time.monotonic() + 60
        while not list(self.root(host).glob("refs/*/main.json")):
            assert time.monotonic() < deadline, "nobody published"
            time.sleep(0.1)

    def assert_published_whole(self, host: Host) -> None:
        store = ModelStore(self.root(host), settings=Settings(root=self.root(host), offline=True))
        snapshot = store.lookup("org/name")
        assert snapshot is not None
        assert verify_snapshot(snapshot).ok

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def fleet(hub: Hub, moosefs: MooseFS, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    fleet = Fleet(hub, moosefs, f"modelstore-{abs(hash(request.node.name)):x}")
    try:
        yield fleet
    finally:
        for host in moosefs.hosts:
            host.plug_in_cable()
        fleet.end()


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    record: dict[str, Any] = json.loads(out)
    return record


@pytest.fixture
def repo(hub: Hub) -> Path:
    """50 MB of fp32 in four shards."""
    return write_repo(hub.folder / "org" / "name", random_tensors(12, (1024, 1024)), shards=4)


def test_eight_workers_on_three_hosts_download_once(fleet: Fleet, hub: Hub, repo: Path) -> None:
    hub.faults.bytes_per_s = 20e6
    fleet.lease_s = 30.0  # the default: eight processes on two cores may well starve a heartbeat for four seconds
    processes = [fleet.seed(fleet.hosts[i % 3], f"w{i}") for i in range(8)]
    records = [result(process) for process in processes]
    assert sum(size for name, size in hub.served.bytes.items() if name.endswith(".safetensors")) == weights_bytes(repo)
    assert sorted(record["status"] for record in records) == ["downloaded", *["waited"] * 7]
    assert len({Path(record["path"]).name for record in records}) == 1
    for host in fleet.hosts:
        fleet.assert_published_whole(host)


def test_a_killed_process_is_followed_from_another_host_within_2_s(fleet: Fleet, hub: Hub, repo: Path) -> None:
    hub.faults.bytes_per_s = 8e6
    holder = fleet.seed(fleet.hosts[0], "holder")
    fleet.wait_for_bytes(0.2 * weights_bytes(repo))
    waiter = fleet.seed(fleet.hosts[1], "waiter")
    fleet.wait_for_polling(waiter)
    holder.kill()
    holder.wait()
    took_s = fleet.seconds_until_generation(2, fleet.hosts[1])
    print(f"takeover after SIGKILL: {took_s:.2f} s")
    assert took_s < 2.0
    record = result(waiter)
    assert record["status"] == "resumed"
    assert hub.served.total_bytes <= 1.1 * weights_bytes(repo)
    fleet.assert_published_whole(fleet.hosts[2])


def test_a_host_that_loses_its_cable_is_followed_after_the_lease_and_fenced_when_it_returns(
    fleet: Fleet, hub: Hub, repo: Path
) -> None:
    total = weights_bytes(repo)
    hub.faults.bytes_per_s = 8e6
    holder = fleet.seed(fleet.hosts[0], "holder")
    fleet.wait_for_bytes(0.4 * total)
    waiter = fleet.seed(fleet.hosts[1], "waiter")
    fleet.wait_for_polling(waiter)
    fleet.hosts[0].pull_cable()
    took_s = fleet.seconds_until_generation(2, fleet.hosts[1])
    print(f"takeover after the cable: {took_s:.2f} s with a lease of {LEASE_S:.0f} s")
    assert LEASE_S - 1.0 < took_s < LEASE_S + 5.0
    fleet.wait_until_published(fleet.hosts[1])
    fleet.assert_published_whole(fleet.hosts[1])
    published = sorted((path, path.stat().st_mtime_ns) for path in fleet.root(fleet.hosts[1]).glob("models/*/*/*"))
    assert holder.poll() is None, "the holder ended without its volume"
    fleet.hosts[0].plug_in_cable()
    out, err = holder.communicate(timeout=90)
    assert holder.returncode == 0, err
    assert "was taken over by generation 2" in err
    assert json.loads(out)["status"] == "waited"
    after = sorted((path, path.stat().st_mtime_ns) for path in fleet.root(fleet.hosts[1]).glob("models/*/*/*"))
    assert after == published
    fleet.assert_published_whole(fleet.hosts[0])
    # MooseFS answers no read of a chunk that a lost host was writing: the successor fetches those again, and its process
    # ends only when the mount has answered the read that it gave up.
    record = result(waiter)
    print(f"fetched again or anew after the cable: {record['downloaded_bytes'] / total:.2f} of the model")


def test_a_process_that_was_stopped_for_longer_than_the_lease_is_fenced(fleet: Fleet, hub: Hub, repo: Path) -> None:
    hub.faults.bytes_per_s = 8e6
    holder = fleet.seed(fleet.hosts[0], "holder")
    fleet.wait_for_bytes(0.3 * weights_bytes(repo))
    waiter = fleet.seed(fleet.hosts[1], "waiter")
    fleet.wait_for_polling(waiter)
    os.kill(holder.pid, signal.SIGSTOP)
    record = result(waiter)
    assert record["status"] == "resumed"
    os.kill(holder.pid, signal.SIGCONT)
    out, err = holder.communicate(timeout=90)
    assert holder.returncode == 0, err
    assert "was taken over by generation 2" in err
    assert json.loads(out)["status"] == "waited"
    fleet.assert_published_whole(fleet.hosts[2])
