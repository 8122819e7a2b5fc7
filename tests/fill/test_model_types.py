"""The committed table of model types is that of this transformers."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.timeout(900)
def test_the_committed_table_is_that_of_the_installed_transformers() -> None:
    script = Path(__file__).parent.parent.parent / "scripts" / "dev" / "model_types.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"run scripts/dev/model_types.py and look at what changed:\n{done.stdout}{done.stderr}"
