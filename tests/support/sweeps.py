"""Sweeps over the crash points of a scenario: see `crash_sweep.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.checkpoints import random_tensors, write_repo
from tests.support.hub import Hub
from tests.support.records import LOCAL
from tests.support.records import record as note

SCENARIOS = {"seed": "a seed", "mend": "mending a damaged snapshot", "evict": "an eviction"}
SCENARIOS |= {"seed-compressed": "a compressed seed", "compress": "compressing", "expand": "expanding"}

FAULTS = {
    "kill": "SIGKILL before any step",
    "torn": "half a write, then SIGKILL, at any write",
    "EIO": "EIO at any step",
    "ENOSPC": "ENOSPC from any step on that takes space",
}


def sweep(hub: Hub, scenario: str, fault: str, *options: str, where: str = LOCAL) -> dict[str, Any]:
    """Run one sweep over a small model: two shards that are converted, of several segments each."""
    write_repo(hub.folder / "org" / "name", random_tensors(6, (256, 256)), shards=2)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.crash_sweep", scenario, fault, "--hub", hub.url, *options],
        cwd=Path(__file__).parent.parent.parent,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record: dict[str, Any] = json.loads(done.stdout)
    note(
        "Processes that die, at any step: nothing wrong is published, and a fresh start ends well",
        f"{FAULTS[fault]} of {SCENARIOS[scenario]}, which has {record['steps']}",
        tried=record["tried"],
        survived=record["survived"],
        where=where,
    )
    assert not record["problems"], (record["problems"][:5], done.stderr[-2000:])
    return record
