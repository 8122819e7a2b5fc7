"""The files of a repo that a snapshot needs: those that its natural loader would open, and nothing twice.

Which weights a folder has, in the order of `from_pretrained`: the file that `transformers_weights` in its config names;
`model.safetensors`; the shards of its index; the same as a variant such as `.fp16.`; then pickles, if they are allowed;
then names of other loaders (`_by_other_names`). In a pipeline of diffusers a variant in the storage dtype goes first,
because the plain files are twice as large. `components.py` tells the folders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from modelstore.errors import BadSafetensors
from modelstore.fill.components import PIPELINE_INDEX, Component, ReadFile, components
from modelstore.fill.repo_files import (
    folder_of,
    is_foreign_weights,
    is_licence,
    is_pickle,
    is_small,
    join,
    parse_object,
    stored_path,
    variant_of,
)
from modelstore.fill.source import SourceFile
from modelstore.fill.storage_policy import QUANTIZATION_FILES
from modelstore.fill.unservable import missing_weights
from modelstore.volume.layout import check_file_name, check_file_names

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's
_SAFETENSORS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_PICKLES = ("pytorch_model.bin", "diffusion_pytorch_model.bin")
_EXPLICIT = "transformers_weights"
_SHARD = re.compile(r"model-\d+-of-(?P<count>\d+)\.safetensors")
_EXTRA_FOLDERS = ("additional_chat_templates",)
_VARIANTS_FIRST = ("", "fp32", "fp16", "bf16")  # of those that a repo has, if none is preferred


@dataclass(frozen=True, slots=True)
class Selection:
    """The files of one snapshot; `indexes` maps the path of each index to its `weight_map`."""

    small: tuple[SourceFile, ...]
    weights: tuple[SourceFile, ...]
    indexes: Mapping[str, Mapping[str, str]]

    def __post_init__(self) -> None:
        check_file_names(stored_path(file.path) for file in (*self.small, *self.weights))

    @property
    def paths(self) -> frozenset[str]:
        """The names under which the files are stored."""
        return frozenset(stored_path(file.path) for file in (*self.small, *self.weights))

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in (*self.small, *self.weights))


@dataclass(frozen=True, slots=True)
class _Weights:
    """The weights of one folder; `index` lists them if they are shards."""

    files: tuple[SourceFile, ...]
    index: SourceFile | None = None
    weight_map: Mapping[str, str] | None = None


def select_files(
    files: tuple[SourceFile, ...],
    read: ReadFile,
    *,
    repo_id: str,
    pickles: bool = False,
    code: bool = False,
    variant: str = "",
    adapter: bool = False,
) -> Selection:
    """Choose a snapshot's files; `read` gives the bytes of a small one. `pickles`, `code`: whether they are allowed;
    `variant`: the infix of a pipeline's own files that are preferred, such as `fp16`; `adapter`: whether the repo of an
    adapter will do.

    Raises NoWeights or PickleRefused if a folder that has weights lacks safetensors, UnsafeName for a name that leaves
    the folder, and BadSafetensors for an index that names files the repo does not have.
    """
    by_path = {file.path: file for file in files}
    for path in by_path:
        if path.startswith(("/", "\\")) or ".." in path.replace("\\", "/").split("/") or "\0" in path:
            check_file_name(path)
    small: list[SourceFile] = []
    weights: list[SourceFile] = []
    indexes: dict[str, Mapping[str, str]] = {}
    parts = components(by_path, read)
    for part in parts:
        in_folder = {path: file for path, file in by_path.items() if folder_of(path) == part.folder}
        small += _small_files(in_folder.values(), code=code)
        if not part.has_weights:
            continue
        preferred = variant if part.named_by == PIPELINE_INDEX else ""
        chosen = _weights_of(part, in_folder, read, preferred=preferred, pickles=pickles)
        if chosen is None and adapter and ADAPTER_CONFIG in in_folder and ADAPTER_WEIGHTS in in_folder:
            chosen = _Weights((in_folder[ADAPTER_WEIGHTS],))
        if chosen is None:
            convertible = _weights_of(part, in_folder, read, preferred=preferred, pickles=True) is not None
            raise missing_weights(part, by_path, read, repo_id=repo_id, convertible=convertible)
        weights += chosen.files
        if chosen.index is not None and chosen.weight_map is not None:
            small.append(chosen.index)
            indexes[chosen.index.path] = chosen.weight_map
    for folder in _EXTRA_FOLDERS:
        small += _small_files((file for file in files if folder_of(file.path) == folder), code=False)
    if not weights:
        raise missing_weights(parts[0], by_path, read, repo_id=repo_id, convertible=False)
    return Selection(tuple(small), tuple(weights), indexes)


def _small_files(files: Iterable[SourceFile], *, code: bool) -> Iterator[SourceFile]:
    """The small files of a folder; of licences whose names differ only in case, one."""
    licences: set[str] = set()
    for file in files:
        if is_licence(file.path):
            if file.path.lower() in licences:
                continue
            licences.add(file.path.lower())
        if is_small(file) or (code and file.path.endswith(".py")):
            yield file


def _weights_of(
    part: Component, in_folder: Mapping[str, SourceFile], read: ReadFile, *, preferred: str, pickles: bool
) -> _Weights | None:
    """The weights of a folder; None if it has none that may be stored."""
    if (named := _named_in_config(part.folder, in_folder, read)) is not None:
        return _listed(named, in_folder, read) if named.path.endswith(".json") else _Weights((named,))
    for variant in _variants(in_folder, preferred):
        for name in _SAFETENSORS:
            if (weights := _under(join(part.folder, name), variant, in_folder, read)) is not None:
                return weights
    for variant in _variants(in_folder, preferred):
        for name in _PICKLES:
            if (weights := _under(join(part.folder, name), variant, in_folder, read)) is not None:
                return weights if pickles else None
    return None if part.named_by else _by_other_names(in_folder)


def _by_other_names(files: Mapping[str, SourceFile]) -> _Weights | None:
    """Weights at a repo's root that transformers does not find by their names, and other loaders do: all shards of a
    model without an index, Mistral's own layout, and the names that GPTQ's tools give; None for anything else."""
    paths = [path for path in files if path.endswith(".safetensors") and not is_foreign_weights(path)]
    shards = [path for path in paths if _SHARD.fullmatch(path)]
    count = {int(match["count"]) for path in shards if (match := _SHARD.fullmatch(path))}
    if "config.json" in files and shards and count == {len(shards)}:
        return _Weights(tuple(files[path] for path in shards))
    if "params.json" in files:
        paths = [path for path in paths if path.startswith("consolidated")]
    elif not files.keys() & QUANTIZATION_FILES and not any("gptq" in path.lower() for path in paths):
        paths = []
    return _Weights(tuple(files[path] for path in paths)) if paths else None


def _named_in_config(folder: str, in_folder: Mapping[str, SourceFile], read: ReadFile) -> SourceFile | None:
    """The file that `transformers_weights` in the folder's config names; None if there is no such key."""
    path = join(folder, "config.json")
    name = parse_object(read(in_folder[path]), path).get(_EXPLICIT) if path in in_folder else None
    if name is None:
        return None
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise BadSafetensors(f"{path} gives {_EXPLICIT} {name!r}, which is no safetensors file: name another revision")
    check_file_name(name)
    file = in_folder.get(join(folder, name))
    if file is None:
        raise BadSafetensors(
            f"{path} gives {_EXPLICIT} {name[:120]!r}, which is not beside it in the repo: name another revision"
        )
    return file


