#!/usr/bin/env python3
"""Four seeders of one model on two mounts of a volume, round after round: none may fail, and both mounts must see one
whole snapshot. As root, with FUSE.

    python scripts/dev/mount_rounds.py s3fs [--rounds 200]

The volume is used as if it could do all that a store needs (MODELSTORE_VOLUME=full), also if it cannot.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HERE))

from tests.support.checkpoints import random_tensors, write_repo
from tests.support.hub import running_hub
from tests.support.mounts import KINDS, Volume, mounted, why_not

SEEDERS = 4
_ROUNDS_OF_A_VOLUME = 10  # the server of buckets takes longer with each object
_LOOKS = 5  # of a mount that sees what the other one wrote late


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "modelstore", *words]


def one_round(volume: Volume, hub: str, number: int) -> tuple[int, list[str]]:
    """How many seeders downloaded, and what went wrong."""
    seeders = []
    for seeder in range(SEEDERS):
        folder = (volume.first, volume.second)[seeder % 2] / f"round-{number}"
        folder.mkdir(exist_ok=True)
        env = os.environ | {"MODELSTORE_ROOT": f"{folder}/modelstore", "HF_ENDPOINT": hub}
        env |= {"MODELSTORE_VOLUME": "full", "RUNPOD_POD_ID": f"worker-{seeder}"}
        seeders.append(
            subprocess.Popen(
                command("seed", "org/name", "--quiet", "--json"),
                env=env, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    downloads, problems = 0, []
    for seeder in seeders:
        try:
            out, err = seeder.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            seeder.kill()
            out, err = seeder.communicate()
        if seeder.returncode:
            problems.append(f"a seeder failed: {err[-500:]}")
        else:
            downloads += json.loads(out)["status"] in ("downloaded", "resumed")
    for mount in (volume.first, volume.second):
        env = os.environ | {"MODELSTORE_ROOT": f"{mount}/round-{number}/modelstore", "MODELSTORE_VOLUME": "read-only"}
        for _look in range(_LOOKS):
            done = subprocess.run(command("verify", "--json"), env=env, cwd=HERE, capture_output=True, text=True)
            if done.returncode == 0 and json.loads(done.stdout):
                break
            time.sleep(1)
        else:
            problems.append(f"{mount.name} sees no whole snapshot: {done.stdout[-500:]}{done.stderr[-300:]}")
    return downloads, problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    if reason := why_not(options.kind):
        parser.error(reason)
    problems: list[str] = []
    twice, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder, running_hub(Path(folder)) as hub:
        write_repo(Path(folder) / "org" / "name", random_tensors(4, (256, 256)), shards=2)
        for first in range(0, options.rounds, _ROUNDS_OF_A_VOLUME):
            with mounted(options.kind) as volume:
                for number in range(first, min(first + _ROUNDS_OF_A_VOLUME, options.rounds)):
                    downloads, found = one_round(volume, hub.url, number)
                    twice += downloads > 1
                    problems += found
                    if found:
                        print(f"round {number + 1}:", *found, sep="\n", flush=True)
            print(f"{number + 1} rounds, {len(problems)} problems", flush=True)
    print(
        f"{options.kind}: {options.rounds} rounds of {SEEDERS} seeders in {time.monotonic() - began:.0f} s: "
        f"{len(problems)} problems; in {twice} rounds more than one downloaded"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
