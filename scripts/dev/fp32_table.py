#!/usr/bin/env python3
"""Generate `modelstore/fill/fp32_modules.json`: which weights `from_pretrained(dtype=…)` keeps wider than asked.

    python scripts/dev/fp32_table.py            write the table
    python scripts/dev/fp32_table.py --check    exit 1, with a diff, if the committed one differs

The store must not round what transformers would have kept, or loading from it would not give the same bits. Three
places in transformers decide, and the table is their union, by `model_type`:

1. the class flags `_keep_in_fp32_modules` (float16 only) and `_keep_in_fp32_modules_strict` (bfloat16 too), of every
   class in the type's modelling files: patterns searched in the parameter's name;
2. parameters and buffers that a constructor makes in float32 whatever is asked: found by building every class on the
   meta device under float16, and written as checkpoint names (undoing the renames that loading does);
3. the same found in the source, for branches that a default config does not reach and classes that do not build here.

Keeping too much is harmless (loading casts it), keeping too little is not: so patterns are unanchored, `*` is any text.

diffusers decides by the class flag `_keep_in_fp32_modules` alone, whatever is asked: names that are a whole part of the
parameter's, between dots. Its models are listed by class, those with nothing to keep too, because one that is not
listed is stored as it came.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import gc
import importlib
import inspect
import json
import multiprocessing
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import diffusers
import torch
import transformers
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

TABLE = Path(__file__).parent.parent.parent / "modelstore" / "fill" / "fp32_modules.json"


def modelling_files(model_type: str) -> list[ModuleType]:
    """The modelling modules of a type; empty for a type without torch code, or whose imports are missing here."""
    name = model_type_to_module_name(model_type)
    found = []
    try:
        package = importlib.import_module(f"transformers.models.{name}")
    except ImportError:
        return []
    for file in sorted(Path(package.__path__[0]).glob("modeling_*.py")):
        try:
            found.append(importlib.import_module(f"transformers.models.{name}.{file.stem}"))
        except ImportError:
            continue
    return found


def classes_of(module: ModuleType) -> list[type[PreTrainedModel]]:
    found = inspect.getmembers(module, inspect.isclass)
    return [c for _, c in found if issubclass(c, PreTrainedModel) and c.__module__ == module.__name__]


def loadable_classes() -> Iterator[str]:
    """The names of the classes that a checkpoint's `architectures` may give: all that the Auto classes know."""
    for mapping in (value for name, value in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")):
        for names in mapping.values():
            yield from [names] if isinstance(names, str) else filter(None, names)


def names_made_float32(module: ModuleType) -> set[str]:
    """Attributes that the source makes as float32 parameters or buffers, as `.name` patterns."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
        match node:
            case ast.Assign(targets=[ast.Attribute(attr=name)], value=ast.Call() as call) if _is_parameter(call):
                if _mentions_float32(call):
                    found.add(f".{name}")
            case ast.Call(func=ast.Attribute(attr="register_buffer"), args=[ast.Constant(value=str(name)), *_]):
                if _mentions_float32(node) and not _is_transient(node):
                    found.add(f".{name}")
    return found


def _is_parameter(call: ast.Call) -> bool:
    return ast.unparse(call.func).endswith("Parameter")


def _is_transient(call: ast.Call) -> bool:
    return any(k.arg == "persistent" and ast.unparse(k.value) == "False" for k in call.keywords)


def _mentions_float32(node: ast.AST) -> bool:
    return "torch.float32" in ast.unparse(node) or "torch.float)" in ast.unparse(node)


def names_built_wider(cls: type[PreTrainedModel]) -> dict[str, set[str]]:
    """Checkpoint names that a default-config model of `cls` holds wider than the dtype asked for, as patterns."""
    try:
        torch.set_default_dtype(torch.float16)
        with torch.device("meta"):
            model = cls(cls.config_class())
        torch.set_default_dtype(torch.float32)
        plans = {name: model._get_dtype_plan(getattr(torch, name)) for name in ("float16", "bfloat16")}
        wider = {name: _wider_in(model, plan) for name, plan in plans.items()}
        patterns = {keys: _as_checkpoints_name(model, keys) for keys in set(wider.values())}  # most plans agree
        return {name: patterns[keys] for name, keys in wider.items()}
    except Exception:  # transformers raises of every kind here: a config without defaults, a library not installed
        return {"float16": set(), "bfloat16": set()}
    finally:
        torch.set_default_dtype(torch.float32)


def _wider_in(model: PreTrainedModel, plan: dict[str, torch.dtype]) -> frozenset[str]:
    """The keys of a model's state that are wider than float16, or are kept so by `plan`."""
    patterns = [re.compile(pattern.replace("*", ".*")) for pattern in plan]
    return frozenset(
        key
        for key, value in model.state_dict().items()
        if value.is_floating_point()
        and (value.dtype != torch.float16 or any(pattern.search(key) for pattern in patterns))
    )


def _as_checkpoints_name(model: PreTrainedModel, wider: frozenset[str]) -> set[str]:
    """These keys of a model's state as patterns of a checkpoint's names."""
    if not wider:
        return set()
    held = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
    state = {key: value.to(torch.float32) if key in wider else value for key, value in held.items()}
    state = revert_weight_conversion(model, state)
    wide = {key for key, value in state.items() if value.dtype != torch.float16}
    return {_generalise(name) for name in _common_prefixes(wide, set(state))}


def _common_prefixes(kept: set[str], every: set[str]) -> set[str]:
    """`kept` with whole sub-trees of `every` written as one prefix, `a.b.` for all of `a.b.*`."""
    if not kept:
        return set()
    not_kept_under = {name[: i + 1] for name in every - kept for i, c in enumerate(name) if c == "."}
    short = set()
    for name in kept:
        dots = [i + 1 for i, c in enumerate(name) if c == "."]
        short.add(next((name[:end] for end in dots if name[:end] not in not_kept_under), name))
    return short


def _generalise(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)


def patterns_of(model_type: str) -> tuple[set[str], set[str]]:
    """One type's patterns: for float16, and for float16 and bfloat16 alike."""
    narrow: set[str] = set()
    both: set[str] = set()
    loadable = set(loadable_classes())
    for module in modelling_files(model_type):
        both |= names_made_float32(module)
        for cls in classes_of(module):
            both |= set(cls._keep_in_fp32_modules_strict or ())
            narrow |= set(cls._keep_in_fp32_modules or ())
            if cls.__name__ in loadable:
                built = names_built_wider(cls)
                both |= built["bfloat16"]
                narrow |= built["float16"]
    return narrow, both


def build_table() -> dict[str, object]:
    types = list(CONFIG_MAPPING_NAMES)
    with multiprocessing.get_context("fork").Pool() as pool:
        found = dict(zip(types, pool.map(patterns_of, types, chunksize=4), strict=True))
    both = {name: patterns for name, (_, patterns) in found.items()}
    return {
        "made_by": "scripts/dev/fp32_table.py",
        "transformers": transformers.__version__,
        "float16_only": _compact({name: patterns for name, (patterns, _) in found.items()}, below=both),
        "float16_and_bfloat16": _compact(both),
        "model_types": sorted(types),
        "diffusers": diffusers.__version__,
        "diffusers_classes": diffusers_classes(),
    }


def diffusers_classes() -> dict[str, list[str]]:
    """What each model of diffusers keeps in float32."""
    found = {}
    for name in sorted(dir(diffusers)):
        try:
            cls = getattr(diffusers, name)
        except (ImportError, RuntimeError):  # it needs a package that is not here
            continue
        if inspect.isclass(cls) and issubclass(cls, diffusers.ModelMixin):
            found[name] = sorted(cls._keep_in_fp32_modules or ())
    return found


def _compact(table: dict[str, set[str]], *, below: dict[str, set[str]] | None = None) -> dict[str, list[str]]:
    """Sorted, without patterns that another of the same type, or of `below`, already covers."""
    out = {}
    for model_type, patterns in sorted(table.items()):
        wider = patterns | (below or {}).get(model_type, set())
        kept = [p for p in sorted(patterns) if p not in (below or {}).get(model_type, set())]
        kept = [p for p in kept if not any(o != p and o.replace("*", "") and o in p for o in wider)]
        if kept:
            out[model_type] = kept
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed table, write nothing")
    check = parser.parse_args().check
    gc.disable()  # importing every model makes a third more work of it
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    text = json.dumps(build_table(), indent=1) + "\n"
    if not check:
        TABLE.write_text(text)
        return 0
    committed = TABLE.read_text()
    sys.stdout.writelines(difflib.unified_diff(committed.splitlines(True), text.splitlines(True), "committed", "now"))
    return int(committed != text)


if __name__ == "__main__":
    sys.exit(main())
