"""A sample of transformers' model classes, through the store and back, bit for bit; another one in each run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "dev" / "conformance.py"
PAGE = Path(__file__).parent.parent.parent / "docs" / "conformance.md"
ALWAYS = ["Lfm2MoeForCausalLM", "EsmModel", "HunYuanMoEV1ForCausalLM", "DeepseekV3ForCausalLM", "LlamaForCausalLM"]


def sweep(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--processes", "1", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    print(done.stdout)  # the seed, for a run that fails
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sample_of_all_classes_is_equal() -> None:
    out = sweep("--sample", "30")
    assert "--seed" in out
    assert " 0 different" in out


def test_classes_with_parts_in_float32_are_equal() -> None:
    assert f"{len(ALWAYS)} classes tried, {len(ALWAYS)} equal, 0 different" in sweep("--only", *ALWAYS)


def test_the_committed_table_has_no_difference() -> None:
    assert " 0 different, " in PAGE.read_text()
