"""The committed table of model types is that of this transformers: a sample of it, another one in each run."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "dev" / "model_types.py"


@pytest.mark.timeout(600)
def test_the_committed_table_is_that_of_the_installed_transformers() -> None:
    command = [sys.executable, SCRIPT, "--check", "--sample", "60"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"run scripts/dev/model_types.py and look at what changed:\n{done.stdout}{done.stderr}"
