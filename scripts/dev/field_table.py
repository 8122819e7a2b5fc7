#!/usr/bin/env python3
"""Write the table of fields in docs/client.md from the code: `python scripts/dev/field_table.py`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HERE))

from handler.fields import FIELDS, Field  # noqa: E402

PAGE = HERE / "docs" / "client.md"
_TABLE = re.compile(r"(?<=<!-- fields -->\n).*?(?=<!-- /fields -->)", re.DOTALL)
_ROUTES = {"native": "native", "chat/completions": "chat", "completions": "completions"}
_TEXT = {"served": "served", "harmless": "no effect", "refused": "refused"}


def in_vllm(field: Field) -> str:
    """What becomes of a field in the vLLM engine."""
    if field.by_worker:
        return "served"
    if field.text == "harmless":
        return "passed on, or no effect"
    return "refused" if field.replaced else "passed on"


def table() -> str:
    """The fields as a Markdown table."""
    rows = []
    for name, field in FIELDS.items():
        routes = "all" if len(field.routes) == len(_ROUTES) else ", ".join(_ROUTES[route] for route in field.routes)
        neutral = f"; only `{'`, `'.join(map(json.dumps, field.neutral))}` is taken" if field.neutral else ""
        meaning = "; ".join(filter(None, (field.note, field.instead)))
        rows.append(f"| `{name}` | {routes} | {_TEXT[field.text]}{neutral} | {in_vllm(field)} | {meaning} |")
    return "\n".join(["| field | routes | `text` | `vllm` | meaning |", "|---|---|---|---|---|", *rows, ""])


if __name__ == "__main__":
    PAGE.write_text(_TABLE.sub(lambda _match: table(), PAGE.read_text(), count=1))
