"""Every crash point of a seed, a mend, an eviction and a conversion, on this machine's own file system; `test_moosefs.py` has the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.hub import Hub
from tests.support.records import WRITTEN
from tests.support.sweeps import sweep


@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", ["kill", "torn", "EIO", "ENOSPC"])
@pytest.mark.parametrize(
    ("scenario", "at_least"),
    [("seed", 60), ("mend", 30), ("evict", 8), ("seed-compressed", 60), ("compress", 20), ("expand", 20)],
)
def test_after_a_death_at_any_step_a_fresh_seed_ends_well(
    hub: Hub, tmp_path: Path, scenario: str, at_least: int, fault: str
) -> None:
    # The table of docs/reliability.md has all steps; otherwise some faults are tried at every third one.
    all_steps = WRITTEN or (fault in ("kill", "torn") and scenario != "seed-compressed")
    every = 1 if all_steps else 3
    record = sweep(hub, scenario, fault, "--base", str(tmp_path / "sweep"), "--every", str(every))
    if fault == "torn":  # only writes can be torn
        at_least = 10 * (scenario != "evict")
    assert record["survived"] == record["tried"] >= at_least // every
