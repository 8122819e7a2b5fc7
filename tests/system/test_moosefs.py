"""The store on a real MooseFS, from several hosts: one downloads, others take over in time.

Each seeder is a process that uses one host's mount. Cables are pulled, processes killed and stopped; the hub counts.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelstore.operate.doctor import diagnose
from modelstore.reference import parse_reference
from modelstore.settings import Settings
from modelstore.store import ModelStore
from modelstore.volume import evict as evict_module
from modelstore.volume.capabilities import MEANINGS
from modelstore.volume.evict import evict
from modelstore.volume.garbage import collect, find_garbage
from modelstore.volume.header import TensorInfo, encode_header
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.verify import verify_snapshot
from modelstore.warmstart import begin
from tests.support.checkpoints import random_tensors, weights_bytes, write_repo
from tests.support.hub import Hub
from tests.support.moosefs import Host, MooseFS, why_not
from tests.support.records import MOOSEFS, WRITTEN
from tests.support.records import record as note
from tests.support.s3_server import running_s3
from tests.support.sweeps import sweep

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"a MooseFS {why_not()}")

LEASE_S = 4.0
SETTLE_S = evict_module.SETTLE_S


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

    def seed(self, host: Host, worker: str, *options: str) -> subprocess.Popen[str]:
        env = {
            "MODELSTORE_ROOT": str(self.root(host)),
            "HF_ENDPOINT": self.hub.url,
            "RUNPOD_POD_ID": worker,
            "MODELSTORE_LEASE_S": str(self.lease_s),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "modelstore", "seed", "org/name", "--json", *options],
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

    def store(self, host: Host, **changes: Any) -> ModelStore:
        """The store as a process on `host` sees it, in this process."""
        settings = Settings(root=self.root(host), hf_endpoint=self.hub.url, lease_s=self.lease_s, **changes)
        return ModelStore(settings.root, settings=settings)

    def assert_published_whole(self, host: Host, dtype: str = "float16") -> None:
        snapshot = self.store(host, offline=True).lookup("org/name", dtype=dtype)
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
def big_repo(hub: Hub) -> Path:
    """400 MB of bf16 in one file: seven chunks of MooseFS."""
    tensors = {
        f"layers.{n}.weight": np.random.default_rng(n).integers(0, 2**14, (4096, 1024), "<u2") for n in range(50)
    }
    folder = write_repo(hub.folder / "org" / "name", {"x": np.zeros(4, np.float32)})
    infos, at = [], 0
    for name in sorted(tensors):
        infos.append(TensorInfo(name, "BF16", (4096, 1024), at, at + tensors[name].nbytes))
        at += tensors[name].nbytes
    with (folder / "model.safetensors").open("wb") as file:
        file.write(encode_header(tuple(infos), {"format": "pt"}))
        for name in sorted(tensors):
            file.write(tensors[name].tobytes())
    return folder


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
    note(
        "One download",
        "8 workers on 3 hosts at once on an empty volume",
        tried=8,
        survived=8,
        where=MOOSEFS,
        figure="the hub served 1.0 times the weights",
    )


def test_a_killed_process_is_followed_from_another_host_within_2_s(fleet: Fleet, hub: Hub, repo: Path) -> None:
    hub.faults.bytes_per_s = 8e6
    holder = fleet.seed(fleet.hosts[0], "holder")
    fleet.wait_for_bytes(0.2 * weights_bytes(repo))
    waiter = fleet.seed(fleet.hosts[1], "waiter")
    fleet.wait_for_polling(waiter)
    holder.kill()
    holder.wait()
    took_s = fleet.seconds_until_generation(2, fleet.hosts[1])
    assert took_s < 2.0
    record = result(waiter)
    assert record["status"] == "resumed"
    assert hub.served.total_bytes <= 1.1 * weights_bytes(repo)
    fleet.assert_published_whole(fleet.hosts[2])
    served = hub.served.total_bytes / weights_bytes(repo)
    note(
        "No endpoint hangs on a dead one",
        "SIGKILL of the holder",
        tried=1,
        survived=1,
        where=MOOSEFS,
        figure=f"followed from another host after {took_s:.2f} s; {served:.2f} of the model served in all",
    )


def test_a_host_that_loses_its_cable_is_followed_after_the_lease_and_fenced_when_it_returns(
    fleet: Fleet, hub: Hub, big_repo: Path
) -> None:
    total = weights_bytes(big_repo)
    hub.faults.bytes_per_s = 15e6
    holder = fleet.seed(fleet.hosts[0], "holder", "--dtype", "keep")
    fleet.wait_for_bytes(0.6 * total)
    waiter = fleet.seed(fleet.hosts[1], "waiter", "--dtype", "keep")
    fleet.wait_for_polling(waiter)
    fleet.hosts[0].pull_cable()
    before = hub.served.total_bytes
    took_s = fleet.seconds_until_generation(2, fleet.hosts[1])
    assert LEASE_S - 1.0 < took_s < LEASE_S + 10.0
    hub.faults.bytes_per_s = 0
    record = result(waiter)
    assert record["status"] == "resumed"
    again = (record["downloaded_bytes"] - (total - before)) / total
    assert again < 0.5, "no more than the chunks that were being written"
    fleet.assert_published_whole(fleet.hosts[1], dtype="keep")
    published = sorted((path, path.stat().st_mtime_ns) for path in fleet.root(fleet.hosts[1]).glob("models/*/*/*"))
    assert holder.poll() is None, "the holder ended without its volume"
    fleet.hosts[0].plug_in_cable()
    out, err = holder.communicate(timeout=90)
    assert holder.returncode == 0, err
    assert "was taken over by generation 2" in err
    assert json.loads(out)["status"] == "waited"
    after = sorted((path, path.stat().st_mtime_ns) for path in fleet.root(fleet.hosts[1]).glob("models/*/*/*"))
    assert after == published
    fleet.assert_published_whole(fleet.hosts[0], dtype="keep")
    figure = f"followed after {took_s:.2f} s with a lease of {LEASE_S:.0f} s; fetched again {again:.2f} of the model; the host stops with ClaimLost when it returns"
    note(
        "No endpoint hangs on a dead one",
        "the cable of the holder's host is pulled",
        tried=1,
        survived=1,
        where=MOOSEFS,
        figure=figure,
    )


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
    note(
        "No endpoint hangs on a dead one",
        "the holder is stopped for longer than the lease, then goes on",
        tried=1,
        survived=1,
        where=MOOSEFS,
        figure="fenced: it stops with ClaimLost",
    )


@pytest.mark.parametrize(
    ("scenario", "fault", "every"),
    [("seed", "kill", 1 if WRITTEN else 3), ("seed", "EIO", 4), ("seed", "ENOSPC", 4), ("mend", "kill", 3)],
)
@pytest.mark.timeout(600)
def test_a_process_that_dies_at_any_step_is_followed_from_another_host(
    hub: Hub, moosefs: MooseFS, scenario: str, fault: str, every: int
) -> None:
    name = f"sweep-{scenario}-{fault}"
    here, there = (host.mount / name for host in moosefs.hosts[:2])
    here.mkdir()
    record = sweep(
        hub, scenario, fault, "--base", str(here), "--elsewhere", str(there), "--every", str(every), where=MOOSEFS
    )
    assert record["survived"] == record["tried"] >= record["steps"] / every - 8 > 20


def test_a_quota_ends_in_one_typed_error_and_the_partial_is_kept_if_the_model_can_fit(
    fleet: Fleet, hub: Hub, repo: Path
) -> None:
    """A quota as RunPod sets it: the file system says nothing of it, and writes fail."""
    host, total = fleet.hosts[0], weights_bytes(repo)
    root = fleet.root(host)
    root.mkdir()
    host.set_quota(root, int(0.4 * total))
    out, err = failed(fleet.seed(host, "w"), code=6)
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "Disk quota exceeded" in line
    assert not list(root.glob("staging/*/*/*/*")), "it can never fit, and what came of it is gone"
    assert not list(root.glob("models/*/*"))
    # Beside another model it does not fit either, but could: what came stays.
    write_repo(hub.folder / "org" / "other", random_tensors(30, (1024, 1024), seed=1))
    host.set_quota(root, 10 * total)
    other = fleet.store(host).ensure("org/other")
    host.set_quota(root, other.size_bytes + int(0.5 * total))
    failed(fleet.seed(host, "w"), code=6)
    assert list(root.glob("staging/*/*/*/*/*.safetensors"))
    evict(fleet.store(host).layout, other.key)
    record = result(fleet.seed(host, "w"))
    assert record["status"] == "resumed"
    fleet.assert_published_whole(fleet.hosts[1])
    note(
        "No byte is lost, and no volume overrun",
        "a hard quota of the file system that statfs does not show",
        tried=2,
        survived=2,
        where=MOOSEFS,
        figure="one line, code 6; the partial kept where the model can fit, removed where not",
    )


def failed(process: subprocess.Popen[str], *, code: int) -> tuple[str, str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out, err


LOAD = """
import sys, time
from modelstore.volume.layout import SnapshotKey
from modelstore.reference import parse_reference
from modelstore.settings import Settings
from modelstore.warmstart import begin
until, loads, outcomes = time.monotonic() + float(sys.argv[1]), 0, {}
while time.monotonic() < until:
    begun = begin(Settings.from_env())
    begun.reading.wait_all()
    assert (begun.snapshot.path / "config.json").read_bytes().startswith(b"{"), "opened by path, as transformers does"
    outcomes[begun.timeline.outcome] = outcomes.get(begun.timeline.outcome, 0) + 1
    loads += 1
    time.sleep(0.03)
    assert (begun.snapshot.path / "tokenizer.json").exists()
    begun.in_use.end()
    time.sleep(0.05)
