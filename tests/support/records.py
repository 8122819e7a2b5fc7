"""The figures of a test, for the table of `docs/reliability.md` (`scripts/dev/reliability.py` collects them)."""

from __future__ import annotations

import json
import os
from pathlib import Path

LOCAL, MOOSEFS = "local", "MooseFS"
WRITTEN = "RELIABILITY_RECORDS" in os.environ


def record(promise: str, fault: str, *, tried: int, survived: int, where: str = LOCAL, figure: str = "") -> None:
    """Note one row; `promise` is the heading that it stands under. Does nothing but when the table is being made."""
    print(f"{fault}: {survived} of {tried} survived on {where}. {figure}")
    if path := os.environ.get("RELIABILITY_RECORDS"):
        test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0].split("[")[0]
        row = {
            "promise": promise,
            "fault": fault,
            "tried": tried,
            "survived": survived,
            "where": where,
            "figure": figure,
            "test": test,
        }
        with Path(path).open("a") as file:
            file.write(json.dumps(row) + "\n")
