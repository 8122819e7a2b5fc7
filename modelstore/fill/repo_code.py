"""Whether a repo's configs make their reader run code of the repo.

`auto_map` beside a `model_type` that transformers has does not: its own class is used, and none of the code is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import PurePosixPath

from modelstore.errors import BadSafetensors
from modelstore.fill.components import MODULES_INDEX, PIPELINE_INDEX
from modelstore.fill.repo_files import folder_of, join, parse_json, parse_object
from modelstore.model_types import is_known

_IGNORED_IF_NO_JSON = "generation_config.json"  # by transformers, which takes the values of config.json then


def code_of(paths: Iterable[str], read: Callable[[str], bytes], repo: Collection[str], *, allowed: bool = False) -> str:
    """The first part of these configs that makes its reader run code, as a phrase; empty if there is none.

    `read` gives the bytes of a path, `repo` is all paths of the repo. `allowed`: code of a tokenizer or a processor
    counts, too, if transformers has the model's type: its own are used without it, and may not fit.
    """
    configs = sorted(path for path in paths if path.endswith(".json"))
    model_types = {
        folder_of(path): parse_object(read(path), path).get("model_type")
        for path in configs
        if PurePosixPath(path).name == "config.json"
    }
    for path in configs:
        folder = folder_of(path)
        model_type = None if allowed and path != join(folder, "config.json") else model_types.get(folder)
        if phrase := code_in(path, read(path), repo, model_type=model_type):
            return phrase
    return ""


def code_in(path: str, data: bytes, repo: Collection[str], *, model_type: object = None) -> str:
    """The part of a config that makes its reader run code, as a phrase; empty if there is none.

    `repo`: all its files; `model_type`: that of the model which the config belongs to, for one that does not name it.
    """
    name = PurePosixPath(path).name
    if not name.endswith(".json") or not ("config" in name or name in (PIPELINE_INDEX, MODULES_INDEX)):
        return ""
    try:
        record = parse_json(data, path)
    except BadSafetensors:
        if name == _IGNORED_IF_NO_JSON:
            return ""
        raise
    if name == MODULES_INDEX and isinstance(record, list):
        types = [module.get("type") for module in record if isinstance(module, dict)]
        foreign = [each for each in types if not str(each).startswith("sentence_transformers.")]
        return f"the module type {foreign[0]!r} in {path}" if foreign else ""
    if name == PIPELINE_INDEX and isinstance(record, dict):
        for part, value in record.items():
            library = value[0] if isinstance(value, list) and value else value if part == "_class_name" else None
            if {f"{library}.py", f"{part}/{library}.py"} & set(repo):
                return f"{library!r} in {path}, which is a Python file of the repo"
    key = _code_key(record, model_type)
    return f"{key!r} in {path}" if key else ""


def _code_key(record: object, model_type: object) -> str:
    """The first key, at any depth, that has made transformers import a module of a repo (CVE-2026-4372, -5241)."""
    if isinstance(record, list):
        return next((key for value in record if (key := _code_key(value, model_type))), "")
    if not isinstance(record, dict):
        return ""
    model_type = record.get("model_type", model_type)
    for key, value in record.items():
        if key == "auto_map" and value and not is_known(model_type):
            return "auto_map"
        if key.endswith("_internal") and value is not None:
            return str(key)
        if key_inside := _code_key(value, model_type):
            return key_inside
    return ""