print(loads, outcomes)
"""


def test_no_load_fails_while_another_host_evicts_in_a_loop(
    fleet: Fleet, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_repo(hub.folder / "org" / "name", random_tensors(4, (512, 512)))
    env = os.environ | {"HF_ENDPOINT": hub.url, "MODEL_ID": "org/name"}
    loaders = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, "15"],
            env=env | {"MODELSTORE_ROOT": str(fleet.root(host)), "RUNPOD_POD_ID": host.name},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in fleet.hosts[1:]
    ]
    fleet.processes += loaders
    monkeypatch.setattr("modelstore.volume.evict.SETTLE_S", SETTLE_S)
    store, evicted, spared, loads = fleet.store(fleet.hosts[0]), 0, 0, 0
    while any(loader.poll() is None for loader in loaders):
        for key in list(store.catalog.keys()):
            if evict(store.layout, key):
                evicted += 1
            else:
                spared += 1
        for item in find_garbage(store.layout, grace_s=60.0):
            collect(store.layout, item, worker="gc", lease_s=LEASE_S, grace_s=60.0)
    for loader in loaders:
        out, err = loader.communicate(timeout=240)
        assert loader.returncode == 0, err
        loads += int(out.split()[0])
    assert evicted > 3
    assert spared > 3
    assert not list(store.layout.trash.iterdir())
    figure = f"loads on two hosts; evicted {evicted} times meanwhile, spared {spared} times because it was in use"
    note(
        "No endpoint hangs on a dead one",
        "another host evicts in a loop",
        tried=loads,
        survived=loads,
        where=MOOSEFS,
        figure=figure,
    )


def test_a_thousand_snapshots_do_not_slow_a_hit(fleet: Fleet, hub: Hub) -> None:
    """1,000 snapshots of 20 files each; what `ls`, `gc --dry-run` and a hit take on the mount."""
    write_repo(hub.folder / "org" / "name", extra={f"extra-{n}.json": b"{}" for n in range(16)})
    store = fleet.store(fleet.hosts[0])
    snapshot = store.ensure("org/name")
    settings = replace(store.settings, model=parse_reference("org/name"), worker_id="w")
    alone_s = hit_s(settings)
    for number in range(999):
        key = SnapshotKey(f"org{number % 37}/model-{number}", f"{number:040x}", "float16")
        folder = store.layout.snapshot(key)
        folder.mkdir(parents=True)
        for file in snapshot.manifest.files:
            (folder / file.path).touch()
            os.truncate(folder / file.path, file.size_bytes)
        (folder / "manifest.json").write_bytes(replace(snapshot.manifest, key=key).encode())
        store.layout.used(key).mkdir(parents=True)
        (store.layout.used(key) / ".last").touch()
        if number % 100:  # a hundredth was used in the last five minutes
            os.utime(store.layout.used(key) / ".last", (time.time() - 3600,) * 2)
        store.layout.claims(key).mkdir(parents=True)
        (store.layout.claims(key) / "1").touch()
    assert folder.lstat().st_mtime_ns % 10**9 == 0, "inventory.py counts on times in whole seconds"
    there = fleet.store(fleet.hosts[1])
    began = time.monotonic()
    found = list(there.snapshots())
    ls_s = time.monotonic() - began
    assert len(found) == 1000
    assert sum(len(each.manifest.files) + 1 for each in found) >= 20_000
    took = []
    for _ in range(5):
        began = time.monotonic()
        listed = subprocess.run(
            [sys.executable, "-m", "modelstore", "ls", "--json", "--root", str(there.layout.root)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        took.append(time.monotonic() - began)
        assert len(json.loads(listed.stdout)) == 1000
    command_s = statistics.median(took)
    began = time.monotonic()
    find_garbage(there.layout)
    gc_s = time.monotonic() - began
    among_many_s = hit_s(replace(settings, root=fleet.root(fleet.hosts[1])))
    figure = f"`modelstore ls` {command_s:.2f} s (median of 5), looking at every file {ls_s:.1f} s, `gc --dry-run` {gc_s:.1f} s, a hit {1e3 * among_many_s:.1f} ms, in a store of one {1e3 * alone_s:.1f} ms"
    note("Scale", "1,000 snapshots, 20,000 files", tried=1000, survived=len(found), where=MOOSEFS, figure=figure)
    assert among_many_s < 3 * alone_s + 0.02, "it reads the same few files"
    assert ls_s < 30
    assert command_s < 5
    assert gc_s < 30


def hit_s(settings: Settings) -> float:
    """The median of finding a snapshot, marking it and opening its files, in seconds."""
    took = []
    for _run in range(9):
        began = time.monotonic()
        pending = begin(settings)
        took.append(time.monotonic() - began)
        pending.reading.wait_all()
        pending.reading.close()
    return sorted(took)[len(took) // 2]


def test_the_doctor_finds_a_real_moosefs_sound_from_two_mounts(fleet: Fleet) -> None:
    here, there = fleet.root(fleet.hosts[0]), fleet.root(fleet.hosts[1])
    settings = replace(fleet.store(fleet.hosts[0]).settings, offline=True)
    findings = {finding.check: finding for finding in diagnose(settings, peer=there, probe_bytes=16 << 20)}
    assert here != there
    assert [finding for finding in findings.values() if finding.level == "error"] == []
    for check in ("mount", "mode", "clock", *(name.replace("_", " ") for name in MEANINGS)):
        assert findings[check].level == "ok", findings[check]
    assert "mfs#" in findings["mount"].what
    assert "seen by the other mount" in findings["locks"].what


def test_a_sync_to_a_bucket_and_back_goes_on_after_kills(hub: Hub, moosefs: MooseFS, tmp_path: Path) -> None:
    """From one host's mount to S3 and from there to another store on MooseFS; the first try of each is killed."""
    write_repo(hub.folder / "org" / "name", random_tensors(40, (1024, 1024)), shards=1)
    write_repo(hub.folder / "org" / "other", random_tensors(8, (1024, 1024)), shards=8)
    fleet = Fleet(hub, moosefs, "sync")
    source = fleet.store(moosefs.hosts[0])
    for name in ("org/name", "org/other"):
        source.ensure(name, dtype="float32")
    source.set_alias("chat", "org/name", dtype="float32")
    (moosefs.hosts[1].mount / "second").mkdir()
    target = str(moosefs.hosts[1].mount / "second" / "modelstore")
    with running_s3() as s3:
        env = os.environ | {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "MODELSTORE_S3_ENDPOINT": s3.url}
        env |= {"MODELSTORE_ROOT": str(source.layout.root), "MODELSTORE_LEASE_S": str(LEASE_S)}
        bucket = "s3://vol123@EU-RO-1"
        for words, is_under_way in (
            (["--to", bucket], lambda: sum("partNumber" in path for _method, path in s3.requests) >= 2),
            (["--from", bucket, "--to", target], lambda: any(Path(target).glob("staging/*/*/*/snapshot/model-00002*"))),
        ):
            command = [sys.executable, "-m", "modelstore", "sync", *words, "--json"]
            s3.slow_s = 0.3
            with subprocess.Popen([*command, "-q"], env=env, stdout=subprocess.DEVNULL) as process:
                deadline = time.monotonic() + 60
                while not is_under_way() and process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.005)
                assert process.poll() is None, "it was done before it was killed"
                process.send_signal(signal.SIGKILL)
            s3.slow_s = 0.0
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)
            assert {record["status"] for record in json.loads(done.stdout)} <= {"copied", "present"}
    copy = ModelStore(Path(target), settings=Settings(root=Path(target), offline=True))
    assert {each.key: each.manifest for each in copy.snapshots()} == {
        each.key: each.manifest for each in source.snapshots()
    }
    assert all(verify_snapshot(each).ok for each in copy.snapshots())
    assert copy.lookup("@chat") is not None
