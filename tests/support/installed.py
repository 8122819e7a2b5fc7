"""A Python that lacks what an extra of this project does not bring: for tests of an image's environment."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

PYPROJECT = Path(__file__).parent.parent.parent / "pyproject.toml"


def environment_of(extras: Iterable[str], folder: Path) -> tuple[str, dict[str, str]]:
    """An interpreter, and the variables with which it imports what an installation with `extras` brings, and nothing
    else: `folder` gets links to those packages of this environment."""
    for name in brought_by(extras):
        try:
            files = distribution(name).files or []
        except PackageNotFoundError:  # for another system
            continue
        for file in files:
            top = file.parts[0]
            link = folder / top
            if top not in ("..", "__pycache__") and not link.is_symlink():
                link.symlink_to(Path(str(file.locate())).parents[len(file.parts) - 1] / top)
    return sys._base_executable, {"PYTHONPATH": f"{folder}:{PYPROJECT.parent}", "PYTHONNOUSERSITE": "1"}


def brought_by(extras: Iterable[str]) -> set[str]:
    """The distributions that an installation of this project with `extras` brings."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    optional = project["optional-dependencies"]
    waiting = [
        Requirement(text) for text in [*project["dependencies"], *(t for extra in extras for t in optional[extra])]
    ]
    seen = set()
    while waiting:
        requirement = waiting.pop()
        for extra in ("", *requirement.extras):
            if (requirement.name, extra) in seen:
                continue
            seen.add((requirement.name, extra))
            try:
                needed = map(Requirement, distribution(requirement.name).requires or [])
            except PackageNotFoundError:  # for another system
                continue
            waiting += [each for each in needed if each.marker is None or each.marker.evaluate({"extra": extra})]
    return {name for name, _extra in seen}
