"""The index of a sharded checkpoint: the file of each tensor, and the size of all of them. No I/O."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from modelstore.errors import BadSafetensors
from modelstore.fill.selection import parse_json, stored_path
from modelstore.volume.header import Header


def check_index(path: str, weight_map: Mapping[str, str], shards: Mapping[str, Header]) -> None:
    """Raise BadSafetensors if a tensor is not in the file that the index at `path` names for it.

    `shards`: the headers of the files beside it by their paths in the snapshot, as they were before a conversion or
    after it; only the names of their tensors count.
    """
    names_by_shard = {}
    for shard in set(weight_map.values()):
        header = shards[stored_path(str(PurePosixPath(path).with_name(shard)))]
        names_by_shard[shard] = {tensor.name for tensor in header.tensors}
    for tensor, shard in weight_map.items():
        if tensor not in names_by_shard[shard]:
            raise BadSafetensors(
                f"{path} places {tensor[:80]!r} in {shard}, which does not hold it: name another revision"
            )


def index_with_total_size(data: bytes, total_size: Callable[[], int], *, where: str) -> bytes:
    """The index with the bytes of all tensors corrected; as it is if that is right, or is not named at all."""
    index = parse_json(data, where)
    metadata = index.get("metadata")
    if not isinstance(metadata, dict) or "total_size" not in metadata:
        return data
    corrected = {**metadata, "total_size": total_size()}
    return data if corrected == metadata else _encoded({**index, "metadata": corrected})


def index_of_converted(index: Mapping[str, Any]) -> bytes:
    """The index of a checkpoint whose files are stored under other names, such as a pickled one."""
    weight_map = {tensor: stored_path(shard) for tensor, shard in index["weight_map"].items()}
    return _encoded({**index, "weight_map": weight_map})


def _encoded(index: Mapping[str, Any]) -> bytes:
    return json.dumps(index, indent=2).encode() + b"\n"
