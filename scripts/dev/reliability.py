#!/usr/bin/env python3
"""Run the tests that break things, and write their figures: `python scripts/dev/reliability.py [--write FILE]`.

Needs root, FUSE and MooseFS for all of it; without them the rows of MooseFS are missing, and it says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HERE))

from scripts.bench.sections import write_section

TESTS = [
    "tests/system/test_crash.py",
    "tests/system/test_overlap.py",
    "tests/system/test_moosefs.py",
    "tests/system/test_processes.py",
    "tests/volume/test_verify.py",
    "tests/fill/test_compressed.py",
    "tests/volume/test_planes.py",
    "tests/test_warmstart.py",
    "tests/system/test_volumes.py",
    "tests/system/test_hostile.py",
    "tests/volume/test_header.py",
]


def environment() -> str:
    from tests.support.moosefs import why_not

    moosefs = "no MooseFS"
    if not why_not():
        package = subprocess.run(
            ["dpkg-query", "-W", "-f", "${Version}", "moosefs-master"], capture_output=True, text=True, check=False
        )
        moosefs = f"MooseFS {package.stdout or 'of unknown version'} with one chunkserver on the same machine"
    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, Linux {platform.release()}, Python "
        f"{platform.python_version()}, filelock {version('filelock')}, {moosefs}"
    )


def table(rows: list[dict[str, object]]) -> str:
    lines = []
    for promise in dict.fromkeys(row["promise"] for row in rows):
        lines += [f"**{promise}**", "", "| fault | place | tried | survived | | test |", "|---|---|---|---|---|---|"]
        for row in rows:
            if row["promise"] == promise:
                name = str(row["test"]).replace("::", "`<br>`")
                cells = (
                    row["fault"],
                    row["where"],
                    f"{row['tried']:,}",
                    f"{row['survived']:,}",
                    row["figure"],
                    f"`{name}`",
                )
                lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, help="What a test run with RELIABILITY_RECORDS=FILE left; runs none.")
    parser.add_argument("--write", type=Path, help="Put the table into this file, between its marks.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        records, code = options.records or Path(folder) / "records", 0
        if not options.records:
            records.touch()
            command = [sys.executable, "-m", "pytest", "-q", *TESTS]
            env = os.environ | {"RELIABILITY_RECORDS": str(records)}
            code = subprocess.run(command, cwd=HERE, env=env, check=False).returncode
        rows = [json.loads(line) for line in records.read_text().splitlines()]
    rows.sort(key=lambda row: TESTS.index(str(row["test"]).partition("::")[0]))
    text = f"Measured by `python scripts/dev/reliability.py`:\n{environment()}.\n\n{table(rows)}"
    if not options.write:
        print(text)
    elif code == 0:
        write_section(options.write, "dev/reliability.py", text)
    return code


if __name__ == "__main__":
    sys.exit(main())
