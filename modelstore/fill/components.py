"""The folders of a repo that hold a part of the model: those that the repo's own index names.

model_index.json        a pipeline of diffusers: one folder a part, no weights at the root
modules.json            sentence-transformers: one folder a module; the root, if a module has an empty path
router_config.json      a router of sentence-transformers, in the folder of a module: one folder below it a module
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from modelstore.errors import BadSafetensors
from modelstore.fill.repo_files import folder_of, is_weights, join, parse_json, parse_object
from modelstore.fill.source import SourceFile

PIPELINE_INDEX = "model_index.json"
MODULES_INDEX = "modules.json"
_ROUTER_INDEX = "router_config.json"
_MOST_FOLDERS = 1000
_WEIGHTLESS_CLASSES = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "ProcessorFast", "FeatureExtractor")
_WEIGHTLESS_MODULES = frozenset({
    "Asym", "BoW", "Dropout", "HierarchicalTokenPooling", "LambdaTokenPooling", "LogitScore", "MultiVectorMask",
    "Normalize", "Pooling", "Router", "SpladePooling",
})  # fmt: skip

ReadFile = Callable[[SourceFile], bytes]


@dataclass(frozen=True, slots=True)
class Component:
    """A folder, empty for the repo's root; `named_by` is the index that names it, empty if none does.

    `has_weights`: whether a program that follows the index opens weights there.
    """

    folder: str
    named_by: str
    has_weights: bool


def components(files: Mapping[str, SourceFile], read: ReadFile) -> list[Component]:
    """The components of a repo, its root first; `files` by path. Raises BadSafetensors for an index that cannot be
    followed."""
    if PIPELINE_INDEX in files:
        return [Component("", "", has_weights=False), *_parts_of_pipeline(files, read)]
    if MODULES_INDEX in files:
        modules = list(_modules(files, read))
        root = [module for module in modules if not module.folder]
        return [
            Component("", "", has_weights=any(module.has_weights for module in root)),
            *sorted((module for module in modules if module.folder), key=lambda module: module.folder),
        ]
    return [Component("", "", has_weights=True)]


def _parts_of_pipeline(files: Mapping[str, SourceFile], read: ReadFile) -> Iterator[Component]:
    record = parse_object(read(files[PIPELINE_INDEX]), PIPELINE_INDEX)
    for name, value in sorted(record.items()):
        is_part = isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)
        if name.startswith("_") or not is_part:
            continue
        inside = _inside(files, name)
        if not any(path.startswith(f"{name}/") for path in files):
            raise BadSafetensors(f"{PIPELINE_INDEX} names {name[:80]!r}, a folder that the repo does not have")
        holds = any(map(is_weights, inside))
        is_model = join(name, "config.json") in inside and not value[1].endswith(_WEIGHTLESS_CLASSES)
        yield Component(name, PIPELINE_INDEX, has_weights=holds or is_model)


def _modules(files: Mapping[str, SourceFile], read: ReadFile) -> Iterator[Component]:
    record = parse_json(read(files[MODULES_INDEX]), MODULES_INDEX)
    pending = [
        (_normal(str(module.get("path") or "")), str(module.get("type") or ""), MODULES_INDEX)
        for module in (record if isinstance(record, list) else ())
        if isinstance(module, dict)
    ]
    seen: set[str] = set()
    while pending:
        folder, kind, named_by = pending.pop()
        if folder in seen:
            continue
        seen.add(folder)
        if len(seen) > _MOST_FOLDERS:
            raise BadSafetensors(f"{MODULES_INDEX} names more than {_MOST_FOLDERS} folders: name another revision")
        inside = _inside(files, folder)
        router = join(folder, _ROUTER_INDEX)
        if router not in files:  # older versions wrote it there
            router = join(folder, "config.json")
        is_router = kind.endswith((".Router", ".Asym")) and router in files
        if is_router:
            types = parse_object(read(files[router]), router).get("types")
            for name, inner in (types if isinstance(types, dict) else {}).items():
                pending.append((join(folder, _normal(str(name))), str(inner), router))
        holds = any(map(is_weights, inside))
        is_model = not is_router and kind.rpartition(".")[2] not in _WEIGHTLESS_MODULES
        yield Component(folder, named_by, has_weights=holds or is_model)


def _normal(path: str) -> str:
    """The path of a folder without `./` and a slash at its end."""
    return "" if path in ("", ".", "./") else str(PurePosixPath(path))


def _inside(files: Mapping[str, SourceFile], folder: str) -> set[str]:
    """The paths of the files in a folder, not below it."""
    return {path for path in files if folder_of(path) == folder}
