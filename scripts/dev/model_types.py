#!/usr/bin/env python3
"""Generate `modelstore/model_types.json`: what a fill has to know of each model type of transformers.

    python scripts/dev/model_types.py            write the table
    python scripts/dev/model_types.py --check    exit 1, with a diff, if the committed one differs
    python scripts/dev/model_types.py --check --sample 20    the same for 20 folders, others each time

For each `model_type`, of all its loadable classes, built tiny on the meta device (`tiny_models.py`):

`both`, `float16`
    Weights that `from_pretrained(dtype=…)` keeps wider than asked, for bfloat16 too, or for float16 alone: the store
    must not round them, or loading from it would not give the same bits. They are the union of the class flags
    `_keep_in_fp32_modules` and `_keep_in_fp32_modules_strict`, of parameters and stored buffers that a class makes in
    float32 whatever is asked, and of those that the source makes so in a branch that no configuration here reaches.
    Keeping too much is harmless (loading casts it), keeping too little is not: so patterns are unanchored, `*` is any
    text.
`names`
    The last parts of the names of tensors that its classes load, beside `weight` and `bias`.
`tied`
    Regular expressions of weights that are another weight under a second name, which a checkpoint may leave out.
`classes`
    The classes that `architectures` may name; those that continue a text, with true.
`unbuildable`
    Why one of its classes cannot be built here, or compared by `conformance.py`. The table may then miss something, and
    the type is stored unchanged.

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
import random
import re
import secrets
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
import transformers
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

sys.path.insert(0, str(Path(__file__).parent))

from tiny_models import built_on_meta, loadable_classes, tiny_configs

TABLE = Path(__file__).parent.parent.parent / "modelstore" / "model_types.json"
_DEFAULT_DTYPE = frozenset({"zeros", "ones", "empty", "full", "tensor", "arange", "randn", "rand"})
_EVERYWHERE = frozenset({"weight", "bias"})
_NOT_COMPARED = frozenset(  # built here, but transformers cannot save and load them: conformance.py finds them
    {"Deimv2ForObjectDetection", "JevForDecision", "Qwen2_5OmniForConditionalGeneration", "VoxtralRealtimeTextModel"}
)


def modelling_files(name: str) -> tuple[list[ModuleType], str]:
    """The modelling modules of a folder of transformers, none if it has no torch code; and why one cannot be imported
    here."""
    modules: list[ModuleType] = []
    reason = ""
    try:
        package = importlib.import_module(f"transformers.models.{name}")
    except ImportError:
        return [], ""
    for file in sorted(Path(package.__path__[0]).glob("modeling_*.py")):
        try:
            modules.append(importlib.import_module(f"transformers.models.{name}.{file.stem}"))
        except ImportError as error:
            reason = f"{file.stem}: {type(error).__name__}"
    return modules, reason


def classes_of(module: ModuleType) -> list[type[PreTrainedModel]]:
    found = inspect.getmembers(module, inspect.isclass)
    return [c for _, c in found if issubclass(c, PreTrainedModel) and c.__module__ == module.__name__]


@dataclass(frozen=True, slots=True)
class InSource:
    """The names that modelling source gives to parameters and stored buffers; `wide`: those made in float32."""

    names: frozenset[str]
    wide: frozenset[str]


def in_source(module: ModuleType) -> InSource:
    """The parameters and stored buffers of a module's source, with those of branches that are never built here."""
    names: set[str] = set()
    wide: set[str] = set()
    for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
        match node:
            case ast.Assign(targets=[ast.Attribute(attr=name)], value=ast.Call() as call):
                kind = ast.unparse(call.func).rpartition(".")[2]
            case ast.Call(func=ast.Attribute(attr="register_buffer"), args=[ast.Constant(value=str(name)), *_]) as call:
                kind = "Buffer"
            case _:
                continue
        if kind not in ("Parameter", "Buffer"):
            if _mentions_float32(call) and "nn." in ast.unparse(call.func):
                wide.add(f".{name}.")
            continue
        if _is_transient(call):
            continue
        names.add(name)
        if _may_be_float32(call, kind) and name not in _EVERYWHERE:
            wide.add(f".{name}")
    return InSource(frozenset(names), frozenset(wide))


def _is_transient(call: ast.Call) -> bool:
    return any(k.arg == "persistent" and ast.unparse(k.value) == "False" for k in call.keywords)


def _mentions_float32(node: ast.AST) -> bool:
    text = ast.unparse(node)
    return "torch.float32" in text or "torch.float)" in text or ".float()" in text


def _may_be_float32(call: ast.Call, kind: str) -> bool:
    """Whether a parameter or a buffer may be float32 in a model of another dtype: it says so, or, for a buffer, it is
    computed before, and not made by one of torch's functions that follow the default dtype."""
    if _mentions_float32(call):
        return True
    value = call.args[-1] if call.args else None
    if kind == "Parameter" or value is None or (isinstance(value, ast.Constant) and value.value is None):
        return False
    made_by = ast.unparse(value.func).rpartition(".")[2] if isinstance(value, ast.Call) else ""
    return made_by not in _DEFAULT_DTYPE


