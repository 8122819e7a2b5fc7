"""The files of a repo that a snapshot needs: those that `from_pretrained` would open, and nothing twice.

Weights: `model.safetensors`, else the shards that `model.safetensors.index.json` names, else every safetensors file of
the folder. In a diffusers repo (`model_index.json`) and a sentence-transformers repo (`modules.json`) the same for each
folder that it names; if float16 is to be stored, a pipeline's own `.fp16.` files stand for the plain ones, which are
twice as large. Beside them the small files: configs, tokenizer, chat templates, generation config, licences. Not:
the same weights as `.bin`, `.h5`, `.msgpack`, `.onnx`, `.gguf`; code; training leftovers; pictures. With permission
pickles stand in for safetensors that a folder lacks, and a repo's Python files come along.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from modelstore.dtypes import DTYPES
from modelstore.errors import BadSafetensors, NoWeights, PickleRefused
from modelstore.fill.source import SourceFile
from modelstore.volume.layout import check_file_name, check_file_names

_SMALL_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".bpe"})
_LICENCE = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)([-_.].*)?", re.IGNORECASE)
_FOREIGN = re.compile(r"(pytorch_model|tf_model|flax_model|consolidated|rust_model).*\.json|trainer_state\.json")
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_ENDING = ".index.json"
_INDEX = ".safetensors.index.json"
_INFIX = rf"\.({'|'.join(dtype.file_variant for dtype in DTYPES.values() if dtype.file_variant)})"
_VARIANT = re.compile(
    rf"{_INFIX}(?=\.safetensors$|-\d+-of-\d+\.safetensors$)|(?<=\.safetensors\.index){_INFIX}(?=\.json$)"
)
_EXTRA_FOLDERS = ("additional_chat_templates",)
MAX_SMALL_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Selection:
    """The files of one snapshot; `indexes` maps the path of each index to its `weight_map`."""

    small: tuple[SourceFile, ...]
    weights: tuple[SourceFile, ...]
    indexes: Mapping[str, Mapping[str, str]]

    def __post_init__(self) -> None:
        check_file_names(stored_path(file.path) for file in (*self.small, *self.weights))

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in (*self.small, *self.weights))


def is_pickle(path: str) -> bool:
    """Whether a file of weights is a pickle."""
    return PurePosixPath(path).suffix in _PICKLES


def stored_path(path: str) -> str:
    """The name under which a file is stored: a pickle and its index get the names of the converted files, an `.fp16.`
    file and its index those of the plain ones."""
    folder, name = folder_of(path), PurePosixPath(path).name
    if _is_variant(path):
        return _join(folder, _VARIANT.sub("", name))
    if name.endswith(".bin.index.json"):
        return _join(folder, _stored_stem(name.removesuffix(".bin.index.json")) + _INDEX)
    if is_pickle(path):
        return _join(folder, _stored_stem(PurePosixPath(name).stem) + ".safetensors")
    return path


def _is_variant(path: str) -> bool:
    """Whether a file holds, or lists, weights that their authors have converted to a dtype, as its name says."""
    return _VARIANT.search(path) is not None


def _stored_stem(stem: str) -> str:
    return "model" + stem.removeprefix("pytorch_model") if stem.startswith("pytorch_model") else stem


def code_in(path: str, data: bytes, repo: Collection[str]) -> str:
    """The part of a config that makes its reader run code, as a phrase; empty if there is none. `repo`: all its
    files."""
    name = PurePosixPath(path).name
    if not name.endswith(".json") or not ("config" in name or name in ("model_index.json", "modules.json")):
        return ""
    record = parse_json(data, path)
    if name == "modules.json" and isinstance(record, list):
        types = [module.get("type") for module in record if isinstance(module, dict)]
        foreign = [each for each in types if not str(each).startswith("sentence_transformers.")]
        return f"the module type {foreign[0]!r} in {path}" if foreign else ""
    if name == "model_index.json" and isinstance(record, dict):
        for part, value in record.items():
            library = value[0] if isinstance(value, list) and value else value if part == "_class_name" else None
            if {f"{library}.py", f"{part}/{library}.py"} & set(repo):
                return f"{library!r} in {path}, which is a Python file of the repo"
    key = _code_key(record)
    return f"{key!r} in {path}" if key else ""


def _code_key(record: object) -> str:
    """The first key, at any depth, that has made transformers import a module of a repo (CVE-2026-4372, -5241)."""
    if isinstance(record, list):
        return next((key for value in record if (key := _code_key(value))), "")
    if not isinstance(record, dict):
        return ""
    for key, value in record.items():
        if (key == "auto_map" and value) or (key.endswith("_internal") and value is not None):
            return str(key)
        if key_inside := _code_key(value):
            return key_inside
    return ""


def select_files(
    files: tuple[SourceFile, ...],
    read: Callable[[SourceFile], bytes],
    *,
    repo_id: str,
    pickles: bool = False,
    code: bool = False,
    variant: str = "",
) -> Selection:
    """Choose a snapshot's files; `read` gives the bytes of a small one. `pickles`, `code`: whether they are allowed;
    `variant`: the infix of a pipeline's own files that are preferred, such as `fp16`.

    Raises NoWeights or PickleRefused if there are no safetensors, UnsafeName for a name that leaves the folder, and
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
        in_folder = [file for file in files if folder_of(file.path) == folder and not _is_variant(file.path)]
        small += [file for file in in_folder if _is_small(file) or (code and file.path.endswith(".py"))]
        name = _join(folder, _weights_name(in_folder, pickles=pickles))
        index, single = by_path.get(name + _ENDING), by_path.get(name)
        if variant and folder:
            preferred = by_path.get(f"{name.removesuffix('.safetensors')}.{variant}.safetensors")
            listed = by_path.get(f"{name}.index.{variant}.json")
            if preferred or listed:
                small = [file for file in small if file is not index]
                index, single = listed, preferred
        if single:
            weights.append(single)
            small = [file for file in small if file is not index]
        elif index:
            weight_map = _weight_map(index.path, read(index))
            indexes[index.path] = weight_map
            small += [index] if index not in small else []
            weights += [_shard(by_path, folder, shard, index.path) for shard in sorted(set(weight_map.values()))]
        else:
            all_here = [file for file in files if folder_of(file.path) == folder]
            plain = [file for file in in_folder if file.path.endswith(".safetensors")]
            weights += plain or [file for file in all_here if file.path.endswith(".safetensors")]
    for folder in _EXTRA_FOLDERS:
        small += [file for file in files if folder_of(file.path) == folder and _is_small(file)]
    if not weights:
        raise _no_weights(files, repo_id)
    return Selection(tuple(small), tuple(weights), indexes)


