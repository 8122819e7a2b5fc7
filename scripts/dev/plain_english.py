#!/usr/bin/env python3
"""Count words that make prose and names hard to read: `python scripts/dev/plain_english.py [PATH …]`.

For each path, a folder of Python or Markdown: how many of 1,000 words of docstrings, comments and pages are
"where" (often an "if"), "what" (often the noun is missing), or whoever and its kin; and how many of 1,000 identifiers
say nothing of what they hold. CONTRIBUTING says how we write. These are figures to look at, not a gate.
"""

from __future__ import annotations

import ast
import io
import keyword
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

PROSE = {
    "where": {"where"},
    "what": {"what", "whatever"},
    "who": {"whoever", "who", "nobody", "somebody", "anybody"},
    "if": {"if"},
}
VAGUE = {
    *("found", "wanted", "one", "said", "what", "held", "there", "taken", "gone", "beside", "early", "meanwhile"),
    *("here", "more", "most", "rest", "ours", "theirs", "own", "done", "seen", "left", "told", "asked", "given"),
    "begun",
}
DEFAULT = ("modelstore", "handler", "docs")


def prose_of(path: Path) -> str:
    """A page's text without code, or a module's docstrings and comments."""
    text = path.read_text()
    if path.suffix == ".md":
        return re.sub(r"```.*?```|`[^`]*`|<!--.*?-->", " ", text, flags=re.DOTALL)
    nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Module | ast.ClassDef | _FUNCTION))
    comments = (
        token.string for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT
    )
    return re.sub(r"`[^`]*`", " ", "\n".join([*(ast.get_docstring(node) or "" for node in nodes), *comments]))


_FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def names_of(path: Path) -> list[str]:
    """The identifiers of a module, each as often as it stands there."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return [token.string for token in tokens if token.type == tokenize.NAME and not keyword.iskeyword(token.string)]


def row(folder: Path) -> str:
    """The figures of one folder."""
    words: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for path in sorted(folder.rglob("*.py")) + sorted(folder.rglob("*.md")):
        words.update(re.findall(r"[a-z]+", prose_of(path).lower()))
        if path.suffix == ".py":
            names.update(names_of(path))
    count = sum(words.values()) or 1
    shares = [sum(words[word] for word in group) * 1000 / count for group in PROSE.values()]
    vague = sum(names[name] for name in VAGUE) * 1000 / (sum(names.values()) or 1)
    return f"{folder!s:<12} {count:>6} " + " ".join(f"{share:>6.1f}" for share in shares) + f" {vague:>6.1f}"


def main() -> int:
    print(f"{'of 1,000':<12} {'words':>6} " + " ".join(f"{name:>6}" for name in PROSE) + f" {'vague':>6}")
    for folder in sys.argv[1:] or DEFAULT:
        print(row(Path(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
