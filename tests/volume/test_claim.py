"""The claim: its holder, and the moment when another may take it over. Time is a clock that the test moves."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelstore.errors import ClaimLost
from modelstore.volume import claim as claim_module
from modelstore.volume import durable
from modelstore.volume.claim import (
    DEAD_AFTER_S,
    Claim,
    ClaimRecord,
    Contender,
    Holder,
    current_record,
    highest_generation,
    parse_record,
    reserved_bytes,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def contender(folder: Path, name: str, clock: Clock | None = None, *, lease_s: float = 30.0) -> Contender:
    return Contender(folder, worker=name, lease_s=lease_s, clock=clock or time.monotonic)


def claimed(outcome: Claim | Holder) -> Claim:
    assert isinstance(outcome, Claim)
    return outcome


def held(outcome: Claim | Holder) -> Holder:
    assert isinstance(outcome, Holder)
    return outcome


def test_one_claims_and_the_other_sees_the_worker_and_its_progress(tmp_path: Path) -> None:
    with claimed(contender(tmp_path / "c", "a").try_claim()) as claim:
        claim.report("downloading", done=5_000_000_000, total=10_000_000_000, eta_s=42.0)
        claim._write()
        holder = held(contender(tmp_path / "c", "b").try_claim())
        assert holder.describe() == "worker a (downloading, 50% of 10.00 GB, about 42 s left)"
        claim.check()


def test_numbers_only_grow_also_after_a_release(tmp_path: Path) -> None:
    for expected in (1, 2, 3):
        with claimed(contender(tmp_path, "a").try_claim()) as claim:
            assert claim.generation == expected
    assert highest_generation(tmp_path) == 3


def test_a_live_holder_keeps_its_claim_however_often_it_is_asked(tmp_path: Path) -> None:
    clock = Clock()
    with claimed(contender(tmp_path, "a").try_claim()) as claim:
        other = contender(tmp_path, "b", clock)
        for _ in range(50):
            clock.now += 1.0
            claim._write()  # a heartbeat
            held(other.try_claim())
        assert highest_generation(tmp_path) == 1


def silence(claim: Claim) -> None:
    """Stop the heartbeats, as a host does that is gone or a process that is stopped."""
    claim._stop.set()
    claim._thread.join()


def test_a_silent_holder_that_keeps_its_lock_is_taken_over_after_the_lease_alone(tmp_path: Path) -> None:
    clock = Clock()
    lost = claimed(contender(tmp_path, "a").try_claim())
    silence(lost)
    other = contender(tmp_path, "b", clock, lease_s=30.0)
    held(other.try_claim())
    clock.now += 29.9
    held(other.try_claim())
    clock.now += 0.2
    with claimed(other.try_claim()) as taken:
        assert taken.generation == 2
        with pytest.raises(ClaimLost, match="generation 2"):
            lost.check()
        taken.check()


def test_a_free_lock_is_no_proof_while_the_heart_beats(tmp_path: Path) -> None:
    """Mounts with local locks (mfsnobsdlocks) show every lock of another host as free."""
    clock = Clock()
    claim = claimed(contender(tmp_path, "a").try_claim())
    assert claim._lock is not None
    claim._lock.release()
    other = contender(tmp_path, "b", clock)
    for _ in range(10):
        clock.now += DEAD_AFTER_S * 0.9
        claim._write()
        held(other.try_claim())
    claim.finish("released")


HOLD = """
import sys, time
from pathlib import Path
from modelstore.volume.claim import Contender
claim = Contender(Path(sys.argv[1]), worker="child", lease_s=30).try_claim()
print(claim.generation, flush=True)
time.sleep(60)
"""


@pytest.fixture
def child(tmp_path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    return process


def poll(one: Contender, limit_s: float) -> tuple[Claim, float]:
    began = time.monotonic()
    while True:
        outcome = one.try_claim()
        if isinstance(outcome, Claim):
            return outcome, time.monotonic() - began
        assert time.monotonic() - began < limit_s, "nobody took over"
        time.sleep(0.05)


def test_a_killed_process_is_followed_within_2_s(tmp_path: Path, child: subprocess.Popen[str]) -> None:
    other = contender(tmp_path, "b")
    held(other.try_claim())
    child.kill()
    child.communicate()
    claim, took_s = poll(other, 5.0)
    with claim:
        assert claim.generation == 2
        assert took_s < 2.0


def test_a_stopped_process_is_fenced_when_it_goes_on(tmp_path: Path, child: subprocess.Popen[str]) -> None:
    other = contender(tmp_path, "b", lease_s=2.0)
    held(other.try_claim())
    os.kill(child.pid, signal.SIGSTOP)
    try:
        claim, took_s = poll(other, 10.0)
        with claim:
            assert claim.generation == 2
            assert 2.0 <= took_s < 8.0
    finally:
        child.kill()
        child.communicate()


def race(folder: Path, start: float, wins: multiprocessing.Queue[int]) -> None:
    one = contender(folder, str(os.getpid()))
    while time.time() < start:
        pass
    outcome = one.try_claim()
    if isinstance(outcome, Claim):
        wins.put(outcome.generation)
        time.sleep(0.5)


def test_of_many_at_once_exactly_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    wins: multiprocessing.Queue[int] = context.Queue()
    start = time.time() + 4.0
    processes = [context.Process(target=race, args=(tmp_path / "c", start, wins)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [wins.get(timeout=1)] == [1]
    assert wins.empty()


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b'{"worker": 1, "unknown": 2}', b"\xff" * 40, b"null", b'{"unknown": 2}']
    + [
        json.dumps({"worker": "a", "host": "b", "pid": 1, name: value}).encode()
        for name in ("done", "total", "eta_s", "beat")
        for value in (10**400, float("inf"), float("nan"))
    ],
)
def test_a_record_that_is_half_written_or_damaged_is_none(data: bytes) -> None:
    assert parse_record(data) is None


def test_a_terminal_obeys_nothing_that_a_record_says() -> None:
    record = parse_record(ClaimRecord("\x1b[31ma\ud800", "b\x07", 7, phase="c\n").encode())
    assert record is not None
    assert Holder(1, record, 0.0).describe() == "worker \ufffd[31ma\ufffd (c\ufffd)"
    assert record.host == "b\ufffd"


def test_a_record_comes_back_and_has_one_size(tmp_path: Path) -> None:
    record = ClaimRecord("a", "host", 7, done=3, total=9, eta_s=1.5)
    assert parse_record(record.encode()) == record
    assert len(record.encode()) == 1024


def test_a_field_of_a_newer_version_hides_nothing(tmp_path: Path) -> None:
    record = ClaimRecord("w", "h", 7, reserved=10**6, done=3, total=9)
    data = json.dumps(json.loads(record.encode()) | {"mood": "good", "places": [1]}).encode()
    assert parse_record(data) == record
    (tmp_path / "1").write_bytes(data)
    assert reserved_bytes(tmp_path) == (10**6, 0)


def test_of_two_that_a_volume_elected_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume may create one file twice: the last to write holds it, and the other one stops."""
    real = durable.open_for_write
    monkeypatch.setattr(durable, "open_for_write", lambda path, exclusive=False: real(path))
    monkeypatch.setattr(claim_module, "_try_lock", lambda *_rest, **_options: None)
    first = Contender(tmp_path, worker="first", lease_s=4).try_claim()
    assert isinstance(first, Claim)
    second = Contender(tmp_path, worker="second", lease_s=4)._create(1, after_the_dead=True)
    assert isinstance(second, Claim)
    assert second.generation == first.generation
    until = time.monotonic() + 60
    while not first._overwritten_by and time.monotonic() < until:
        time.sleep(0.02)
    with pytest.raises(ClaimLost, match="elected two"):
        first.check()
    second.check()
    first.finish("released")
    record = current_record(tmp_path)[1]
    assert record is not None
    assert (record.worker, record.state) == ("second", "held"), "what the other one wrote is left alone"
    second.finish("published")
