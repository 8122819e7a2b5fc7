"""Why a repo, or a folder of it, gives no weights: what it holds instead, and what to name in its place.

All of it is told before a download, from the names of the files and one small config.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

from modelstore.errors import NoWeights, PickleRefused
from modelstore.fill.components import Component, ReadFile
from modelstore.fill.repo_files import folder_of, is_foreign_weights, is_pickle, is_weights, join, parse_object
from modelstore.fill.source import SourceFile
from modelstore.units import first_names


def missing_weights(
    part: Component, files: Mapping[str, SourceFile], read: ReadFile, *, repo_id: str, convertible: bool
) -> NoWeights | PickleRefused:
    """The error for a component without weights that may be stored. `convertible`: whether its pickles could be, with
    permission."""
    label = repo_id
    if part.folder:
        label = f"the folder {part.folder} of {repo_id}, which {part.named_by} names,"
    names = sorted(PurePosixPath(path).name for path in files if folder_of(path) == part.folder and is_weights(path))
    if not names and not part.folder:
        names = sorted(path for path in files if is_weights(path))
    adapter = join(part.folder, "adapter_config.json")
    if adapter in files:
        return _adapter(label, parse_object(read(files[adapter]), adapter))
    pickled = [name for name in names if is_pickle(name)]
    if convertible:
        return PickleRefused(
            f"{label} has its weights only as pickles ({first_names(pickled)}), which can run code when opened: use a "
            "revision or a repo with safetensors, or allow it with --allow-pickle (MODELSTORE_ALLOW_PICKLE=1)"
        )
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return NoWeights(
            f"{label} has GGUF only ({first_names(gguf)}), which llama.cpp serves: "
            "name the repo with safetensors that these files were made from"
        )
    safetensors = [name for name in names if name.endswith(".safetensors")]
    shown = first_names(safetensors)
    if lora := [name for name in safetensors if is_foreign_weights(name) and "lora" in name.lower()]:
        return NoWeights(
            f"{label} is a LoRA adapter ({first_names(lora)}) and no model: name the model that it was made for"
        )
    if pickled:
        return PickleRefused(
            f"{label} has its weights as {first_names(pickled)}, pickles that transformers does not open by these "
            "names: name a repo with safetensors; of pickles only pytorch_model.bin and its shards are converted"
        )
    if safetensors and join(part.folder, "config.json") in files:
        return NoWeights(
            f"{label} has safetensors by names that its loader does not take for the model's ({shown}): "
            "name a repo with model.safetensors, or all shards of it"
        )
    if safetensors and not part.folder:
        return NoWeights(
            f"{label} is a Diffusers single file, or another program's ({shown}), without config.json: "
            "name the repo of the same model in folders, with model_index.json"
        )
    if names:
        return NoWeights(
            f"{label} has its weights only as {first_names(names)}: use a repo or a revision with safetensors"
        )
    return NoWeights(f"{label} has no safetensors weights: use a repo or a revision that has them")


def _adapter(label: str, config: Mapping[str, object]) -> NoWeights:
    kind = str(config.get("peft_type") or "LoRA").replace("LORA", "LoRA")[:40]
    base = config.get("base_model_name_or_path")
    beside = f"{base}, with this in MODEL_ADAPTERS" if kind == "LoRA" else base
    remedy = f"name {beside}, or a repo with the two merged" if base else "name a repo with the two merged"
    return NoWeights(f"{label} is a {kind} adapter of {base or 'another model'}: it is no model by itself; {remedy}")