def _component_folders(by_path: Mapping[str, SourceFile], read: Callable[[SourceFile], bytes]) -> list[str]:
    """The sub-folders that a pipeline's or a sentence-transformer's own index names."""
    named: set[str] = set()
    if pipeline := by_path.get("model_index.json"):
        record = parse_json(read(pipeline), pipeline.path)
        if isinstance(record, dict):
            named |= {name for name, value in record.items() if isinstance(value, list)}
    if modules := by_path.get("modules.json"):
        record = parse_json(read(modules), modules.path)
        if isinstance(record, list):
            named |= {str(module["path"]) for module in record if isinstance(module, dict) and module.get("path")}
    return sorted(name for name in named if any(folder_of(path) == name for path in by_path))


def _weights_name(files: list[SourceFile], *, pickles: bool) -> str:
    """The name that this folder's weights go by, single or before `.index.json`; a pickle's only if there are no
    safetensors."""
    names = {PurePosixPath(file.path).name for file in files}
    known = ["model.safetensors", "diffusion_pytorch_model.safetensors"]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        known += ["pytorch_model.bin", "diffusion_pytorch_model.bin"]
    for name in known:
        if name in names or f"{name}.index.json" in names:
            return name
    return "model.safetensors"


def _weight_map(path: str, data: bytes) -> dict[str, str]:
    record = parse_json(data, path)
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
    if file is None or not (name.endswith(".safetensors") or (is_pickle(name) and is_pickle(index[: -len(_ENDING)]))):
        raise BadSafetensors(f"{index} names {name[:120]!r}, which the repo does not have: name another revision")
    return file


def _no_weights(files: tuple[SourceFile, ...], repo_id: str) -> NoWeights | PickleRefused:
    suffixes = {PurePosixPath(file.path).suffix for file in files}
    if suffixes & _PICKLES:
        return PickleRefused(
            f"{repo_id} has its weights only as pickles, which can run code when opened: "
            "use a revision or a repo with safetensors, or allow it with --allow-pickle"
        )
    return NoWeights(f"{repo_id} has no safetensors weights: use a repo or a revision that has them")


def _is_small(file: SourceFile) -> bool:
    name = PurePosixPath(file.path)
    if name.name.startswith(".") or file.size_bytes > MAX_SMALL_BYTES:
        return False
    if _LICENCE.fullmatch(name.name):
        return name.suffix not in {".py", ".sh"}
    if name.name.endswith(".bin.index.json"):
        return False
    return name.suffix in _SMALL_SUFFIXES and not _FOREIGN.fullmatch(name.name)


def parse_json(data: bytes, path: str) -> Any:
    """A repo's own JSON. Raises BadSafetensors, which names `path`."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSafetensors(f"{path} is not JSON ({error}): the repo is damaged, name another revision") from error


def folder_of(path: str) -> str:
    """The folder of a path in a repo; empty for the repo's root."""
    return path.rpartition("/")[0]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