@dataclass(slots=True)
class Built:
    """What the built models of some classes show; see the module's docstring."""

    float16: set[str] = field(default_factory=set)
    both: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    unbuildable: list[str] = field(default_factory=list)

    def add(self, cls: type[PreTrainedModel]) -> None:
        """Build `cls` on the meta device under float16, in each of its tiny configurations."""
        if cls.__name__ in _NOT_COMPARED:
            self.unbuildable.append(f"{cls.__name__}: not compared")
            return
        try:
            configs = list(tiny_configs(cls))
        except Exception as error:  # transformers raises of every kind for a class that cannot be built here
            self.unbuildable.append(f"{cls.__name__}: {type(error).__name__}")
            return
        for config in configs:
            torch.set_default_dtype(torch.float16)
            try:
                model = built_on_meta(cls, config)
            except Exception as error:
                self.unbuildable.append(f"{cls.__name__}: {type(error).__name__} under float16")
                continue
            finally:
                torch.set_default_dtype(torch.float32)
            for name, patterns in (("float16", self.float16), ("bfloat16", self.both)):
                wider = _wider_in(model, model._get_dtype_plan(getattr(torch, name)))
                patterns |= _as_checkpoints_name(model, wider)
            state = revert_weight_conversion(model, model.state_dict())
            self.names |= {name.rpartition(".")[2] for name in (*state, *model.state_dict())}


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


def facts_of(folder: str) -> dict[str, Any]:
    """The entry of the model types whose classes are in one folder of transformers."""
    built = Built()
    tied: set[str] = set()
    classes: dict[str, bool] = {}
    modules, reason = modelling_files(folder)
    if reason:
        built.unbuildable.append(reason)
    for module in modules:
        source = in_source(module)
        built.both |= source.wide
        built.names |= source.names
        for cls in classes_of(module):
            built.both |= set(cls._keep_in_fp32_modules_strict or ())
            built.float16 |= set(cls._keep_in_fp32_modules or ())
            if not isinstance(keys := cls._tied_weights_keys or (), property):
                tied |= set(keys)
            if cls.__name__ in _LOADABLE:
                classes[cls.__name__] = cls.__name__ in _CONTINUE_TEXT and cls.main_input_name == "input_ids"
                built.add(cls)
    facts: dict[str, Any] = {
        "both": _compact(built.both, below=set()),
        "float16": _compact(built.float16, below=built.both),
        "names": sorted(built.names - _EVERYWHERE),
        "tied": sorted(tied),
        "classes": dict(sorted(classes.items())),
        "unbuildable": "; ".join(sorted(built.unbuildable)[:1]),
    }
    return {name: value for name, value in facts.items() if value}


_LOADABLE = frozenset(loadable_classes())
_CONTINUE_TEXT = frozenset(
    name
    for mapping in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    for entry in mapping.values()
    for name in ([entry] if isinstance(entry, str) else entry)
)


def build_table(committed: Mapping[str, Any], sample: int | None, seed: int) -> dict[str, object]:
    """The table; the entries of folders that are not in the `sample` are those of the committed one."""
    types = sorted(CONFIG_MAPPING_NAMES)
    folders = sorted({model_type_to_module_name(name) for name in types})
    chosen = folders if sample is None else random.Random(seed).sample(folders, min(sample, len(folders)))
    with multiprocessing.get_context("fork").Pool() as pool:
        facts = dict(zip(chosen, pool.map(facts_of, chosen, chunksize=2), strict=True))
    before = committed.get("model_types", {})
    return {
        "made_by": "scripts/dev/model_types.py",
        "transformers": transformers.__version__,
        "model_types": {name: facts.get(model_type_to_module_name(name), before.get(name)) for name in types},
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


def _compact(patterns: set[str], *, below: set[str]) -> list[str]:
    """Sorted, without patterns that another one, or one of `below`, already covers."""
    wider = patterns | below
    kept = [pattern for pattern in sorted(patterns) if pattern not in below]
    return [p for p in kept if not any(o != p and o.replace("*", "") and o in p for o in wider)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed table, write nothing")
    parser.add_argument("--sample", type=int, help="with --check: so many folders of transformers")
    parser.add_argument("--seed", type=int, help="of the sample; another one each time without it")
    options = parser.parse_args()
    if options.sample is not None and not options.check:
        parser.error("--sample is for --check: a table is written whole")
    seed = options.seed if options.seed is not None else secrets.randbelow(2**31)
    gc.disable()  # importing every model makes a third more work of it
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    committed = TABLE.read_text() if TABLE.exists() else "{}"
    text = json.dumps(build_table(json.loads(committed), options.sample, seed), indent=1) + "\n"
    if not options.check:
        TABLE.write_text(text)
        return 0
    if options.sample is not None:
        print(f"--sample {options.sample} --seed {seed}")
    sys.stdout.writelines(difflib.unified_diff(committed.splitlines(True), text.splitlines(True), "committed", "now"))
    return int(committed != text)


if __name__ == "__main__":
    sys.exit(main())
