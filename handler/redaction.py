"""Texts for a job's author, without the paths of the volume, whose layout is none of their business."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


class VolumePaths:
    """Takes the paths below the store's volume out of texts."""

    def __init__(self, root: Path) -> None:
        """`root`: the store's folder."""
        folders = sorted({str(root), str(root.parent)} - {"/"}, key=len, reverse=True)
        self._paths = re.compile(rf"(?:file://)?(?:{'|'.join(map(re.escape, folders))})(?:/[^\s'\":,;()]*)?")

    def hidden_in(self, value: Any) -> Any:
        """`value`, a text or a record of them, with `<volume>` in the place of each path."""
        if isinstance(value, dict):
            return {name: self.hidden_in(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self.hidden_in(each) for each in value]
        return self._paths.sub("<volume>", value) if isinstance(value, str) else value
