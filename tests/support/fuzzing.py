"""Runs a coverage-guided fuzzer of this folder in a process of its own."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ_S = int(os.environ.get("FUZZ_S", "15"))


def fuzz(module: str, corpus: Path) -> int:
    """Run `tests.support.MODULE` for FUZZ_S seconds, beginning with the files in `corpus`; returns the inputs tried."""
    pytest.importorskip("atheris", reason="needs atheris, which has no wheel for this Python")
    seed = random.randrange(1, 2**31)
    done = subprocess.run(
        [sys.executable, "-m", f"tests.support.{module}", str(corpus), f"-max_total_time={FUZZ_S}", f"-seed={seed}"],
        cwd=Path(__file__).parent.parent.parent,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs is not None
    return int(runs[1])