def _variants(in_folder: Mapping[str, SourceFile], preferred: str) -> list[str]:
    """The variants of the weights in a folder, in the order in which they are taken; the plain ones are empty."""
    order = [preferred, *_VARIANTS_FIRST] if preferred else list(_VARIANTS_FIRST)
    return order + sorted({variant_of(path) for path in in_folder} - set(order))


def _under(plain: str, variant: str, in_folder: Mapping[str, SourceFile], read: ReadFile) -> _Weights | None:
    """The weights that go by the path `plain` in the folder, in one file or in shards, as this variant."""
    stem, _dot, suffix = plain.rpartition(".")
    single = in_folder.get(f"{stem}.{variant}.{suffix}" if variant else plain)
    if single is not None:
        return _Weights((single,))
    names = [f"{plain}.index.{variant}.json", f"{plain}.{variant}.index.json"] if variant else [f"{plain}.index.json"]
    index = next((in_folder[name] for name in names if name in in_folder), None)
    return _listed(index, in_folder, read) if index is not None else None


def _listed(index: SourceFile, in_folder: Mapping[str, SourceFile], read: ReadFile) -> _Weights:
    """The shards of an index. Raises BadSafetensors if it names files that are not beside it."""
    weight_map = parse_object(read(index), index.path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise BadSafetensors(f"{index.path} has no usable weight_map: the repo is damaged, name another revision")
    shards = [_shard(in_folder, shard, index.path) for shard in sorted(set(weight_map.values()))]
    return _Weights(tuple(shards), index, weight_map)


def _shard(in_folder: Mapping[str, SourceFile], name: str, index: str) -> SourceFile:
    check_file_name(name)
    if "/" in name:
        raise BadSafetensors(
            f"{index} places weights in the sub-folder {name[:120]!r}: name a repo with shards beside it"
        )
    file = in_folder.get(join(folder_of(index), name))
    if file is None or not (name.endswith(".safetensors") or (is_pickle(name) and ".bin.index" in index)):
        raise BadSafetensors(f"{index} names {name[:120]!r}, which the repo does not have: name another revision")
    return file
