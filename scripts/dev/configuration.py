#!/usr/bin/env python3
"""Write the tables of docs/configuration.md and of worker-vllm's variables in docs/migrate.md from the settings:

python scripts/dev/configuration.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HERE))

from modelstore.settings import FIELDS
from modelstore.worker_vllm import VARIABLES

PAGE = HERE / "docs" / "configuration.md"
MIGRATION_PAGE = HERE / "docs" / "migrate.md"
_TABLE = re.compile(r"(?<=<!-- settings -->\n).*?(?=<!-- /settings -->)", re.DOTALL)
_VARIABLES = re.compile(r"(?<=<!-- worker-vllm -->\n).*?(?=<!-- /worker-vllm -->)", re.DOTALL)


def table() -> str:
    """The settings as a Markdown table."""
    rows = [f"| `{f.variable}` | {f'`{f.default}`' if f.default else ''} | {f.meaning} |" for f in FIELDS]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows, ""])


def worker_vllm_table() -> str:
    """The variables of worker-vllm as a Markdown table: those with the same name here, then the others."""
    rows = []
    for name, variable in sorted(VARIABLES.items(), key=lambda item: (item[1].becomes, item[0])):
        match variable.becomes:
            case "option" | "switch":
                meaning = f"`{variable.name}`"
            case "setting":
                meaning = "the same" if variable.name == name else f"`{variable.name}`"
            case _:
                meaning = f"no effect: {variable.reason}"
        rows.append(f"| `{name}` | {meaning} |")
    return "\n".join(["| worker-vllm | here |", "|---|---|", *rows, ""])


if __name__ == "__main__":
    PAGE.write_text(_TABLE.sub(lambda _match: table(), PAGE.read_text(), count=1))
    MIGRATION_PAGE.write_text(_VARIABLES.sub(lambda _match: worker_vllm_table(), MIGRATION_PAGE.read_text(), count=1))
