"""A minute of mixed jobs, swaps, evictions, cancellations, timeouts and kills; twenty of them run by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "dev" / "soak.py"


@pytest.mark.timeout(420)
def test_no_job_is_lost_answered_twice_or_wrong_and_nothing_grows() -> None:
    # A job's limit is long here, because other tests run beside this one.
    command = [sys.executable, SCRIPT, "--minutes", "1", "--job-limit-s", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert done.stdout.startswith("seed ")
    assert "no job was lost, answered twice or wrong, and nothing grew" in done.stdout
