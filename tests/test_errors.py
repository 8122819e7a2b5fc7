"""The error tree is whole: every error of the package is in it, and none is the bare root."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from modelstore import errors

ROOT = Path(__file__).parent.parent
FILES = [path for package in ("modelstore", "handler", "scripts") for path in sorted((ROOT / package).rglob("*.py"))]
BUILTIN = {"BaseException", "Exception", "ValueError", "LookupError", "TimeoutError", "RuntimeError", "OSError"}
# A job's errors end one job with an answer, and no start and no command; the fourth is no error: it unwinds a build; the
# last three are of scripts.
OUTSIDE = {"JobError", "TemplateError", "TemplateTimeout", "_ValueNeeded", "InUse", "NoAnswer", "SeedFailed"} | {
    "Unreachable"
}


def classes() -> dict[str, set[str]]:
    """The classes of the repository with the names of their bases."""
    found: dict[str, set[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found[node.name] = {base.id for base in node.bases if isinstance(base, ast.Name)}
    return found


def test_every_error_is_in_the_tree_or_ends_a_job() -> None:
    bases = classes()
    known = BUILTIN | set(errors.__all__)
    ours = {name for name, parents in bases.items() if parents & known}
    assert ours == set(errors.__all__) | OUTSIDE


def test_the_tree_is_drawn_in_full() -> None:
    drawn = set((errors.__doc__ or "").split())
    assert set(errors.__all__) <= drawn


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_bare_root_is_never_raised(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            assert node.exc.func.id not in ("ModelStoreError", "Exception"), f"{path}:{node.lineno}"
