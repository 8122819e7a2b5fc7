#!/usr/bin/env python3
"""Run the sessions of docs/operations.md, and write the output of each command.

    python scripts/dev/record_session.py

Every line that begins with `$` in a block of ```console runs in order, in one folder, on a fresh store, against a
stand-in of the Hub and a real S3 server.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HERE))

from tests.support.checkpoints import random_tensors, write_repo
from tests.support.hub import running_hub
from tests.support.models import write_model
from tests.support.s3_server import running_s3

PAGE = HERE / "docs" / "operations.md"
_BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


@contextmanager
def environment() -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder with the page's list and a model of one's own, and the variables of a session in it."""
    with (
        tempfile.TemporaryDirectory(prefix="session-") as name,
        running_hub(Path(name, "hub")) as hub,
        running_s3() as s3,
    ):
        folder = Path(name)
        write_model(hub.folder / "org" / "chat", seed=1)
        write_repo(hub.folder / "org" / "chat-next", random_tensors(4, (1024, 1024), seed=2))
        write_repo(hub.folder / "org" / "embedding", random_tensors(4))
        write_repo(hub.folder / "org" / "broken-off", random_tensors(4, (512, 512), seed=3), shards=4)
        hub.faults.status["model-00004-of-00004.safetensors"] = [(404, {})] * 1000
        write_repo(folder / "my-model", random_tensors(2, seed=5))
        (folder / "volume").mkdir()
        found = re.search(r"```toml\n# models.toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
        assert found is not None
        (folder / "models.toml").write_text(found[1])
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MODEL", "RUNPOD_"))}
        yield (
            folder,
            kept
            | {
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "MODELSTORE_ROOT": str(folder / "volume" / "modelstore"),
                "MODELSTORE_QUOTA": "100MB",
                "MODELSTORE_S3_ENDPOINT": s3.url,
                "AWS_ACCESS_KEY_ID": "k",
                "AWS_SECRET_ACCESS_KEY": "s",
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(folder / "home"),
                "RUNPOD_POD_ID": "pod-1",
                "COLUMNS": "110",
            },
        )


def run(command: str, folder: Path, env: dict[str, str]) -> str:
    """What a command prints, both streams; its folder is written as /volume. Raises where it fails."""
    done = subprocess.run(
        ["bash", "-c", f"{command} 2>&1"], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    text = done.stdout.replace(str(folder / "volume"), "/runpod-volume").replace(str(folder), "/workspace")
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}:\n{text}")
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()


def session(page: str) -> str:
    """The page with what its commands print now."""
    with environment() as (folder, env):

        def block(found: re.Match[str]) -> str:
            commands = [line[2:] for line in found[1].splitlines() if line.startswith("$ ")]
            said = [f"$ {command}\n{run(command, folder, env)}".rstrip() for command in commands]
            return "```console\n" + "\n".join(said) + "\n```"

        return _BLOCK.sub(block, page)


def main() -> int:
    PAGE.write_text(session(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
