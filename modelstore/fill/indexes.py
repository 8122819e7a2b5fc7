"""The index of a sharded checkpoint: the file of each tensor, and the size of all of them. No I/O."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from modelstore import model_types
from modelstore.errors import BadSafetensors
from modelstore.fill.repo_files import parse_json, stored_path
from modelstore.volume.header import Header

_OLD_BUFFER = re.compile(r"(^|\.)(inv_freq|position_ids|token_type_ids|masked_bias|cos_cached|sin_cached)$")


def misplaced_tensors(
    path: str, weight_map: Mapping[str, str], shards: Mapping[str, Header], config: Mapping[str, Any]
) -> dict[str, str | None]:
    """The tensors that the index at `path` places in a shard which does not hold them, as transformers never looks, and
    the shard that does; None if none does, because they are another weight's second name, or buffers of old versions.

    `shards`: the headers of the files beside it by their paths in the snapshot, as they were before a conversion or
    after it; only the names of their tensors count. `config`: the model's, which says whether weights are tied. Raises
    BadSafetensors for another tensor that no shard holds.
    """
    shard_of: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        header = shards[stored_path(str(PurePosixPath(path).with_name(shard)))]
        for tensor in header.tensors:
            if tensor.name not in shard_of or weight_map.get(tensor.name) == shard:
                shard_of[tensor.name] = shard
    types = {name for name in model_types.model_types(config) if model_types.is_known(name)}
    misplaced: dict[str, str | None] = {}
    for name, shard in weight_map.items():
        actual = shard_of.get(name)
        if actual == shard:
            continue
        is_output = ".embed_tokens." not in f".{name}"
        is_tied = model_types.is_tied(name, types) and not (is_output and config.get("tie_word_embeddings") is False)
        is_buffer = _OLD_BUFFER.search(name) is not None and model_types.is_unloaded(name, types)
        if actual is None and not is_tied and not is_buffer:
            raise BadSafetensors(
                f"{path} places {name[:80]!r} in {shard}, which does not hold it: name another revision"
            )
        misplaced[name] = actual
    return misplaced


def index_with_places(data: bytes, places: Mapping[str, str | None], *, where: str) -> bytes:
    """The index with these tensors in these shards; None leaves a tensor out."""
    if not places:
        return data
    index = parse_json(data, where)
    corrected = {tensor: places.get(tensor, shard) for tensor, shard in index["weight_map"].items()}
    weight_map = {tensor: shard for tensor, shard in corrected.items() if shard is not None}
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
