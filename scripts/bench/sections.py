"""Documents whose figures are written by scripts: each has a section below a mark of its own."""

from __future__ import annotations

import re
from pathlib import Path


def write_section(document: Path, script: str, text: str) -> None:
    """Replace what stands below the mark of `script`, to the next mark or heading."""
    mark = f"<!-- scripts/{script}: everything below, to the next mark, is its output -->"
    before, rest = document.read_text().split(mark)
    after = re.split(r"(?m)^(?=## |<!-- scripts/)", rest, maxsplit=1)[1:]
    document.write_text("".join([before, mark, "\n\n", text.strip(), "\n", *(["\n", *after] if after else [])]))
