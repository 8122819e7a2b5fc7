"""Which of a repo's files a snapshot needs: what `from_pretrained` would open, and nothing twice.

Weights: `model.safetensors`, else the shards that `model.safetensors.index.json` names, else every safetensors file of
the folder. In a diffusers repo (`model_index.json`) and a sentence-transformers repo (`modules.json`) the same for each
folder that it names. Beside them the small files: configs, tokenizer, chat templates, generation config, licences.
Not: the same weights as `.bin`, `.h5`, `.msgpack`, `.onnx`, `.gguf`; code; training leftovers; pictures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from modelstore.errors import BadSafetensors, NoWeights, PickleRefused
from modelstore.layout import check_file_name, check_file_names
from modelstore.sources import SourceFile

_SMALL_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".bpe"})
_LICENCE = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)([-_.].*)?", re.IGNORECASE)
_FOREIGN = re.compile(r"(pytorch_model|tf_model|flax_model|consolidated|rust_model).*\.json|trainer_state\.json")
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_EXTRA_FOLDERS = ("additional_chat_templates",)
_MAX_SMALL_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Selection:
    """The files of one snapshot; `indexes` maps the path of each index to its `weight_map`."""

    small: tuple[SourceFile, ...]
    weights: tuple[SourceFile, ...]
    indexes: Mapping[str, Mapping[str, str]]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in (*self.small, *self.weights))


def select_files(files: tuple[SourceFile, ...], read: Callable[[SourceFile], bytes], *, repo_id: str) -> Selection:
    """Choose a snapshot's files; `read` gives the bytes of a small one.

    Raises NoWeights or PickleRefused where there are no safetensors, UnsafeName for a name that leaves the folder, and
    BadSafetensors for an index that names files the repo does not have.
    """
    by_path = {file.path: file for file in files}
    for path in by_path:
        if path.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", path) or "\0" in path:
            check_file_name(path)
    folders = ("", *_component_folders(by_path, read))
    small: list[SourceFile] = []
    weights: list[SourceFile] = []
    indexes: dict[str, Mapping[str, str]] = {}
    for folder in folders:
        here = [file for file in files if _folder_of(file.path) == folder]
        small += [file for file in here if _is_small(file)]
        index = by_path.get(_join(folder, _weights_name(here) + ".index.json"))
        single = by_path.get(_join(folder, _weights_name(here)))
        if single:
            weights.append(single)
            small = [file for file in small if file is not index]
        elif index:
            weight_map = _weight_map(index.path, read(index))
            indexes[index.path] = weight_map
            weights += [_shard(by_path, folder, name, index.path) for name in sorted(set(weight_map.values()))]
        else:
            weights += [file for file in here if file.path.endswith(".safetensors")]
    for folder in _EXTRA_FOLDERS:
        small += [file for file in files if _folder_of(file.path) == folder and _is_small(file)]
    if not weights:
        raise _no_weights(files, repo_id)
    check_file_names(file.path for file in (*small, *weights))
    return Selection(tuple(small), tuple(weights), indexes)


def _component_folders(by_path: Mapping[str, SourceFile], read: Callable[[SourceFile], bytes]) -> list[str]:
    """The sub-folders that a pipeline's or a sentence-transformer's own index names."""
    named: set[str] = set()
    if pipeline := by_path.get("model_index.json"):
        record = _parsed(pipeline.path, read(pipeline))
        if isinstance(record, dict):
            named |= {name for name, value in record.items() if isinstance(value, list)}
    if modules := by_path.get("modules.json"):
        record = _parsed(modules.path, read(modules))
        if isinstance(record, list):
            named |= {str(module["path"]) for module in record if isinstance(module, dict) and module.get("path")}
    return sorted(name for name in named if any(_folder_of(path) == name for path in by_path))


def _weights_name(here: list[SourceFile]) -> str:
    """The name that this folder's weights go by, single or before `.index.json`."""
    names = {PurePosixPath(file.path).name for file in here}
    for name in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
        if name in names or f"{name}.index.json" in names:
            return name
    return "model.safetensors"


def _weight_map(path: str, data: bytes) -> dict[str, str]:
    record = _parsed(path, data)
    weight_map = record.get("weight_map") if isinstance(record, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise BadSafetensors(f"{path} has no usable weight_map: the repo is damaged, name another revision")
    return weight_map


def _shard(by_path: Mapping[str, SourceFile], folder: str, name: str, index: str) -> SourceFile:
    check_file_name(name)
    if "/" in name:
        raise BadSafetensors(
            f"{index} places weights in the sub-folder {name[:120]!r}: name a repo with shards beside it"
        )
    file = by_path.get(_join(folder, name))
    if file is None or not name.endswith(".safetensors"):
        raise BadSafetensors(f"{index} names {name[:120]!r}, which the repo does not have: name another revision")
    return file


def _no_weights(files: tuple[SourceFile, ...], repo_id: str) -> NoWeights | PickleRefused:
    suffixes = {PurePosixPath(file.path).suffix for file in files}
    if suffixes & _PICKLES:
        return PickleRefused(
            f"{repo_id} has its weights only as pickles, which can run code when opened: "
            "use a revision or a repo with safetensors"
        )
    return NoWeights(f"{repo_id} has no safetensors weights: use a repo or a revision that has them")


def _is_small(file: SourceFile) -> bool:
    name = PurePosixPath(file.path)
    if name.name.startswith(".") or file.size_bytes > _MAX_SMALL_BYTES:
        return False
    if _LICENCE.fullmatch(name.name):
        return name.suffix not in {".py", ".sh"}
    return name.suffix in _SMALL_SUFFIXES and not _FOREIGN.fullmatch(name.name)


def _parsed(path: str, data: bytes) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSafetensors(f"{path} is not JSON ({error}): the repo is damaged, name another revision") from error


def _folder_of(path: str) -> str:
    return path.rpartition("/")[0]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
