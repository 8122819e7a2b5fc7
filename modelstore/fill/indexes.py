"""The index of a sharded checkpoint: the file of each tensor, and the size of all of them. No I/O."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from modelstore import model_types
from modelstore.errors import BadSafetensors
from modelstore.fill.repo_files import parse_json, stored_path
from modelstore.volume.header import Header


def absent_tensors(
    path: str, weight_map: Mapping[str, str], shards: Mapping[str, Header], config: Mapping[str, Any]
) -> frozenset[str]:
    """The tensors that the index at `path` names and no shard holds, because they are another weight's second name.

    `shards`: the headers of the files beside it by their paths in the snapshot, as they were before a conversion or
    after it; only the names of their tensors count. `config`: the model's, which says whether weights are tied. Raises
    BadSafetensors for another tensor that is not in the file which the index names for it.
    """
    names_by_shard = {}
    for shard in set(weight_map.values()):
        header = shards[stored_path(str(PurePosixPath(path).with_name(shard)))]
        names_by_shard[shard] = {tensor.name for tensor in header.tensors}
    present = frozenset().union(*names_by_shard.values())
    types = {name for name in model_types.model_types(config) if model_types.is_known(name)}
    absent = set()
    for tensor, shard in weight_map.items():
        if tensor in names_by_shard[shard]:
            continue
        is_output = ".embed_tokens." not in f".{tensor}"
        is_untied = is_output and config.get("tie_word_embeddings") is False
        if tensor in present or is_untied or not model_types.is_tied(tensor, types):
            raise BadSafetensors(
                f"{path} places {tensor[:80]!r} in {shard}, which does not hold it: name another revision"
            )
        absent.add(tensor)
    return frozenset(absent)


def index_without(data: bytes, tensors: frozenset[str], *, where: str) -> bytes:
    """The index without these tensors."""
    if not tensors:
        return data
    index = parse_json(data, where)
    weight_map = {tensor: shard for tensor, shard in index["weight_map"].items() if tensor not in tensors}
    return _encoded({**index, "weight_map": weight_map})


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
