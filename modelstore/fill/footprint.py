"""The sizes of a fill: over the network, once it is stored, and on the volume while it is under way."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelstore.dtypes import DTYPES
from modelstore.fill.repo_files import folder_of, is_pickle
from modelstore.fill.selection import Selection
from modelstore.fill.storage_policy import StoragePolicy


@dataclass(frozen=True, slots=True)
class Footprint:
    """Sizes in bytes. `weights`: by file, the stored bytes, and the bytes beside them while the file is in work."""

    files: int
    small_bytes: int
    source_bytes: int
    weights: Mapping[str, tuple[int, int]]

    @property
    def weights_bytes(self) -> int:
        """All stored weights."""
        return sum(stored for stored, _beside in self.weights.values())

    @property
    def stored_bytes(self) -> int:
        """The snapshot."""
        return self.small_bytes + self.weights_bytes

    @property
    def peak_bytes(self) -> int:
        """The snapshot and its staging at their largest."""
        return self.small_bytes + DiskBudget(self.weights).limit


def footprint_of(
    selection: Selection,
    configs: Mapping[str, Mapping[str, Any]],
    policies: Mapping[str, StoragePolicy],
    *,
    compressed: bool = False,
) -> Footprint:
    """The footprint of the selected files; `configs` and `policies` by the folder of the weights beside them. Of
    `compressed` weights it is an upper bound."""
    weights = {}
    for file in selection.weights:
        folder = folder_of(file.path)
        ratio = stored_ratio(configs[folder], policies[folder])
        extra = file.size_bytes if ratio or compressed else 0
        if is_pickle(file.path):  # its tensors lie there once more, as safetensors, before they are converted
            extra = 2 * file.size_bytes
        weights[file.path] = (int(file.size_bytes * (ratio or 1)), extra)
    small_bytes = sum(file.size_bytes for file in selection.small)
    return Footprint(len(selection.small) + len(selection.weights), small_bytes, selection.size_bytes, weights)


def stored_ratio(config: Mapping[str, Any], policy: StoragePolicy) -> float:
    """Stored bytes for each byte of the original's weights, by the dtype that the config names; 0 if they are stored as
    they come."""
    before = named_dtype(config)
    if policy.unchanged_because or before == policy.dtype:
        return 0.0
    width, stored = (DTYPES[name].width_bytes if name in DTYPES else 0 for name in (before, policy.dtype))
    return stored / (width or min(stored, 2))


def named_dtype(config: Mapping[str, Any]) -> str:
    """The dtype of a checkpoint's weights, as its config has it."""
    return str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")


class DiskBudget:
    """Keeps the bytes of a fill on the volume within `limit`: all stored files, and once the largest original.

    `sizes`: see `Footprint.weights`.
    """

    def __init__(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        self.limit = sum(stored for stored, _ in sizes.values()) + max(
            (extra for _, extra in sizes.values()), default=0
        )
        self._sizes = sizes
        self._taken = 0
        self._in_work: set[str] = set()
        self._lock = threading.Lock()

    def needs_nothing_beside(self, path: str) -> bool:
        """Whether a weights file is stored as it comes; False for other files."""
        return path in self._sizes and self._sizes[path][1] == 0

    def begin(self, path: str) -> bool:
        """Count a file as in work; False if it has to wait until another one has ended."""
        size_bytes = sum(self._sizes[path])
        with self._lock:
            if self._in_work and self._taken + size_bytes > self.limit:
                return False
            self._in_work.add(path)
            self._taken += size_bytes
            return True

    def end(self, path: str) -> None:
        """The file is stored, and nothing else of it is left."""
        with self._lock:
            self._in_work.discard(path)
            self._taken -= self._sizes[path][1]

    def count_finished(self, path: str) -> None:
        """Count a file that is stored already."""
        self.begin(path)
        self.end(path)
