#!/usr/bin/env python3
"""What each kind of volume can do, as `modelstore doctor` finds it with one mount and with two. As root, with FUSE.

    python scripts/dev/volume_matrix.py [KIND...] [--write DOCUMENT]

Real mounts: those of `tests/support/mounts.py`, and MooseFS on two hosts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HERE))

from modelstore.bench.race import environment
from modelstore.operate.doctor import diagnose
from modelstore.settings import Settings
from modelstore.volume.capabilities import MEANINGS
from scripts.bench.sections import write_section
from tests.support.moosefs import MooseFS
from tests.support.mounts import KINDS, mounted

Mounts = tuple[Path, Path]


@contextmanager
def moosefs() -> Iterator[Mounts]:
    with MooseFS.running(hosts=2) as running:
        yield running.hosts[0].mount, running.hosts[1].mount


@contextmanager
def other(kind: str) -> Iterator[Mounts]:
    with mounted(kind) as volume:
        yield volume.first, volume.second


def answers(root: Path, peer: Path | None) -> dict[str, str]:
    """What the doctor says of each capability, and the mode."""
    words = {"ok": "yes", "warning": "no", "error": "no"}
    found = {}
    for check in diagnose(Settings(root=root, offline=True), peer=peer, probe_bytes=1 << 20):
        found[check.check] = "?" if check.what.startswith("not proven") else words[check.level]
        if check.check == "mode":
            found["mode"] = check.what.partition(":")[0] if ":" in check.what else "proven: full by setting"
    return found


def row(kind: str, mounts: Callable[[], AbstractContextManager[Mounts]]) -> str:
    with mounts() as (first, second):
        root = first / "modelstore"
        alone, together = answers(root, None), answers(root, second / "modelstore")
    cells = [f"{alone.get(name, '-')} / {together.get(name, '-')}" for name in (n.replace("_", " ") for n in MEANINGS)]
    return f"| {kind} | {' | '.join(cells)} | {alone['mode']} | {together['mode']} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", default=["MooseFS", *KINDS])
    parser.add_argument("--write", type=Path, help="the document whose section by this script is replaced")
    options = parser.parse_args()
    names = [name.replace("_", " ") for name in MEANINGS]
    lines = [
        "Measured by `python scripts/dev/volume_matrix.py`; one mount / two mounts, `?`: not proven.",
        f"{environment(HERE)}.",
        "",
        f"| volume | {' | '.join(names)} | mode | mode with `--peer` |",
        f"|---|{'---|' * len(names)}---|---|",
    ]
    for kind in options.kinds:
        lines.append(row(kind, moosefs if kind == "MooseFS" else partial(other, kind)))
        print(lines[-1], flush=True)
    text = "\n".join(lines)
    print(text)
    if options.write:
        write_section(options.write, "dev/volume_matrix.py", text)


if __name__ == "__main__":
    main()
