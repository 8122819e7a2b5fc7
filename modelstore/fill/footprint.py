"""What a download will take, before it is begun: from the source's list of files and the config, nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelstore.dtypes import DTYPES, Dtype
from modelstore.fill.convert import storage_policy
from modelstore.fill.selection import select_files
from modelstore.fill.source import Resolved, Source
from modelstore.settings import Settings


@dataclass(frozen=True, slots=True)
class Estimate:
    """In bytes: what comes over the network, and what the snapshot takes once it is stored."""

    files: int
    download_bytes: int
    stored_bytes: int


def estimate(source: Source, resolved: Resolved, dtype: Dtype, settings: Settings, *, code: bool) -> Estimate:
    """What a snapshot of this commit will take, with its Python files if `code`.

    Raises what choosing its files does: NoWeights, Refused, and so on.
    """
    selection = select_files(
        source.list_files(resolved),
        lambda file: source.read(resolved, file),
        repo_id=resolved.repo_id,
        pickles=settings.allow_pickle,
        code=code,
        variant=DTYPES[dtype].file_variant,
    )
    parts = [(*file.path.rpartition("/")[::2], file) for file in selection.small]
    configs = {folder: file for folder, name, file in parts if name == "config.json"}
    stored = sum(file.size_bytes for file in selection.small)
    ratios: dict[str, float] = {}
    for file in selection.weights:
        folder = file.path.rpartition("/")[0]
        if folder not in ratios:
            config = _config(source.read(resolved, configs[folder])) if folder in configs else {}
            ratios[folder] = stored_ratio(
                config, dtype, unchanged=bool(storage_policy(dtype, config).unchanged_because)
            )
        stored += int(file.size_bytes * (ratios[folder] or 1))
    download = selection.size_bytes if source.over_network else 0
    return Estimate(len(selection.small) + len(selection.weights), download, stored)


def stored_ratio(config: Mapping[str, Any], dtype: Dtype, *, unchanged: bool) -> float:
    """Stored bytes for each byte of the original's weights, by the dtype that the config names; 0 where they are stored
    as they come."""
    before = named_dtype(config)
    if unchanged or before == dtype:
        return 0.0
    width, stored = (DTYPES[name].width_bytes if name in DTYPES else 0 for name in (before, dtype))
    return stored / (width or min(stored, 2))


def named_dtype(config: Mapping[str, Any]) -> str:
    """The dtype of a checkpoint's weights, as its config has it."""
    return str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")


def _config(data: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
