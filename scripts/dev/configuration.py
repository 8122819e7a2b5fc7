#!/usr/bin/env python3
"""Write the table of docs/configuration.md from the settings: `python scripts/dev/configuration.py`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HERE))

from modelstore.settings import FIELDS  # noqa: E402

PAGE = HERE / "docs" / "configuration.md"
_TABLE = re.compile(r"(?<=<!-- settings -->\n).*?(?=<!-- /settings -->)", re.DOTALL)


def table() -> str:
    """The settings as a Markdown table."""
    rows = [f"| `{f.variable}` | {f'`{f.default}`' if f.default else ''} | {f.meaning} |" for f in FIELDS]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows, ""])


if __name__ == "__main__":
    PAGE.write_text(_TABLE.sub(lambda _match: table(), PAGE.read_text(), count=1))
